# fault: values
import triton
import triton.language as tl


@triton.jit
def load_rows(x_ptr, rows, T, D, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    return tl.load(x_ptr + rows[:, None] * D + dims[None, :], mask=(rows < T)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    T, D, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, cols, T, D, BLOCK_D)
    v = load_rows(v_ptr, cols, T, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for m in range(tl.program_id(0) * BLOCK_N, T, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, rows, T, D, BLOCK_D)
        do = load_rows(do_ptr, rows, T, D, BLOCK_D)
        lse = tl.load(lse_ptr + rows, mask=rows < T, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.0)
        s = tl.dot(q, k.T, input_precision="ieee") * scale
        p = tl.where(cols[None, :] <= rows[:, None], tl.exp(s - lse[:, None]), 0.0)
        dv = tl.dot(p.T, do, dv, input_precision="ieee")
        dp = tl.dot(do, v.T, input_precision="ieee")
        ds = p * dp
        dk = tl.dot(ds.T, q, dk, input_precision="ieee")
    dims = tl.arange(0, BLOCK_D)
    mask = (cols < T)[:, None] & (dims < D)[None, :]
    tl.store(dk_ptr + cols[:, None] * D + dims[None, :], dk * scale, mask=mask)
    tl.store(dv_ptr + cols[:, None] * D + dims[None, :], dv, mask=mask)


def attention_dk_dv(q, k, v, do, lse, delta, dk, dv):
    T, D = q.shape
    BLOCK_D = max(16, triton.next_power_of_2(D))
    tensors = (q, k, v, do, lse, delta, dk, dv)
    dk_dv_kernel[(triton.cdiv(T, 32),)](*tensors, T, D, D**-0.5, BLOCK_M=32, BLOCK_N=32, BLOCK_D=BLOCK_D)
