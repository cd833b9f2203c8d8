# fault: out of bounds
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < N  # the last program's block may end past the tensors
    x = tl.load(x_ptr + cols)
    y = tl.load(y_ptr + cols)
    tl.store(out_ptr + cols, x + y, mask=mask)


def vector_add(x, y, out):
    N = x.numel()
    add_kernel[(triton.cdiv(N, 1024),)](x, y, out, N, BLOCK=1024)
