"""Attention, backward: the kernels that `attention` launches for its gradients.

The formulas stand in attention.py. Here: how the work is cut.

Every block of scores is needed twice, along its row for dq and along its column for dk and dv. A kernel for each
computes the scores anew: 7 products where 5 would do, if dq were summed in memory by whoever comes along a row. That
takes atomic additions in fp32, whose order, and with it the last bits of dq, differs from run to run. On sm_90 what
needs neither a window nor packing is attention_backward_hopper.py's, which does so where the head's size allows; under
torch.use_deterministic_algorithms(True) in one order, for the same bits every time. The two kernels below have them
always.

dq      as the forward: a program owns BLOCK_M queries and walks over the keys that they see. It holds do and o of its
        queries first of all, so it writes delta too, which the other kernel reads.
dk, dv  a program owns BLOCK_N keys of one head and walks over the queries that see them, of all the GROUP query heads
        that share the key head. What it sums up never leaves its registers. Scores are computed transposed, [BLOCK_N,
        BLOCK_M]: so p and ds leave one product in the registers where the next wants them.

Rows beyond a sequence's end are harmless in the second kernel: their lse is read as inf, which makes p = exp(-inf) = 0.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels import attention_backward_hopper
from fastkit.kernels.attention_forward import (
    LENGTHS,
    LOG2_E,
    SHAPES,
    block_d,
    check_runs_on,
    descriptor,
    family,
    key_range,
    load_tile,
    place,
    section_heads,
    sees,
    sequence,
    store_tile,
    takes_tma,
    tiling,
)
from fastkit.kernels.common import architecture, device_of, fp32, tl, triton


@triton.jit
def _sum_dq(
    dq, q, do, lse, delta, k, v, batch, head, row, first, last, T_q, T_k, stride_kt, stride_vt, window, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq, not yet scaled, after the keys [first, last) as well."""
    for n in tl.range(first, last, BLOCK_N):
        keys = load_tile(k, batch, head, n, T_k, stride_kt, D, BLOCK_N, BLOCK_D, MASKED, TMA)
        values = load_tile(v, batch, head, n, T_k, stride_vt, D, BLOCK_N, BLOCK_D, MASKED, TMA)
        s = tl.dot(q, keys.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scale_log2 - lse[:, None])
        if MASKED:
            rows, cols = row + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
            p = tl.where(sees(rows[:, None], cols[None, :], T_q, T_k, window, CAUSAL, WINDOW), p, 0.0)
        dp = tl.dot(do, values.T, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=LENGTHS)
def _backward_dq_kernel(
    q_ptr, k, v, o_ptr, do_ptr, lse_ptr, dq_ptr, delta_ptr, cu_q_ptr, cu_k_ptr,
    H, heads, section_heads, T_q, T_k, window, scale, scale_log2,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_dob, stride_doh, stride_dot, stride_dqb, stride_dqh, stride_dqt,
    stride_lseb, stride_lseh,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program writes dq and delta of BLOCK_M queries of one head."""
    scale, scale_log2 = fp32(scale), fp32(scale_log2)
    block, index = place(heads, section_heads, CAUSAL)
    batch, head = index // H, (index % H).to(tl.int64)
    kv_head, row = index % H // GROUP, block * BLOCK_M
    q_offset, queries = sequence(cu_q_ptr, batch, T_q, stride_qb, stride_qt, PACKED)
    if row >= queries:  # a packed sequence shorter than the longest
        return
    o_offset, _ = sequence(cu_q_ptr, batch, T_q, stride_ob, stride_ot, PACKED)
    do_offset, _ = sequence(cu_q_ptr, batch, T_q, stride_dob, stride_dot, PACKED)
    dq_offset, _ = sequence(cu_q_ptr, batch, T_q, stride_dqb, stride_dqt, PACKED)
    lse_offset, _ = sequence(cu_q_ptr, batch, T_q, stride_lseb, 1, PACKED)
    k_offset, keys = sequence(cu_k_ptr, batch, T_k, stride_kb, stride_kt, PACKED)
    v_offset, _ = sequence(cu_k_ptr, batch, T_k, stride_vb, stride_vt, PACKED)
    if not TMA:
        k += k_offset + kv_head.to(tl.int64) * stride_kh
        v += v_offset + kv_head.to(tl.int64) * stride_vh

    rows = row + tl.arange(0, BLOCK_M)
    o_ptr += o_offset + head * stride_oh
    do_ptr += do_offset + head * stride_doh
    lse_offset += head * stride_lseh
    o = load_tile(o_ptr, batch, head, row, queries, stride_ot, D, BLOCK_M, BLOCK_D, True, False)
    do = load_tile(do_ptr, batch, head, row, queries, stride_dot, D, BLOCK_M, BLOCK_D, True, False)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)  # [BLOCK_M]
    tl.store(delta_ptr + lse_offset + rows, delta, mask=rows < queries)
    lse = tl.load(lse_ptr + lse_offset + rows, mask=rows < queries, other=0.0) * 1.4426950408889634  # log2(e)
    q_ptr += q_offset + head * stride_qh
    q = load_tile(q_ptr, batch, head, row, queries, stride_qt, D, BLOCK_M, BLOCK_D, True, False)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first, whole_first, whole_last, last = key_range(row, queries, keys, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    for part in tl.static_range(3):  # far edge, middle, diagonal or end
        if WINDOW or part > 0:
            begin = first if part == 0 else whole_first if part == 1 else whole_last
            end = whole_first if part == 0 else whole_last if part == 1 else last
            dq = _sum_dq(
                dq, q, do, lse, delta, k, v, batch, kv_head, row, begin, end, queries, keys, stride_kt, stride_vt,
                window, scale_log2, part != 1, CAUSAL, WINDOW, TMA, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    store_tile(dq_ptr + dq_offset + head * stride_dqh, dq * scale, row, queries, stride_dqt, D, BLOCK_M, BLOCK_D)


@triton.jit
def query_range(
    key, T_q, T_k, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(first, whole_first, whole_last, last): the keys key .. key + BLOCK_N are seen by queries in [first, last) alone,
    and all of them by all of [whole_first, whole_last). All but `last` are multiples of BLOCK_M."""
    diagonal = key - (T_k - T_q)  # the first query that sees the first key
    blocks = tl.cdiv(T_q, BLOCK_M)
    first, whole_first, whole_last, last = 0, 0, blocks * BLOCK_M, T_q
    if CAUSAL:
        first = tl.maximum(diagonal, 0) // BLOCK_M * BLOCK_M
        whole_first = tl.cdiv(tl.maximum(tl.minimum(diagonal + BLOCK_N - 1, T_q), 0), BLOCK_M) * BLOCK_M
    if WINDOW:
        last = tl.minimum(tl.maximum(diagonal + BLOCK_N - 1 + window, 0), T_q)
        whole_first = tl.minimum(whole_first, tl.cdiv(last, BLOCK_M) * BLOCK_M)
        whole_last = tl.minimum(tl.maximum(diagonal + window, 0), last) // BLOCK_M * BLOCK_M
        whole_last = tl.maximum(whole_last, whole_first)
    return first, whole_first, whole_last, last


@triton.jit
def _sum_dk_dv(
    dk, dv, k, v, q, do, lse_ptr, delta_ptr, batch, head, key, first, last, T_q, T_k,
    stride_qh, stride_qt, stride_doh, stride_dot, stride_lseh, window, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk, not yet scaled, and dv after the queries [first, last) of the GROUP heads from `head` on as well."""
    for step in tl.range(0, tl.cdiv(tl.maximum(last - first, 0), BLOCK_M) * GROUP):
        m = first + step // GROUP * BLOCK_M
        member = tl.cast(step % GROUP, tl.int64)
        if TMA:
            queries = load_tile(q, batch, head + step % GROUP, m, T_q, 0, D, BLOCK_M, BLOCK_D, True, True)
            dos = load_tile(do, batch, head + step % GROUP, m, T_q, 0, D, BLOCK_M, BLOCK_D, True, True)
        else:
            q_head, do_head = q + member * stride_qh, do + member * stride_doh
            queries = load_tile(q_head, batch, head, m, T_q, stride_qt, D, BLOCK_M, BLOCK_D, True, False)
            dos = load_tile(do_head, batch, head, m, T_q, stride_dot, D, BLOCK_M, BLOCK_D, True, False)
        rows = m + tl.arange(0, BLOCK_M)
        offsets = member * stride_lseh + rows
        s = tl.dot(k, queries.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        lse = tl.load(lse_ptr + offsets, mask=rows < T_q, other=float("inf")) * 1.4426950408889634  # log2(e)
        p = tl.exp2(s * scale_log2 - lse[None, :])
        if MASKED:
            cols = key + tl.arange(0, BLOCK_N)
            p = tl.where(sees(rows[None, :], cols[:, None], T_q, T_k, window, CAUSAL, WINDOW), p, 0.0)
        dv = tl.dot(p.to(dos.dtype), dos, dv, input_precision="ieee")
        dp = tl.dot(v, dos.T, input_precision="ieee")
        delta = tl.load(delta_ptr + offsets, mask=rows < T_q, other=0.0)  # as late as can be: registers are full
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def _backward_dk_dv_kernel(
    q, k_ptr, v_ptr, do, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    H_k, heads, section_heads, T_q, T_k, window, scale, scale_log2,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_dob, stride_doh, stride_dot, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    stride_lseb, stride_lseh,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program writes dk and dv of BLOCK_N keys of one head."""
    scale, scale_log2 = fp32(scale), fp32(scale_log2)
    block, index = place(heads, section_heads, False)
    batch, kv_head, key = index // H_k, (index % H_k).to(tl.int64), block * BLOCK_N
    k_offset, keys = sequence(cu_k_ptr, batch, T_k, stride_kb, stride_kt, PACKED)
    if key >= keys:  # a packed sequence shorter than the longest
        return
    v_offset, _ = sequence(cu_k_ptr, batch, T_k, stride_vb, stride_vt, PACKED)
    dk_offset, _ = sequence(cu_k_ptr, batch, T_k, stride_dkb, stride_dkt, PACKED)
    dv_offset, _ = sequence(cu_k_ptr, batch, T_k, stride_dvb, stride_dvt, PACKED)
    q_offset, queries = sequence(cu_q_ptr, batch, T_q, stride_qb, stride_qt, PACKED)
    do_offset, _ = sequence(cu_q_ptr, batch, T_q, stride_dob, stride_dot, PACKED)
    lse_offset, _ = sequence(cu_q_ptr, batch, T_q, stride_lseb, 1, PACKED)
    head = kv_head * GROUP  # the first of those that share the key head
    if not TMA:
        q += q_offset + head * stride_qh
        do += do_offset + head * stride_doh
    lse_ptr += lse_offset + head * stride_lseh
    delta_ptr += lse_offset + head * stride_lseh

    k_ptr += k_offset + kv_head * stride_kh
    v_ptr += v_offset + kv_head * stride_vh
    k = load_tile(k_ptr, batch, head, key, keys, stride_kt, D, BLOCK_N, BLOCK_D, True, False)
    v = load_tile(v_ptr, batch, head, key, keys, stride_vt, D, BLOCK_N, BLOCK_D, True, False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first, whole_first, whole_last, last = query_range(key, queries, keys, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    for part in tl.static_range(3):  # diagonal, middle, far edge of the window
        if (part == 1) or (CAUSAL and part == 0) or (WINDOW and part == 2):
            begin = first if part == 0 else whole_first if part == 1 else whole_last
            end = whole_first if part == 0 else whole_last if part == 1 else last
            dk, dv = _sum_dk_dv(
                dk, dv, k, v, q, do, lse_ptr, delta_ptr, batch, head.to(tl.int32), key, begin, end, queries, keys,
                stride_qh, stride_qt, stride_doh, stride_dot, stride_lseh, window, scale_log2,
                part != 1, CAUSAL, WINDOW, TMA, GROUP, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    store_tile(dk_ptr + dk_offset + kv_head * stride_dkh, dk * scale, key, keys, stride_dkt, D, BLOCK_N, BLOCK_D)
    store_tile(dv_ptr + dv_offset + kv_head * stride_dvh, dv, key, keys, stride_dvt, D, BLOCK_N, BLOCK_D)


# as in attention_forward.py
_DQ_TILINGS = {
    "TMA": ((128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 8, 2)),
    "sm_90": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    "sm_80": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
    "gfx9": ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
    "interpreter": ((32, 32, 4, 1),) * 3,
}
_DK_DV_TILINGS = {
    "TMA": ((64, 128, 8, 2), (64, 128, 8, 2), (32, 32, 8, 1)),
    "sm_90": ((64, 128, 8, 2), (64, 128, 8, 2), (32, 32, 8, 1)),
    "sm_80": ((32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    "gfx9": ((32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
    "interpreter": ((32, 32, 4, 1),) * 3,
}


def launch_backward(
    do, q, k, v, o, lse, dq, dk, dv, *, causal: bool, window: int | None, scale: float,
    cu_q=None, cu_k=None, max_q: int | None = None, max_k: int | None = None, TMA: bool | None = None,
    dq_tiling: dict | None = None, dk_dv_tiling: dict | None = None, cos=None, sin=None,
) -> bool:  # fmt: skip
    """Write dq, dk and dv, shaped as q, k and v, given do = ∂L/∂o, what `launch_forward` was given and what it wrote.

    Any strides with neighbours in D adjacent. `dq_tiling` and `dk_dv_tiling` override BLOCK_M and so on, TMA whether K
    and V (for dq), q and do (for dk and dv) come through it; with any of them the kernels are this file's own.

    cos, sin  as rope.launch takes them: if given, dq may be turned back by them before it is rounded
    returns   whether it was: in attention_backward_hopper.py, where they turn all of a head
    """
    (B, H, T_q, D), (_, H_k, T_k, _) = q.shape, k.shape
    packed = cu_q is not None
    if packed:
        B, T_q, T_k = cu_q.numel() - 1, max_q, max_k
    arch = architecture(q.device)
    check_runs_on(arch, q.dtype)
    plain = not packed and window is None and TMA is None and dq_tiling is None and dk_dv_tiling is None
    if plain and lse.is_contiguous() and attention_backward_hopper.takes(arch, do, q, k, v, dk, dv):
        turned = cos is not None and cos.shape[-1] == D
        attention_backward_hopper.launch(
            do, q, k, v, o, lse, dq, dk, dv, causal=causal, scale=scale, cos=cos if turned else None,
            sin=sin if turned else None, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return turned
    if TMA is None:
        TMA = not packed and takes_tma(arch, q, k, v, do)
    BLOCK_D, GROUP, delta = block_d(D), H // H_k, torch.empty_like(lse)
    for_dq = tiling(_DQ_TILINGS, family(arch, TMA), BLOCK_D) | (dq_tiling or {})
    for_dk_dv = tiling(_DK_DV_TILINGS, family(arch, TMA), BLOCK_D)
    if D < BLOCK_D:  # masks for the padding take the registers of some queries
        for_dk_dv["BLOCK_M"] = min(for_dk_dv["BLOCK_M"], 32)
    for_dk_dv |= dk_dv_tiling or {}
    section = section_heads(B * H_k, T_k, D, q.dtype)
    constants = {
        "GROUP": GROUP, "CAUSAL": causal, "WINDOW": window is not None, "PACKED": packed, "TMA": TMA,
        "D": D, "BLOCK_D": BLOCK_D,
    }  # fmt: skip
    sizes = (T_q, T_k, window or 0, scale, scale * LOG2_E)
    strides = {name: x.stride()[:3] for name, x in zip("qkvo", (q, k, v, o), strict=True)}
    with device_of(q):
        if B * T_q * q.numel():
            k_tiles, v_tiles = [descriptor(x, for_dq["BLOCK_N"], BLOCK_D) if TMA else x for x in (k, v)]
            _backward_dq_kernel[(triton.cdiv(T_q, for_dq["BLOCK_M"]) * B * H,)](
                q, k_tiles, v_tiles, o, do, lse, dq, delta, cu_q, cu_k, H, B * H, section * GROUP, *sizes,
                *strides["q"], *strides["k"], *strides["v"], *strides["o"], *do.stride()[:3], *dq.stride()[:3],
                *lse.stride()[:2], **constants, **for_dq,
            )  # fmt: skip
        if B * T_k * k.numel():
            q_tiles, do_tiles = [descriptor(x, for_dk_dv["BLOCK_M"], BLOCK_D) if TMA else x for x in (q, do)]
            _backward_dk_dv_kernel[(triton.cdiv(T_k, for_dk_dv["BLOCK_N"]) * B * H_k,)](
                q_tiles, k, v, do_tiles, lse, delta, dk, dv, cu_q, cu_k, H_k, B * H_k, section, *sizes,
                *strides["q"], *strides["k"], *strides["v"], *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
                *lse.stride()[:2], **constants, **for_dk_dv,
            )  # fmt: skip
    return False


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    found = {}
    for name, H, H_k, D in SHAPES:
        q, do, o, dq = (torch.empty(4, 2048, H, D, dtype=dtype, device="meta").transpose(1, 2) for _ in range(4))
        k, v, dk, dv = (torch.empty(4, 2048, H_k, D, dtype=dtype, device="meta").transpose(1, 2) for _ in range(4))
        lse = torch.empty(4, H, 2048, device="meta")
        found[f"backward {name} 4x2048"] = functools.partial(
            launch_backward, do, q, k, v, o, lse, dq, dk, dv, causal=True, window=None, scale=D**-0.5
        )
    return found
