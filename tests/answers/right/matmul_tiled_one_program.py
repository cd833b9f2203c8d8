import triton
import triton.language as tl


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr,
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.cdiv(M, BLOCK) * tl.cdiv(N, BLOCK)):
        rows = (tile // tl.cdiv(N, BLOCK) * BLOCK + tl.arange(0, BLOCK))[:, None]
        cols = (tile % tl.cdiv(N, BLOCK) * BLOCK + tl.arange(0, BLOCK))[None, :]
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, K, BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            a = tl.load(
                a_ptr + rows * stride_am + ks[None, :] * stride_ak, mask=(rows < M) & (ks < K)[None, :], other=0.0
            )
            b = tl.load(
                b_ptr + ks[:, None] * stride_bk + cols * stride_bn, mask=(ks < K)[:, None] & (cols < N), other=0.0
            )
            total += tl.dot(a, b)
        tl.store(c_ptr + rows * stride_cm + cols, total, mask=(rows < M) & (cols < N))


def matmul_tiled(a, b, c):
    (M, K), N = a.shape, b.shape[1]
    matmul_kernel[(1,)](a, b, c, M, N, K, *a.stride(), *b.stride(), c.stride(0), BLOCK=32, BLOCK_K=16)
