# fault: out of bounds
import triton
import triton.language as tl


@triton.jit
def axpy_kernel(a, x_ptr, y_ptr, z_ptr, N, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    x = tl.load(x_ptr + cols)
    y = tl.load(y_ptr + cols)
    tl.store(z_ptr + cols, a * x + y)


def axpy(a, x, y, z):
    N = x.numel()
    axpy_kernel[(triton.cdiv(N, 1024),)](a, x, y, z, N, BLOCK=1024)
