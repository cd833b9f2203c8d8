# fault: out of bounds
import triton
import triton.language as tl


@triton.jit
def wide_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    if start < N:
        tl.store(out_ptr + cols, tl.load(x_ptr + cols))
    else:
        mask = cols < N
        tl.store(out_ptr + cols, tl.load(x_ptr + cols, mask=mask), mask=mask)


def copy_wide(x, out):
    N = x.numel()
    wide_kernel[(triton.cdiv(N, 1024),)](x, out, N, BLOCK=1024)
