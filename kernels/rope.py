"""Rotary position embedding of queries and keys (Su et al. 2021, RoFormer, arXiv:2104.09864), both in one launch.

Forward. A head's vector x of D numbers is D/2 pairs, and pair i of a token at position p turns by the angle
p * theta_i, where theta_i is the pair's frequency. In the convention of Llama, Mistral and Qwen, as Hugging Face stores
them, pair i is (x1, x2) = (x[i], x[i + D/2]), one number of each half of the head:

    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin                with cos = cos(p * theta_i), sin = sin(p * theta_i)

A dot product of a query turned by p and a key turned by s depends on p - s alone, which is what attention is to see.

cos and sin come from a table, so that a model's scaling of the frequencies (Llama 3, YaRN) is the table's affair. YaRN
scales the table's numbers too, by its attention_factor m; nothing below needs cos² + sin² to be 1.

Backward. y is linear in x, so dx is the transposed matrix times dy = ∂L/∂y:

    [ cos  -sin ]ᵀ     [ cos   sin ]             dx1 = dy1 * cos + dy2 * sin
    [ sin   cos ]   =  [ -sin  cos ]             dx2 = dy2 * cos - dy1 * sin

That is the forward with -sin for sin, the turn by -p * theta_i (times m, where there is one), so one kernel does both.

Saved for the backward: cos, sin and the position ids, the caller's own tensors. Neither q nor k.

Casts: every load is converted to fp32 at once and all arithmetic is fp32; a result is rounded once, when it is stored.
Hugging Face rounds three times, both products and their sum, after rounding cos and sin to the model's dtype: give a
table in fp32 and the angles are exact too, at little cost: a row is read for eight heads, from memory for the first.

A product in FP8 leaves its rows' scales to its reader (`fp8_rows.py`): given them, the kernel multiplies q and k by
them as it reads, and v, which is not turned, in the same launch.
"""

import functools
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from fastkit.kernels.common import Cost, check_floats, device_of, on_triton, tl, triton

TILE_NUMBERS = 2048  # in one program: eight heads of 128 at two tokens
MAX_D = 1024  # more than any model's head


def cost(
    B: int, T: int, q_heads: int, k_heads: int, D: int, dtype=torch.bfloat16, table_dtype=torch.float32
) -> tuple[Cost, Cost]:
    """The least work for q [B, q_heads, T, D] and k [B, k_heads, T, D] of `dtype`: (forward, backward).

    The table is one of T rows for all sequences; of its D columns half repeats the other half and is not read.
    """
    numbers = B * (q_heads + k_heads) * T * D
    each = Cost(
        bytes_moved=2 * numbers * dtype.itemsize + T * D * table_dtype.itemsize,  # read and write q, k; read cos, sin
        flops=3 * numbers,  # two products and a sum
    )
    return each, each


def reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, with the same casts, differentiated by autograd. fp64 stays fp64: the tests' truth."""
    accurate = torch.promote_types(q.dtype, torch.float32)
    half = cos.shape[-1] // 2
    table = [angles if position_ids is None else angles[position_ids.long()] for angles in (cos, sin)]
    cos, sin = (angles[..., :half].to(accurate).unsqueeze(-3) for angles in table)  # [B or 1, 1, T, half]

    def rotate(x):
        x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
        x1, x2 = x1.to(accurate), x2.to(accurate)
        return torch.cat([(x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype), rest], -1)

    return rotate(q), rotate(k)


@triton.jit
def _rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, position_ptr, q_out_ptr, k_out_ptr, scale_ptr, v_ptr, v_out_ptr,
    T, TABLE_ROWS, Q_HEADS, K_HEADS,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_cosb, stride_cost, stride_positionb,
    stride_qob, stride_qoh, stride_qot, stride_kob, stride_koh, stride_kot,
    HALF: tl.constexpr, REST: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One program turns BLOCK_H heads of q, or of k, at BLOCK_T tokens of one sequence; or writes v as it is.

    All its reads come before its first write: they are under way together, and the outputs may be the inputs. HALF is
    the number of pairs in a head; REST numbers behind them are copied. scale, if it is not None, is [B * T], what a
    token's numbers are yet to be multiplied by; v and v_out, if they are not None, lie as k and k_out do.
    """
    q_groups, k_groups, blocks_t = tl.cdiv(Q_HEADS, BLOCK_H), tl.cdiv(K_HEADS, BLOCK_H), tl.cdiv(T, BLOCK_T)
    groups = q_groups + (k_groups if v_ptr is None else 2 * k_groups)
    group, block = tl.program_id(0) % groups, tl.program_id(0) // groups
    in_k, in_v = group >= q_groups, group >= q_groups + k_groups  # in_k: in k or v
    b = (block // blocks_t).to(tl.int64)  # b * stride, like heads * stride, can pass 2**31
    tokens = (block % blocks_t).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    group -= tl.where(in_k, q_groups, 0) + tl.where(in_v, k_groups, 0)
    heads = (group * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)  # [BLOCK_H]
    pairs = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_rows = (heads < tl.where(in_k, K_HEADS, Q_HEADS))[:, None, None] & (tokens < T)[None, :, None]
    mask = in_rows & (pairs < HALF)[None, None, :]

    stride_b, stride_h = tl.where(in_k, stride_kb, stride_qb), tl.where(in_k, stride_kh, stride_qh)
    stride_t = tl.where(in_k, stride_kt, stride_qt)
    x_ptr, out_ptr = tl.where(in_k, k_ptr, q_ptr), tl.where(in_k, k_out_ptr, q_out_ptr)
    if v_ptr is not None:
        x_ptr, out_ptr = tl.where(in_v, v_ptr, x_ptr), tl.where(in_v, v_out_ptr, out_ptr)
    rows = _rows(x_ptr, stride_b, stride_h, stride_t, b, heads, tokens)
    x1 = tl.load(rows + pairs[None, None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_T, BLOCK_D]
    x2 = tl.load(rows + HALF + pairs[None, None, :], mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + b * T + tokens, mask=tokens < T, other=0.0)[None, :, None]
        x1, x2 = x1 * scale, x2 * scale
    cos, sin = angles(
        cos_ptr, sin_ptr, position_ptr, b, tokens, pairs, T, TABLE_ROWS,
        stride_cosb, stride_cost, stride_positionb, HALF, INVERSE,
    )  # fmt: skip

    stride_b, stride_h = tl.where(in_k, stride_kob, stride_qob), tl.where(in_k, stride_koh, stride_qoh)
    stride_t = tl.where(in_k, stride_kot, stride_qot)
    out_rows = _rows(out_ptr, stride_b, stride_h, stride_t, b, heads, tokens)
    dtype = q_out_ptr.dtype.element_ty
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    if v_ptr is not None:
        y1, y2 = tl.where(in_v, x1, y1), tl.where(in_v, x2, y2)
    tl.store(out_rows + pairs[None, None, :], y1.to(dtype), mask=mask)
    tl.store(out_rows + HALF + pairs[None, None, :], y2.to(dtype), mask=mask)
    if REST > 0:
        rest = tl.arange(0, BLOCK_REST)[None, None, :]  # [1, 1, BLOCK_REST]
        rest_mask = in_rows & (rest < REST)
        others = tl.load(rows + 2 * HALF + rest, mask=rest_mask, other=0.0)
        if scale_ptr is not None:
            others = (others.to(tl.float32) * scale).to(dtype)
        tl.store(out_rows + 2 * HALF + rest, others, mask=rest_mask)


@triton.jit
def angles(
    cos_ptr, sin_ptr, position_ptr, b, tokens, pairs, T, TABLE_ROWS,
    stride_cosb, stride_cost, stride_positionb, HALF: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """cos and sin, or -sin if INVERSE, of a sequence's tokens, in fp32: [1, BLOCK_T, BLOCK_D]."""
    positions = tokens
    if position_ptr is not None:
        positions = tl.load(position_ptr + b * stride_positionb + tokens, mask=tokens < T, other=0).to(tl.int64)
    in_table = (tokens < T) & (positions >= 0) & (positions < TABLE_ROWS)
    table_mask = in_table[:, None] & (pairs < HALF)[None, :]
    table = b * stride_cosb + positions[:, None] * stride_cost + pairs[None, :]  # [BLOCK_T, BLOCK_D]
    # a position that the table lacks turns what it meets into NaN, which shows; any other number would not
    cos = tl.load(cos_ptr + table, mask=table_mask, other=float("nan")).to(tl.float32)[None, :, :]
    sin = tl.load(sin_ptr + table, mask=table_mask, other=float("nan")).to(tl.float32)[None, :, :]
    return cos, -sin if INVERSE else sin


@triton.jit
def _rows(ptr, stride_b, stride_h, stride_t, b, heads, tokens):
    """Where the rows of a sequence's heads start: [BLOCK_H, BLOCK_T, 1]."""
    return ptr + b * stride_b + (heads * stride_h)[:, None, None] + (tokens * stride_t)[None, :, None]


def _tiling(q_heads: int, k_heads: int, T: int, half: int) -> dict[str, int]:
    """Eight heads at so many tokens that a thread has 16 numbers, two 128-bit loads in a 16-bit dtype, in 32 registers:
    so an SM is full of threads. Fewer heads would ask for a token's angles too often; four, where eight are too many.
    """
    BLOCK_D = 1 << (half - 1).bit_length()
    BLOCK_H = 8 if q_heads % 8 == k_heads % 8 == 0 else 4
    BLOCK_T = min(max(TILE_NUMBERS // (2 * BLOCK_D * BLOCK_H), 1), 1 << (T - 1).bit_length())
    num_warps = min(8, max(1, BLOCK_H * BLOCK_T * BLOCK_D // 256))
    return {"BLOCK_H": BLOCK_H, "BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D, "num_warps": num_warps}


def launch(
    q, k, cos, sin, q_out, k_out, position_ids=None, inverse: bool = False, scale=None, v=None, v_out=None, **tiling
) -> None:
    """Write q_out and k_out, the rotated q [B, q_heads, T, D] and k [B, k_heads, T, D]; with `inverse`, turned back.

    cos, sin      [T, R], [1, T, R] or [B, T, R], with the same strides, where R <= D is even and the second half of
                  each row repeats the first; with position_ids, a table [rows, R]
    position_ids  [1, T] or [B, T], int32 or int64: the table's row for each token
    scale         [B T], fp32: what each token's numbers are yet to be multiplied by
    v, v_out      strided as k and k_out: v is written to v_out, times scale if that is given, and not turned

    Any strides will do but those of the last dimensions, of position_ids too, which must be 1. q_out may be q itself,
    and so k_out and v_out. `tiling` overrides BLOCK_H, BLOCK_T and num_warps. The backward is `inverse` of dq and dk.
    """
    (B, q_heads, T, D), k_heads, rotary = q.shape, k.shape[1], cos.shape[-1]
    if B * T * D * (q_heads + k_heads) == 0:
        return
    tiling = _tiling(q_heads, k_heads, T, rotary // 2) | tiling
    rest = 0 if q_out is q and k_out is k and scale is None else D - rotary
    groups = sum(-(-heads // tiling["BLOCK_H"]) for heads in (q_heads, k_heads, 0 if v is None else k_heads))
    grid = (B * -(-T // tiling["BLOCK_T"]) * groups,)
    with device_of(q):
        _rotate_kernel[grid](
            q, k, cos, sin, position_ids, q_out, k_out, scale, v, v_out,
            T, cos.shape[-2], q_heads, k_heads,
            *q.stride()[:3], *k.stride()[:3],
            batch_stride(cos, 3), cos.stride(-2), 0 if position_ids is None else batch_stride(position_ids, 2),
            *q_out.stride()[:3], *k_out.stride()[:3],
            HALF=rotary // 2, REST=rest, INVERSE=inverse, BLOCK_REST=1 << max(rest - 1, 0).bit_length(), **tiling,
        )  # fmt: skip


def batch_stride(x: torch.Tensor, dims: int) -> int:
    """x's stride from one sequence to the next, 0 where all share it; `dims` are x's with the batch."""
    return x.stride(0) if x.dim() == dims and x.shape[0] > 1 else 0


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    B, T, D, found = 4, 2048, 128, {}
    cos, sin = (torch.empty(T, D, device="meta") for _ in range(2))
    position_ids = torch.empty(B, T, dtype=torch.int64, device="meta")
    for q_heads, k_heads in ((32, 8), (40, 40), (28, 4)):  # Mistral-7B, Llama-2-13B, Qwen2.5-7B
        q, k = (torch.empty(B, T, heads, D, dtype=dtype, device="meta").transpose(1, 2) for heads in (q_heads, k_heads))
        forward = functools.partial(launch, q, k, cos, sin, torch.empty_like(q), torch.empty_like(k))
        found[f"{q_heads}+{k_heads} heads {B}x{T}"] = forward
    found["packed, in place"] = functools.partial(launch, q, k, cos, sin, q, k, position_ids)
    scale = torch.empty(B * T, device="meta")
    v = torch.empty_like(k)
    found["with v, yet to be scaled"] = functools.partial(launch, q, k, cos, sin, q, k, scale=scale, v=v, v_out=v)
    return found


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids):
        ctx.save_for_backward(cos, sin, position_ids)
        return _rotated(q, k, cos, sin, position_ids, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        return *_rotated(dq, dk, *ctx.saved_tensors, inverse=True), None, None, None


def _rotated(q, k, cos, sin, position_ids, inverse):
    """New tensors, in memory laid out as q's and k's are: attention's kernels expect what the projections gave."""
    q, k = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k)]
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    launch(q, k, cos, sin, q_out, k_out, position_ids, inverse)
    return q_out, k_out


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, turned by their positions (arXiv:2104.09864), as apply_rotary_pos_emb of transformers does.

    q, k          [B, q_heads, T, D] and [B, k_heads, T, D], the same dtype: float32, float16 or bfloat16. Any strides
                  but the last are read in place, so a projection's [B, T, heads, D] enters as its transpose(1, 2).
    cos, sin      [B or 1, T, R] or [T, R], as transformers' rotary embeddings return them; with position_ids, a table
                  [rows, R]. float32 (best), float16 or bfloat16. R is even; of each row only the first half is read,
                  the second repeats it. Where R < D, a head's last D - R numbers stay as they are.
    position_ids  [B or 1, T] or [T], int32 or int64: each token's row in the table. Packed sequences start again at 0.
    returns       q and k rotated, in their shapes, dtype and, if dense, strides. fp32 inside, rounded once.

    Differentiable once, in q and k. Raises TypeError for another dtype or two different ones, ValueError for shapes or
    devices that do not match and for position ids outside a table on the CPU (on a GPU, which would have to be waited
    for, their tokens become NaN), NotImplementedError for a device without kernels. CPU tensors take `reference` (see
    `on_triton`).
    """
    cos, sin, position_ids = _checked("rope", q, k, cos, sin, position_ids)
    if not on_triton("rope", "q", q):
        return reference(q, k, cos, sin, position_ids)
    return _RoPE.apply(q, k, cos, sin, position_ids)


def rope_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope` in place: q and k are overwritten and returned. Autograd cannot follow, so neither may require a gradient.

    Raises as `rope` does, and ValueError for a q or k that requires a gradient, has a last dimension with another
    stride than 1, or shares memory among its elements.
    """
    cos, sin, position_ids = _checked("rope_", q, k, cos, sin, position_ids)
    for name, x in (("q", q), ("k", k)):
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"rope_: {name} requires a gradient; use rope, or call this under torch.no_grad()")
        if x.stride(-1) != 1 or any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(f"rope_: {name} has strides {x.stride()}; make it contiguous, or use rope")
    if on_triton("rope_", "q", q):
        launch(q, k, cos, sin, q, k, position_ids)
    else:
        for x, rotated in zip((q, k), reference(q, k, cos, sin, position_ids), strict=True):
            x.copy_(rotated)
    return q, k


def _checked(op, q, k, cos, sin, position_ids):
    """cos, sin and position_ids as `launch` takes them. Raises for what the operation cannot take."""
    check_floats(op, q=q, k=k, cos=cos, sin=sin)
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"{op}: q has shape {tuple(q.shape)} and k {tuple(k.shape)}; both need [batch, heads, tokens, D], "
            "alike but for heads"
        )
    if q.dtype != k.dtype:
        raise TypeError(f"{op}: k has dtype {k.dtype} but q has {q.dtype}; convert one to the other's")
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"{op}: sin has shape {tuple(sin.shape)}, {sin.dtype}, but cos has {tuple(cos.shape)}, {cos.dtype}; "
            "make them the same"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError(f"{op}: cos or sin requires a gradient, and none is computed for them; detach them")
    B, _, T, D = q.shape
    rotary = cos.shape[-1] if cos.dim() else 0
    if D > MAX_D:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; heads of up to {MAX_D} numbers are supported")
    if not 2 <= rotary <= D or rotary % 2:
        raise ValueError(f"{op}: cos has shape {tuple(cos.shape)}; its last size must be even and at most q's {D}")
    if position_ids is None:
        if cos.dim() not in (2, 3) or cos.shape[-2] != T or cos.shape[:-2] not in ((), (1,), (B,)):
            raise ValueError(
                f"{op}: cos has shape {tuple(cos.shape)}; q needs [{B} or 1, {T}, {rotary}], or table and position_ids"
            )
    else:
        position_ids = _checked_positions(op, position_ids, q, cos)
    if cos.stride(-1) != 1 or sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, position_ids


def _checked_positions(op, position_ids, q, cos):
    B, T = q.shape[0], q.shape[2]
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: position_ids has dtype {position_ids.dtype}; convert it to int64")
    if position_ids.shape not in ((T,), (1, T), (B, T)) or cos.dim() != 2:
        raise ValueError(
            f"{op}: position_ids has shape {tuple(position_ids.shape)} and cos {tuple(cos.shape)}; "
            f"q needs [{B} or 1, {T}] and a table [rows, {cos.shape[-1]}]"
        )
    if position_ids.device != q.device:
        raise ValueError(f"{op}: position_ids is on {position_ids.device} but q is on {q.device}; move it there")
    if position_ids.device.type == "cpu" and T * B and not 0 <= position_ids.min() <= position_ids.max() < len(cos):
        raise ValueError(
            f"{op}: position_ids reach from {position_ids.min()} to {position_ids.max()} but cos has {len(cos)} rows; "
            "give a longer table"
        )
    return position_ids.contiguous()
