"""RoPE's backward that writes the gradients of q, k and v in FP8 too, for the product that takes them next.

Backward, with cos, sin, dq and dk as in `rope.py`, scale and x8 as in `fp8_rows.py`. For a token:

    dqkv  = [dq and dk turned back, dv]      [N], the D numbers of every head
    scale = max |dqkv| / 448
    dqkv8 = round(dqkv / scale)

The adapters' gradients take dqkv, the product with the weight dqkv8. A program holds all heads of a token in registers
until their largest number is known: 5 bytes a number move where the turn and the quantization, apart, move 7.

Casts: as in `rope.py`; dqkv is rounded to its dtype, and from that to e4m3. Both are, bit by bit, what `rope.launch`
and `fp8_rows.launch` make: so of two products that are added the same one is rounded first.
"""

import functools
import math
from collections.abc import Callable

import torch

from fastkit.kernels import fp8_rows, rope
from fastkit.kernels.common import Cost, device_of, tl, triton
from fastkit.kernels.fp8_scale import FP8, check_fp8, row_scale
from fastkit.kernels.rope import batch_stride


def cost(B: int, T: int, q_heads: int, k_heads: int, D: int, dtype=torch.bfloat16, table_dtype=torch.float32) -> Cost:
    """The least work for dq [B, q_heads, T, D], dk and dv [B, k_heads, T, D] of `dtype`: read these and a table of T
    rows, write dqkv, dqkv8 and scale."""
    turn = rope.cost(B, T, q_heads, k_heads, D, dtype, table_dtype)[1]
    quantize = fp8_rows.cost(B * T, (q_heads + 2 * k_heads) * D, dtype)
    values, again = 2 * B * T * k_heads * D, B * T * (q_heads + 2 * k_heads) * D  # dv moves too; dqkv is not read again
    return Cost(
        turn.bytes_moved + quantize.bytes_moved + (values - again) * dtype.itemsize, turn.flops + quantize.flops
    )


@triton.jit(do_not_specialize=["T"])
def _turn_back_kernel(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, dqkv_ptr, dqkv8_ptr, scale_ptr,
    T, Q_HEADS, K_HEADS,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_cosb, stride_cost, stride_dqkvm, stride_dqkv8m,
    HALF: tl.constexpr, REST: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One program writes a token's row.

    HALF is the number of pairs in a head; REST numbers behind them are copied. Heads start at multiples of ALIGNED
    bytes in dq, dk and dv.
    """
    row = tl.program_id(0)
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)  # b * stride, like row * stride, can pass 2**31
    heads, pairs = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]  # heads: of q, then k, then v
    in_k, in_v = heads >= Q_HEADS, heads >= Q_HEADS + K_HEADS  # in_k: in k or v
    in_heads = heads < Q_HEADS + 2 * K_HEADS
    mask = in_heads & (pairs < HALF)

    ptr = tl.where(in_v, dv_ptr, tl.where(in_k, dk_ptr, dq_ptr))  # [BLOCK_H, 1]
    stride_b = tl.where(in_v, stride_vb, tl.where(in_k, stride_kb, stride_qb))
    stride_h = tl.where(in_v, stride_vh, tl.where(in_k, stride_kh, stride_qh))
    stride_t = tl.where(in_v, stride_vt, tl.where(in_k, stride_kt, stride_qt))
    head = (heads - tl.where(in_k, Q_HEADS, 0) - tl.where(in_v, K_HEADS, 0)).to(tl.int64)
    rows = ptr + b * stride_b + head * stride_h + t * stride_t
    rows = tl.multiple_of(rows, [ALIGNED, ALIGNED])  # the compiler does not see it through `where`
    x1 = tl.load(rows + pairs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    x2 = tl.load(rows + HALF + pairs, mask=mask, other=0.0).to(tl.float32)
    table = b * stride_cosb + t * stride_cost + pairs  # [1, BLOCK_D]
    cos = tl.load(cos_ptr + table, mask=pairs < HALF, other=0.0).to(tl.float32)
    sin = -tl.load(sin_ptr + table, mask=pairs < HALF, other=0.0).to(tl.float32)

    dtype = dqkv_ptr.dtype.element_ty
    # rope.py's y1 and y2, as the compiler contracts them; * -1.0 turns the sign of zeros too
    y1 = tl.where(in_v, x1, tl.fma(x1, cos, x2 * sin * -1.0)).to(dtype)
    y2 = tl.where(in_v, x2, tl.fma(x2, cos, x1 * sin)).to(dtype)
    cols = heads * (2 * HALF + REST) + pairs
    dqkv_row = dqkv_ptr + row.to(tl.int64) * stride_dqkvm
    dqkv8_row = dqkv8_ptr + row.to(tl.int64) * stride_dqkv8m
    tl.store(dqkv_row + cols, y1, mask=mask)
    tl.store(dqkv_row + HALF + cols, y2, mask=mask)
    y1, y2 = y1.to(tl.float32), y2.to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(y1), tl.abs(y2)), axis=1)  # [BLOCK_H]
    if REST > 0:
        rest = tl.arange(0, BLOCK_REST)[None, :]
        rest_mask, rest_cols = in_heads & (rest < REST), heads * (2 * HALF + REST) + 2 * HALF + rest
        others = tl.load(rows + 2 * HALF + rest, mask=rest_mask, other=0.0)  # [BLOCK_H, BLOCK_REST]
        tl.store(dqkv_row + rest_cols, others, mask=rest_mask)
        others = others.to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(others), axis=1))
    scale, inverse = row_scale(tl.max(largest, axis=0))

    dtype8 = dqkv8_ptr.dtype.element_ty
    tl.store(dqkv8_row + cols, (y1 * inverse).to(dtype8), mask=mask)
    tl.store(dqkv8_row + HALF + cols, (y2 * inverse).to(dtype8), mask=mask)
    if REST > 0:
        tl.store(dqkv8_row + rest_cols, (others * inverse).to(dtype8), mask=rest_mask)
    tl.store(scale_ptr + row, scale)


def _tiling(heads: int, D: int, rotary: int) -> dict[str, int]:
    """All heads of a token, and 16 numbers a thread: two 128-bit loads in a 16-bit dtype, in 32 to 50 registers."""
    BLOCK_H, BLOCK_D, BLOCK_REST = (1 << max(n - 1, 0).bit_length() for n in (heads, rotary // 2, D - rotary))
    numbers = BLOCK_H * (2 * BLOCK_D + (BLOCK_REST if rotary < D else 0))
    num_warps = 1 << (max(numbers // 512, 1) - 1).bit_length()
    return {"BLOCK_H": BLOCK_H, "BLOCK_D": BLOCK_D, "BLOCK_REST": BLOCK_REST, "num_warps": num_warps}


def takes(dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether one program can hold a token's heads, of tensors as `launch` takes them: 128 heads of 128 numbers, of q,
    k and v together, are the most. Llama-2-13B has 120."""
    return _tiling(dq.shape[1] + 2 * dk.shape[1], dq.shape[3], cos.shape[-1])["num_warps"] <= 32


def launch(dq, dk, dv, cos, sin, dqkv, dqkv8, scale, **tiling) -> None:
    """Write dqkv and dqkv8 [B T, N] and scale [B T] (fp32), given dq [B, q_heads, T, D], dk and dv [B, k_heads, T, D],
    of which dq and dk are turned back; N = (q_heads + 2 k_heads) D, and `takes` says for which.

    cos, sin      [T, R], [1, T, R] or [B, T, R], as `rope.launch` takes them

    Any strides will do but those of the last dimensions, which must be 1. `tiling` overrides num_warps. Raises
    NotImplementedError where there is no FP8.
    """
    check_fp8("rope_fp8", dq.device)
    (B, q_heads, T, D), k_heads, rotary = dq.shape, dk.shape[1], cos.shape[-1]
    if dqkv.numel() == 0:
        return
    tiling = _tiling(q_heads + 2 * k_heads, D, rotary) | tiling
    with device_of(dq):
        _turn_back_kernel[(B * T,)](
            dq, dk, dv, cos, sin, dqkv, dqkv8, scale,
            T, q_heads, k_heads,
            *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            batch_stride(cos, 3), cos.stride(-2), dqkv.stride(0), dqkv8.stride(0),
            HALF=rotary // 2, REST=D - rotary, ALIGNED=_alignment(dq, dk, dv), **tiling,
        )  # fmt: skip


def _alignment(*tensors: torch.Tensor) -> int:
    """Bytes of which every head of every token starts at a multiple; at most the 16 of a 128-bit load."""
    steps = (stride * x.element_size() for x in tensors for stride in x.stride()[:3])
    return math.gcd(16, *steps, *(x.data_ptr() for x in tensors))


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    B, T, D, found = 4, 2048, 128, {}
    empty = functools.partial(torch.empty, device="meta")
    table = empty(T, D, dtype=dtype)
    for q_heads, k_heads in ((32, 8), (40, 40), (28, 4)):  # Mistral-7B, Llama-2-13B, Qwen2.5-7B
        dq, dk, dv = (empty(B, T, n, D, dtype=dtype).transpose(1, 2) for n in (q_heads, k_heads, k_heads))
        rows = (B * T, (q_heads + 2 * k_heads) * D)
        outputs = empty(rows, dtype=dtype), empty(rows, dtype=FP8), empty(B * T)
        found[f"{q_heads}+{k_heads} heads {B}x{T}"] = functools.partial(launch, dq, dk, dv, table, table, *outputs)
    return found
