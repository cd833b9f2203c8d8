import triton
import triton.language as tl


@triton.jit
def adamw_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, new_p_ptr, new_m_ptr, new_v_ptr, N, correction1, correction2, BLOCK: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    p = tl.load(p_ptr + cols, mask=mask, other=0.0)
    g = tl.load(g_ptr + cols, mask=mask, other=0.0)
    m = tl.load(m_ptr + cols, mask=mask, other=0.0)
    v = tl.load(v_ptr + cols, mask=mask, other=0.0)
    m = 0.9 * m + 0.1 * g
    v = 0.8 * v + 0.2 * g * g
    update = m / correction1 / (tl.sqrt(v / correction2) + 1e-8)
    tl.store(new_p_ptr + cols, (1 - 0.5 * 0.5) * p - 0.5 * update, mask=mask)
    tl.store(new_m_ptr + cols, m, mask=mask)
    tl.store(new_v_ptr + cols, v, mask=mask)


def adamw_flat(p, g, m, v, step, new_p, new_m, new_v):
    N = p.numel()
    adamw_kernel[(triton.cdiv(N, 1024),)](p, g, m, v, new_p, new_m, new_v, N, 1 - 0.9**step, 1 - 0.8**step, BLOCK=1024)
