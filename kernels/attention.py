"""Attention: each query takes the mean of the values, weighted by how well their keys match it (Vaswani et al. 2017,
arXiv:1706.03762), without ever holding the matrix of scores (Dao 2023, arXiv:2307.08691).

Forward, for one head, q [T_q, D], k and v [T_k, D], written for one row of scores:

    s_j = scale * q · k_j                     -inf where the query does not see key j
    p_j = exp(s_j - lse)                      lse = log(sum of exp(s_j)), one number a query
    o   = sum over j of p_j v_j

The scores are T_q T_k numbers, and reading and writing them would take longer than all the arithmetic. So keys and
values come in blocks, and what a block adds is known at once but for its common factor: m, the largest score so far,
stands in for lse. When a block brings a larger one, what has been summed is scaled down (Milakov & Gimelshein 2018,
arXiv:1805.02867):

    m'   = max(m, max of the block's s)
    l'   = l exp(m - m')   + sum of exp(s_j - m')
    acc' = acc exp(m - m') + sum of exp(s_j - m') v_j         at the end o = acc / l and lse = m + log(l)

Backward, given do = ∂L/∂o. The scores are computed anew, p_j = exp(s_j - lse), for lse was kept. With dp_j = ∂L/∂p_j,
through the softmax, whose derivative is ∂p_i/∂s_j = p_i ([i = j] - p_j):

    dv_j  = p_j do                            summed over queries
    dp_j  = do · v_j
    ds_j  = p_j (dp_j - delta)                delta = sum of p_i dp_i = do · (sum of p_i v_i) = do · o
    dq    = scale * sum over j of ds_j k_j
    dk_j  = scale * ds_j q                    summed over queries

delta needs no scores: one number a query, from what is there already. Grouped queries: GROUP = H / H_k neighbouring
query heads share a key head, whose dk and dv are sums over them too.

What a query sees. Queries and keys end together, so that query i stands at position i + T_k - T_q: `causal` hides the
keys after that position, `window` all but the last `window` of the rest, its own included (Mistral's sliding window).
A query that sees no key (T_q > T_k) has o = 0, lse = -inf and no gradients.

Saved for the backward: q, k, v and o, the caller's own tensors, and lse, 4 bytes a query and head.

Casts: products are of numbers in the inputs' dtype, with sums in fp32. Scores, softmax and all sums are fp32. p and ds
are rounded to the inputs' dtype before they are multiplied, as in every flash attention: tensor cores take no other. p
is rounded before its division by l, when its largest number is 1. A result is rounded once, when it is stored. exp(x)
is computed as exp2(x log2(e)), one instruction instead of two.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastkit.kernels.attention_backward import launch_backward
from fastkit.kernels.attention_forward import (
    MAX_D,
    MAX_STRIDE,
    lacking,
    launch_forward,
)
from fastkit.kernels.common import Cost, architecture, check_floats, on_triton


def cost(
    B: int, H: int, H_k: int, T_q: int, T_k: int, D: int, dtype=torch.bfloat16, causal: bool = True,
    window: int | None = None,
) -> tuple[Cost, Cost]:  # fmt: skip
    """The least work for q [B, H, T_q, D], k and v [B, H_k, T_k, D] of `dtype`: (forward, backward).

    Operations are those of the matrix products over the pairs that are seen, as the literature counts them: two
    products forward, five backward, where ours take seven, or five on sm_90. The softmax adds 1% to them.
    """
    beyond = torch.arange(T_q) + (T_k - T_q + 1) if causal else torch.full((T_q,), T_k)  # keys before the first unseen
    first = beyond - window if window is not None else torch.zeros_like(beyond)
    pairs = B * H * int((beyond.clamp(0, T_k) - first.clamp(0, T_k)).sum())
    q_bytes, k_bytes, lse_bytes = B * H * T_q * D * dtype.itemsize, B * H_k * T_k * D * dtype.itemsize, B * H * T_q * 4
    forward = Cost(
        bytes_moved=2 * q_bytes + 2 * k_bytes + lse_bytes,  # read q, k, v; write o, lse
        flops=4 * D * pairs,  # q k, p v
    )
    backward = Cost(
        bytes_moved=4 * q_bytes + 4 * k_bytes + lse_bytes,  # read q, k, v, o, do, lse; write dq, dk, dv
        flops=10 * D * pairs,  # q k, do v, p do, ds k, ds q
    )
    return forward, backward


def seen_pairs(T_q: int, T_k: int, causal: bool, window: int | None, device=None) -> torch.Tensor | None:
    """Which query sees which key: bool [T_q, T_k]; None if all do."""
    if not causal:
        return None
    positions = torch.arange(T_q, device=device)[:, None] + (T_k - T_q)
    keys = torch.arange(T_k, device=device)[None, :]
    return keys <= positions if window is None else (keys <= positions) & (keys > positions - window)


def by_torch(q, k, v, causal: bool, window: int | None, scale: float) -> torch.Tensor:
    """The same by torch's scaled_dot_product_attention, in the inputs' own dtype, with a mask where torch needs one."""
    (T_q, T_k), options = (q.shape[2], k.shape[2]), {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if T_q == 0 or T_k == 0:
        return q * 0.0 + (k.sum() + v.sum()) * 0.0  # no pairs; but all three have gradients
    plain = causal and window is None and T_q == T_k
    seen = None if plain else seen_pairs(T_q, T_k, causal, window, q.device)
    with torch.autocast(q.device.type, enabled=False):
        if seen is None or T_q <= T_k:
            return F.scaled_dot_product_attention(q, k, v, seen, is_causal=plain, **options)
        none = ~seen.any(1, keepdim=True)  # a query that sees no key would be nan, here and in its gradients
        return F.scaled_dot_product_attention(q, k, v, seen | none, **options) * ~none


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True, window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """`attention` in plain torch and fp32, rounded once, differentiated by autograd. fp64 stays fp64: the tests'
    truth."""
    accurate = torch.promote_types(q.dtype, torch.float32)
    q32, k32, v32 = (x.to(accurate) for x in (q, k, v))
    return by_torch(q32, k32, v32, causal, window, q.shape[-1] ** -0.5 if scale is None else scale).to(q.dtype)


def _packed(attend, q, k, v, cu_q, cu_k, *rest) -> torch.Tensor:
    """`attend` for each sequence of a packed batch. It must know where they end, so a GPU is waited for."""
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    for name, ends, x in (("cu_seqlens", ends_q, q), ("cu_seqlens_k", ends_k, k)):
        if ends[0] != 0 or ends[-1] != x.shape[0] or ends != sorted(ends):
            raise ValueError(f"attention_varlen: {name} is {ends}; it must grow from 0 to the total, {x.shape[0]}")
    outputs = [q[:0]]
    for i in range(len(ends_q) - 1):
        sequence = (q[ends_q[i] : ends_q[i + 1]], *(x[ends_k[i] : ends_k[i + 1]] for x in (k, v)))
        outputs.append(attend(*(x.transpose(0, 1)[None] for x in sequence), *rest)[0].transpose(0, 1))
    return torch.cat(outputs)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, D] as the kernels read it: neighbours in D adjacent, rows not absurdly far apart; else a copy."""
    return x if (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) < MAX_STRIDE else x.contiguous()


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """A new tensor of x's shape [B, H, T, D], dense, with heads and rows in the order that they have in x."""
    B, H, T, D = x.shape
    if x.stride(1) < x.stride(2):
        return torch.empty(B, T, H, D, dtype=x.dtype, device=x.device).transpose(1, 2)
    return torch.empty(B, H, T, D, dtype=x.dtype, device=x.device)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, causal, window, scale):
        cu_k = cu_q if cu_k is None else cu_k  # not given twice: torch.compile takes no tensor twice
        ctx.options = {"causal": causal, "window": window, "scale": scale, "max_q": max_q, "max_k": max_k}
        o = _empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        launch_forward(_readable(q), _readable(k), _readable(v), o, lse, cu_q=cu_q, cu_k=cu_k, **ctx.options)
        ctx.save_for_backward(q, k, v, o, lse, cu_q, cu_k)  # q, k, v as they came: a copy is not kept alive
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse, cu_q, cu_k = ctx.saved_tensors
        dq, dk, dv = _empty_like(q), _empty_like(k), _empty_like(v)
        inputs = [_readable(x) for x in (do, q, k, v)]
        launch_backward(*inputs, o, lse, dq, dk, dv, cu_q=cu_q, cu_k=cu_k, **ctx.options)
        return dq, dk, dv, *(None,) * 7


def _check(op: str, q, k, v, window, causal, scale, dims: str) -> float:
    """Raise for what the operation does not take; returns the scale."""
    check_floats(op, q=q, k=k, v=v)
    rank = len(dims.split(", "))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != rank:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; give [{dims}]")
        if x.dtype != q.dtype:
            raise TypeError(f"{op}: {name} has dtype {x.dtype} but q has {q.dtype}; convert one to the other's")
    heads = q.shape[1], k.shape[1]
    if k.shape != v.shape:
        raise ValueError(f"{op}: v has shape {tuple(v.shape)} but k has {tuple(k.shape)}; make them the same")
    if q.shape[-1] != k.shape[-1] or (rank == 4 and q.shape[0] != k.shape[0]):
        raise ValueError(f"{op}: k has shape {tuple(k.shape)} but q has {tuple(q.shape)}; give both as [{dims}]")
    if not 1 <= q.shape[-1] <= MAX_D:
        raise ValueError(f"{op}: heads of {q.shape[-1]} numbers; 1 to {MAX_D} are supported")
    if heads[1] == 0 or heads[0] % heads[1]:
        raise ValueError(f"{op}: {heads[0]} query heads cannot share {heads[1]} key heads; give a multiple")
    if window is not None and (not causal or window < 1):
        raise ValueError(f"{op}: window is {window} with causal={causal}; a window is causal and at least 1")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"{op}: scale is {scale}; give a positive number")
    return scale


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True, window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """softmax(scale q kᵀ) v, head by head, exact and without the scores in memory (Dao 2023, arXiv:2307.08691).

    q        [B, H, T_q, D], float32, float16 or bfloat16, 1 <= D <= 256. Any strides with neighbours in D adjacent are
             read in place, such as those of [B, T, H, D].transpose(1, 2); other layouts are copied first.
    k, v     [B, H_k, T_k, D], the same dtype and device. H is a multiple of H_k: H / H_k neighbouring query heads share
             a key head.
    causal   a query sees no key after its own position; query i stands at i + T_k - T_q, so both end together.
    window   a query sees the last `window` keys alone, its own included; None: all. With `causal` only.
    scale    what scores are multiplied by, positive; None: 1 / sqrt(D).
    returns  [B, H, T_q, D] in that dtype, in memory in q's order of heads and rows; 0 for a query that sees no key.

    Differentiable once. The same bits every time, but for q's gradient on sm_90 with heads of 64 or 128 and no window:
    its last bits differ from run to run unless torch.use_deterministic_algorithms(True).

    Raises TypeError for another dtype or two different ones, ValueError for shapes or options that do not match,
    NotImplementedError for a device without kernels. CPU tensors take `reference` (see `on_triton`). On a GPU float32,
    and anything where Triton has no use of the tensor cores (NVIDIA's before sm_80), takes torch's
    scaled_dot_product_attention, and its order in memory.
    """
    scale = _check("attention", q, k, v, window, causal, scale, "B, H, T, D")
    if not on_triton("attention", "q", q):
        return reference(q, k, v, causal, window, scale)
    if lacking(architecture(q.device), q.dtype):
        return by_torch(q, k, v, causal, window, scale)
    return _Attention.apply(q, k, v, None, None, None, None, bool(causal), window, scale)


def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
    causal: bool = True, window: int | None = None, scale: float | None = None,
    cu_seqlens_k: torch.Tensor | None = None, max_seqlen_k: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """`attention` within each sequence of a packed batch: sequences of any lengths, end to end, without padding.

    q             [total, H, D], as in `attention`.
    k, v          [total_k, H_k, D].
    cu_seqlens    int32 [sequences + 1] on q's device, from 0 to total, never decreasing: sequence i takes the rows from
                  cu_seqlens[i] up to cu_seqlens[i + 1]. A GPU's values are not checked, which would mean to wait for
                  it. What lies in no sequence is left unwritten: give padding a sequence of its own.
    max_seqlen    the length of the longest, or more: it sets how many programs start, and longer sequences would be
                  cut off.
    cu_seqlens_k, max_seqlen_k   the same for k and v; None: those of q.
    returns       [total, H, D] in that dtype.

    Otherwise as `attention`, but for bits: the same every time.
    """
    op = "attention_varlen"
    scale = _check(op, q, k, v, window, causal, scale, "total, H, D")
    cu_k, max_k = (cu_seqlens, max_seqlen) if cu_seqlens_k is None else (cu_seqlens_k, max_seqlen_k)
    for name, cu in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_k)):
        if not isinstance(cu, torch.Tensor) or cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() < 1:
            what = f"{cu.dtype} {tuple(cu.shape)}" if isinstance(cu, torch.Tensor) else type(cu).__name__
            raise TypeError(f"{op}: {name} is a {what}; give an int32 tensor [sequences + 1]")
        if cu.device != q.device:
            raise ValueError(f"{op}: {name} is on {cu.device} but q is on {q.device}; move it")
    if cu_k.numel() != cu_seqlens.numel():
        raise ValueError(f"{op}: {cu_seqlens.numel() - 1} sequences of q but {cu_k.numel() - 1} of k")
    if not isinstance(max_seqlen, int) or not isinstance(max_k, int):
        raise TypeError(f"{op}: the longest sequences are {max_seqlen!r} and {max_k!r}; give integers")
    if not on_triton(op, "q", q):
        return _packed(reference, q, k, v, cu_seqlens, cu_k, causal, window, scale)
    if lacking(architecture(q.device), q.dtype):
        return _packed(by_torch, q, k, v, cu_seqlens, cu_k, causal, window, scale)
    q, k, v = [x.transpose(0, 1)[None] for x in (q, k, v)]  # [1, H, total, D]
    o = _Attention.apply(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_k, bool(causal), window, scale)
    return o[0].transpose(0, 1)
