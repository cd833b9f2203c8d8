# fault: out of bounds
import triton
import triton.language as tl


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    T, D, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < T)[:, None] & (dims < D)[None, :]
    q = tl.load(q_ptr + rows[:, None] * D + dims[None, :], mask=mask, other=0.0)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(0, (tl.program_id(0) + 1) * BLOCK_M, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        there = (cols < T)[:, None] & (dims < D)[None, :]
        k = tl.load(k_ptr + cols[:, None] * D + dims[None, :], mask=(dims < D)[None, :], other=0.0)
        v = tl.load(v_ptr + cols[:, None] * D + dims[None, :], mask=there, other=0.0)
        s = tl.dot(q, k.T, input_precision="ieee") * scale
        s = tl.where(cols[None, :] <= rows[:, None], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp(s - new_max[:, None])
        decay = tl.exp(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * decay + tl.sum(p, 1)
        acc = tl.dot(p, v, acc * decay[:, None], input_precision="ieee")
    tl.store(o_ptr + rows[:, None] * D + dims[None, :], acc / row_sum[:, None], mask=mask)
    tl.store(lse_ptr + rows, row_max + tl.log(row_sum), mask=rows < T)


def attend_causal(q, k, v, o, lse):
    T, D = q.shape
    BLOCK_D = max(16, triton.next_power_of_2(D))
    grid = (triton.cdiv(T, 32),)
    attend_kernel[grid](q, k, v, o, lse, T, D, D**-0.5, BLOCK_M=32, BLOCK_N=32, BLOCK_D=BLOCK_D)
