# fault: out of bounds
import triton
import triton.language as tl


@triton.jit
def matmul_kernel(
    x_ptr, w_ptr, scale_ptr, y_ptr,
    M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x_mask = (rows < M)[:, None] & (ks < K)[None, :]
        w_mask = (ks < K)[:, None] & (cols < N)[None, :]
        x = tl.load(x_ptr + rows[:, None] * K + ks[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_ptr + ks[:, None] * N + cols[None, :], mask=w_mask, other=0)
        total = tl.dot(x, w.to(tl.float16), total)
    scale = tl.load(scale_ptr + cols)
    y_mask = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], total * scale[None, :], mask=y_mask)


def matmul_int8(x, w, scale, y):
    (M, K), N = x.shape, w.shape[1]
    grid = (triton.cdiv(M, 32), triton.cdiv(N, 32))
    matmul_kernel[grid](x, w, scale, y, M, N, K, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
