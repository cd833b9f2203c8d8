# fault: precision
import triton
import triton.language as tl


@triton.jit
def row_sum_kernel(x_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_N], tl.float16)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * N + cols, mask=cols < N, other=0.0)
        total += x
    tl.store(out_ptr + row, tl.sum(total).to(tl.float32))


def row_sum(x, out):
    M, N = x.shape
    row_sum_kernel[(M,)](x, out, N, BLOCK_N=1024)
