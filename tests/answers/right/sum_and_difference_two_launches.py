import triton
import triton.language as tl


@triton.jit
def combine_kernel(x_ptr, y_ptr, out_ptr, N, SIGN: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    x = tl.load(x_ptr + cols, mask=mask)
    tl.store(out_ptr + cols, x + SIGN * tl.load(y_ptr + cols, mask=mask), mask=mask)


def sum_and_difference(x, y, total, difference):
    grid = (triton.cdiv(x.numel(), 256),)
    combine_kernel[grid](x, y, total, x.numel(), SIGN=1, BLOCK=256)
    combine_kernel[grid](x, y, difference, x.numel(), SIGN=-1, BLOCK=256)
