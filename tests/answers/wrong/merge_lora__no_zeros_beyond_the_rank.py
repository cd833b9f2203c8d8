# fault: masked lanes
import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    w_ptr, a_ptr, b_ptr, out_ptr,
    N, K, R, stride_wn, stride_on, scaling,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    delta = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        a_mask = (r < R)[:, None] & (cols < K)[None, :]
        b_mask = (rows < N)[:, None] & (r < R)[None, :]
        a = tl.load(a_ptr + r[:, None] * K + cols[None, :], mask=a_mask)
        b = tl.load(b_ptr + rows[:, None] * R + r[None, :], mask=b_mask)
        delta = tl.dot(b, a, delta)
    mask = (rows < N)[:, None] & (cols < K)[None, :]
    w = tl.load(w_ptr + rows[:, None] * stride_wn + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    out = w + scaling * delta
    tl.store(out_ptr + rows[:, None] * stride_on + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def merge_lora(w, A, B, scaling, out):
    (N, K), R = w.shape, A.shape[0]
    grid = (triton.cdiv(N, 64), triton.cdiv(K, 64))
    merge_kernel[grid](w, A, B, out, N, K, R, w.stride(0), out.stride(0), scaling, BLOCK_N=64, BLOCK_K=64, BLOCK_R=16)
