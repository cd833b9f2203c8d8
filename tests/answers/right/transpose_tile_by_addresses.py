import triton
import triton.language as tl


@triton.jit
def transpose_kernel(x_ptr, out_ptr, M, N, stride_xm, stride_outn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    cols = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < M) & (cols < N)
    tl.store(out_ptr + cols * stride_outn + rows, tl.load(x_ptr + rows * stride_xm + cols, mask=mask), mask=mask)


def transpose_tile(x, out):
    M, N = x.shape
    grid = (triton.cdiv(M, 16), triton.cdiv(N, 64))
    transpose_kernel[grid](x, out, M, N, x.stride(0), out.stride(0), BLOCK_M=16, BLOCK_N=64)
