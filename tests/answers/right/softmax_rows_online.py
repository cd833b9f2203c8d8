import triton
import triton.language as tl


@triton.jit
def softmax_kernel(x_ptr, out_ptr, N, stride_xm, stride_outm, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    largest = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * stride_xm + cols, mask=cols < N, other=-1e30)
        new = tl.maximum(largest, x)
        total = total * tl.exp(largest - new) + tl.where(cols < N, tl.exp(x - new), 0.0)
        largest = new
    highest = tl.max(largest)
    total = tl.sum(total * tl.exp(largest - highest))
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * stride_xm + cols, mask=cols < N)
        tl.store(out_ptr + row * stride_outm + cols, tl.exp(x - highest) / total, mask=cols < N)


def softmax_rows(x, out):
    M, N = x.shape
    softmax_kernel[(M,)](x, out, N, x.stride(0), out.stride(0), BLOCK_N=128)
