# fault: unwritten
import triton
import triton.language as tl


@triton.jit
def wide_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    if start + BLOCK <= N:  # a whole block: without a mask, nothing stands in the way of 16 bytes a lane
        tl.store(out_ptr + cols, tl.load(x_ptr + cols))
    else:
        mask = cols < N
        tl.store(out_ptr + cols, tl.load(x_ptr + cols, mask=mask), mask=mask)


def copy_wide(x, out):
    N = x.numel()
    wide_kernel[(max(1, N // 1024),)](x, out, N, BLOCK=1024)
