# fault: values
import triton
import triton.language as tl


@triton.jit
def logsumexp_kernel(x_ptr, out_ptr, N, stride_xm, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = 0.0  # of exp(x - largest)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * stride_xm + cols, mask=cols < N, other=float("-inf"))
        total += tl.sum(tl.exp(x), axis=0)
    tl.store(out_ptr + row, tl.log(total))


def logsumexp_rows(x, out):
    M, N = x.shape
    logsumexp_kernel[(M,)](x, out, N, x.stride(0), BLOCK_N=1024)
