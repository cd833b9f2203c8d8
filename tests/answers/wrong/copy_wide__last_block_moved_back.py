# fault: out of bounds
import triton
import triton.language as tl


@triton.jit
def wide_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    start = tl.minimum(tl.program_id(0) * BLOCK, N - BLOCK)
    cols = start + tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, tl.load(x_ptr + cols))


def copy_wide(x, out):
    N = x.numel()
    wide_kernel[(triton.cdiv(N, 256),)](x, out, N, BLOCK=256)
