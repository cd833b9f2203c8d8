"""The kernels before and after attention_backward_hopper.py's: what its sums start from, and dq rounded.

Between them dq lies in fp32, in tiles of BLOCK_M queries of a head, in the order of `attention_backward_parts.add_dq`.
RoPE's backward is linear in dq, so it can turn the sums as they are read (see rope.py), rounded once instead of twice.
"""

import functools
import math
from collections.abc import Callable

import torch

from fastkit.kernels.common import device_of, tl, triton
from fastkit.kernels.rope import angles, batch_stride

BLOCK_M = 64  # queries of a tile


@triton.jit
def _rows_of(x_ptr, batch, head, rows, cols, stride_b, stride_h, stride_t):
    """Where numbers of x [B, H, T, D] lie: [rows, cols]."""
    return x_ptr + batch * stride_b + head * stride_h + rows.to(tl.int64)[:, None] * stride_t + cols[None, :]


@triton.jit(do_not_specialize=["T"])
def _prepare_kernel(
    do_ptr, o_ptr, lse_ptr, numbers_ptr, dq_ptr, turns_ptr,
    T, H, stride_dob, stride_doh, stride_dot, stride_ob, stride_oh, stride_ot,
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program writes of BLOCK_M queries of a head lse in powers of 2, inf where there is no query or it sees no
    key, and -delta = -sum of do * o: numbers [B * H, blocks, 2, BLOCK_M]; and zeros to dq and, if given, turns."""
    block, blocks, index = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    batch, head = (index // H).to(tl.int64), (index % H).to(tl.int64)
    rows, cols = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)  # [BLOCK_M], [D]
    inside = (rows < T)[:, None]
    do = tl.load(_rows_of(do_ptr, batch, head, rows, cols, stride_dob, stride_doh, stride_dot), mask=inside, other=0.0)
    o = tl.load(_rows_of(o_ptr, batch, head, rows, cols, stride_ob, stride_oh, stride_ot), mask=inside, other=0.0)
    lse = tl.load(lse_ptr + index.to(tl.int64) * T + rows, mask=rows < T, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)  # log2(e)
    tile = index.to(tl.int64) * blocks + block
    numbers_ptr += tile * 2 * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(numbers_ptr, lse)
    tl.store(numbers_ptr + BLOCK_M, -tl.sum(do.to(tl.float32) * o.to(tl.float32), 1))
    dq_ptr += tile * BLOCK_M * D + tl.arange(0, BLOCK_M)[:, None] * D + cols[None, :]
    tl.store(dq_ptr, tl.zeros([BLOCK_M, D], tl.float32))
    if turns_ptr is not None:
        tl.store(turns_ptr + 2 * tile + tl.arange(0, 2), tl.zeros([2], tl.int32))


@triton.jit(do_not_specialize=["T"])
def _round_kernel(
    dq_ptr, y_ptr, cos_ptr, sin_ptr, T, H, stride_yb, stride_yh, stride_yt, stride_cosb, stride_cost,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program writes 16 rows of BLOCK_H heads of y [B, H, T, D], in y's dtype, of dq [B, H, blocks, BLOCK_M * D],
    as `add_dq` lays its tiles; turned back by cos and sin first, as rope.py does, if they are given.

    A tile's halves are those of its columns, and so of all pairs that turn. Several heads share the angles.
    """
    HALF: tl.constexpr = D // 2
    PARTS: tl.constexpr = BLOCK_M // 16  # a warp's rows of a tile
    part, blocks, groups = tl.program_id(0), tl.num_programs(0) // PARTS, H // BLOCK_H
    batch, group = (tl.program_id(1) // groups).to(tl.int64), tl.program_id(1) % groups
    heads = group * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)  # [BLOCK_H]
    rows, pairs = (part * 16 + tl.arange(0, 16)).to(tl.int64), tl.arange(0, HALF)  # [16], [HALF]

    tiles = ((batch * H + heads) * blocks + part // PARTS) * (BLOCK_M * D)
    numbers = part % PARTS * 128 + tl.arange(0, D // 16)[:, None] * (PARTS * 128) + tl.arange(0, 128)[None, :]
    dq_ptrs = dq_ptr + tiles[:, None, None] + numbers[None, :, :]  # [BLOCK_H, D / 16, 128]
    x1 = _in_rows(tl.load(dq_ptrs), D, BLOCK_H)  # [BLOCK_H, 16, HALF]
    x2 = _in_rows(tl.load(dq_ptrs + BLOCK_M * HALF), D, BLOCK_H)
    if cos_ptr is not None:
        cos, sin = angles(
            cos_ptr, sin_ptr, None, batch, rows, pairs, T, T, stride_cosb, stride_cost, 0, HALF, True
        )  # fmt: skip
        x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y_ptr += batch * stride_yb
    y_ptrs = y_ptr + (heads * stride_yh)[:, None, None] + (rows * stride_yt)[None, :, None] + pairs[None, None, :]
    inside = (rows < T)[None, :, None]
    tl.store(y_ptrs, x1.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptrs + HALF, x2.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _in_rows(dq, D: tl.constexpr, BLOCK_H: tl.constexpr):
    """[BLOCK_H, 16, D / 2] of [BLOCK_H, 8 columns; row, lane of four, 8 rows, column], see `add_dq`."""
    dq = tl.permute(tl.reshape(dq, [BLOCK_H, D // 16, 8, 4, 2, 2]), [0, 4, 2, 1, 3, 5])
    return tl.reshape(dq, [BLOCK_H, 16, D // 2])


def launch_prepare(do, o, lse, numbers, dq, turns) -> None:
    """Write numbers [B H blocks 2 BLOCK_M], zeros to dq [B, H, blocks, BLOCK_M * D] and, if not None, to turns
    [B H blocks 2] (int32), given do and o [B, H, T, D] and lse [B, H, T], contiguous."""
    B, H, T, D = do.shape
    with device_of(do):
        _prepare_kernel[(dq.shape[2], B * H)](
            do, o, lse, numbers, dq, turns, T, H, *do.stride()[:3], *o.stride()[:3], D=D, BLOCK_M=BLOCK_M
        )


def launch_round(dq, y, cos=None, sin=None) -> None:
    """Write y [B, H, T, D], in its dtype, given dq [B, H, blocks, BLOCK_M * D]; turned back by cos and sin, if given:
    [T, D], [1, T, D] or [B, T, D], as rope.launch takes them."""
    B, H, T, D = y.shape
    turn = (0, 0) if cos is None else (batch_stride(cos, 3), cos.stride(-2))
    heads = math.gcd(H, 4)
    with device_of(y):
        _round_kernel[(dq.shape[2] * BLOCK_M // 16, B * H // heads)](
            dq, y, cos, sin, T, H, *y.stride()[:3], *turn,
            D=D, BLOCK_M=BLOCK_M, BLOCK_H=heads, num_warps=max(1, heads * D // 64),
        )  # fmt: skip


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    empty, found = functools.partial(torch.empty, device="meta"), {}
    for D in (64, 128):
        x, dq = empty(4, 2048, 32, D, dtype=dtype).transpose(1, 2), empty(4, 32, 32, BLOCK_M * D)
        numbers, turns, table = empty(2 * 4 * 32 * 2048), empty(2 * 4 * 32 * 32, dtype=torch.int32), empty(1, 2048, D)
        name = f"32 heads of {D}, 4x2048"
        found[f"prepare {name}"] = functools.partial(launch_prepare, x, x, empty(4, 32, 2048), numbers, dq, turns)
        found[f"round {name}"] = functools.partial(launch_round, dq, x)
        found[f"round and turn {name}"] = functools.partial(launch_round, dq, x, table.to(dtype), table.to(dtype))
    return found
