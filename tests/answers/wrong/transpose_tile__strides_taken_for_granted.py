# fault: strides
import triton
import triton.language as tl


@triton.jit
def transpose_kernel(x_ptr, out_ptr, M, N, stride_xm, stride_outn, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # of x, the columns of out
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_x = (rows < M)[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=in_x)  # [rows, cols]
    in_out = (cols < N)[:, None] & (rows < M)[None, :]
    tl.store(out_ptr + cols[:, None] * stride_outn + rows[None, :], tl.trans(x), mask=in_out)  # [cols, rows]


def transpose_tile(x, out):
    M, N = x.shape
    grid = (triton.cdiv(M, 32), triton.cdiv(N, 32))
    transpose_kernel[grid](x, out, M, N, N, M, BLOCK=32)
