import triton
import triton.language as tl


@triton.jit
def logsumexp_kernel(x_ptr, out_ptr, N, stride_xm, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([BLOCK_N], -1e30, tl.float32)  # each lane's own; lanes are joined once, at the end
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * stride_xm + cols, mask=cols < N, other=float("-inf"))
        new = tl.maximum(largest, x)
        total = total * tl.exp(largest - new) + tl.exp(x - new)
        largest = new
    row_max = tl.max(largest, axis=0)
    tl.store(out_ptr + row, row_max + tl.log(tl.sum(total * tl.exp(largest - row_max), axis=0)))


def logsumexp_rows(x, out):
    M, N = x.shape
    logsumexp_kernel[(M,)](x, out, N, x.stride(0), BLOCK_N=256)
