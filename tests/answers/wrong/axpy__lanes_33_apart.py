# fault: demand
import triton
import triton.language as tl


@triton.jit
def axpy_kernel(a, x_ptr, y_ptr, z_ptr, N, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + (tl.arange(0, BLOCK) * 33) % BLOCK  # [BLOCK]
    mask = cols < N
    x = tl.load(x_ptr + cols, mask=mask)
    y = tl.load(y_ptr + cols, mask=mask)
    tl.store(z_ptr + cols, a * x + y, mask=mask)


def axpy(a, x, y, z):
    N = x.numel()
    axpy_kernel[(triton.cdiv(N, 1024),)](a, x, y, z, N, BLOCK=1024)
