# fault: unwritten
import triton
import triton.language as tl


@triton.jit
def softmax_kernel(x_ptr, out_ptr, N, stride_xm, stride_outm, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=-float("inf"))
    numerator = tl.exp(x - tl.max(x))  # the largest is exp(0): nothing overflows
    tl.store(out_ptr + row * stride_outm + cols, numerator / tl.sum(numerator), mask=mask)


def softmax_rows(x, out):
    M, N = x.shape
    softmax_kernel[(M,)](x, out, N, x.stride(0), out.stride(0), BLOCK_N=1024)
