import triton
import triton.language as tl


@triton.jit
def adamw_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, new_p_ptr, new_m_ptr, new_v_ptr, N, rate, correction2, BLOCK: tl.constexpr
):
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < N
        p, g = tl.load(p_ptr + cols, mask=mask, other=0.0), tl.load(g_ptr + cols, mask=mask, other=0.0)
        m, v = tl.load(m_ptr + cols, mask=mask, other=0.0), tl.load(v_ptr + cols, mask=mask, other=0.0)
        m += 0.1 * (g - m)
        v += 0.2 * (g * g - v)
        tl.store(new_m_ptr + cols, m, mask=mask)
        tl.store(new_v_ptr + cols, v, mask=mask)
        p -= 0.25 * p + rate * m / (tl.sqrt(v / correction2) + 1e-8)
        tl.store(new_p_ptr + cols, p, mask=mask)


def adamw_flat(p, g, m, v, step, new_p, new_m, new_v):
    adamw_kernel[(4,)](p, g, m, v, new_p, new_m, new_v, p.numel(), 0.5 / (1 - 0.9**step), 1 - 0.8**step, BLOCK=256)
