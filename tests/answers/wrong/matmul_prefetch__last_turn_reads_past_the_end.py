# fault: out of bounds
import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, rows, cols, height, width, stride_row, stride_col, inside):
    return tl.load(ptr + rows[:, None] * stride_row + cols[None, :] * stride_col, mask=inside, other=0.0)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr,
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    a = load_tile(a_ptr, rows, ks, M, K, stride_am, stride_ak, (rows < M)[:, None])
    b = load_tile(b_ptr, ks, cols, K, N, stride_bk, stride_bn, (cols < N)[None, :])
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        next_ks = start + BLOCK_K + ks
        next_a = load_tile(a_ptr, rows, next_ks, M, K, stride_am, stride_ak, (rows < M)[:, None])
        next_b = load_tile(b_ptr, next_ks, cols, K, N, stride_bk, stride_bn, (cols < N)[None, :])
        total = tl.dot(a, b, total)
        a, b = next_a, next_b
    c_mask = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(c_ptr + rows[:, None] * stride_cm + cols[None, :] * stride_cn, total, mask=c_mask)


def matmul_prefetch(a, b, c):
    (M, K), N = a.shape, b.shape[1]
    grid = (triton.cdiv(M, 32), triton.cdiv(N, 32))
    strides = (*a.stride(), *b.stride(), *c.stride())
    matmul_kernel[grid](a, b, c, M, N, K, *strides, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
