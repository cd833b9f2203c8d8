# fault: reads unwritten
import triton
import triton.language as tl


@triton.jit
def row_sum_kernel(x_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + row * N + cols, mask=cols < N, other=0.0)
    tl.atomic_add(out_ptr + row, tl.sum(x.to(tl.float32)))


def row_sum(x, out):
    M, N = x.shape
    row_sum_kernel[(M, triton.cdiv(N, 256))](x, out, N, BLOCK_N=256)
