# fault: unwritten
import triton
import triton.language as tl


@triton.jit
def sum_and_difference_kernel(x_ptr, y_ptr, total_ptr, difference_ptr, N, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < N
    x = tl.load(x_ptr + cols, mask=mask)
    y = tl.load(y_ptr + cols, mask=mask)
    tl.store(total_ptr + cols, x + y, mask=mask)


def sum_and_difference(x, y, total, difference):
    N = x.numel()
    sum_and_difference_kernel[(triton.cdiv(N, 1024),)](x, y, total, difference, N, BLOCK=1024)
