"""SwiGLU between products in FP8: it takes their results before their scales, and gives rows that the next takes.

Forward and backward are those of `swiglu.py`, y8 and scale as in `fp8_rows.py`. For a row of N pairs:

    y = silu(gate) * up                                scale = max |y| / 448    y8 [N]   = round(y / scale)
    d = [dgate dup] = [dy * up * dsilu, dy * silu]     scale = max |d| / 448    d8 [2 N] = round(d / scale)

A row of gate and up, and one of dy, may come with a factor that it is yet to be multiplied by: the scale of the row
that its product was made of. That spares the product a slower kernel, or a pass over its result.

The forward stores no y. The backward stores y for LoRA's gradients, and dgate and dup over gate and up; and d8 over dy:
2 N numbers of one byte where there were N of two. A program has whole rows to itself, and reads all of a row before it
writes d8 there.

A row's largest number must be known before its first is written. The forward holds the row in registers until then; the
backward walks along it twice and reads again what it has just written. Apart, SwiGLU and quantization move 9 bytes a
pair forward and 18 backward; here 5 and 14.

Casts: as in `swiglu.py`; y is rounded once, to e4m3. dgate and dup are rounded to their dtype, and from that to e4m3.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels import fp8_rows, swiglu
from fastkit.kernels.common import Cost, device_of, tl, triton
from fastkit.kernels.fp8_scale import FP8, check_fp8, row_scale


def cost(M: int, N: int, dtype=torch.bfloat16) -> tuple[Cost, Cost]:
    """The least work for gate and up [M, N] of `dtype`: (forward, backward)."""
    forward, backward = swiglu.cost(M, N, dtype)
    return (
        Cost(forward.bytes_moved - M * N * (dtype.itemsize - 1) + 4 * M, forward.flops + 3 * M * N),
        Cost(backward.bytes_moved + M * N * (2 + dtype.itemsize) + 4 * M, backward.flops + 6 * M * N),
    )


def reference(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(y8 [M, N], scale [M]) in plain torch, with the same casts."""
    return fp8_rows.reference(swiglu.reference(gate.float(), up.float()))


@triton.jit
def _factor(factor_ptr, row):
    """What a row is yet to be multiplied by, in fp32."""
    if factor_ptr is None:
        factor = 1.0
    else:
        factor = tl.load(factor_ptr + row)
    return factor


@triton.jit
def _gated(gate_row, up_row, factor, cols, N):
    """y at `cols` of a row, in fp32."""
    gate = tl.load(gate_row + cols, mask=cols < N, other=0.0).to(tl.float32) * factor
    up = tl.load(up_row + cols, mask=cols < N, other=0.0).to(tl.float32) * factor
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _gate_kernel(
    gate_ptr, up_ptr, factor_ptr, y8_ptr, scale_ptr,
    N, stride_gatem, stride_upm, stride_y8m,
    BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """One program writes a row. The first BLOCK_N columns, mostly all, stay in registers until the scale is known."""
    row = tl.program_id(0).to(tl.int64)  # * stride can pass 2**31
    gate_row, up_row = gate_ptr + row * stride_gatem, up_ptr + row * stride_upm
    factor, first = _factor(factor_ptr, row), tl.arange(0, BLOCK_N)  # [BLOCK_N]

    y = _gated(gate_row, up_row, factor, first, N)
    largest = tl.abs(y)
    for block in range(1, BLOCKS_N):
        cols = block * BLOCK_N + first
        largest = tl.maximum(largest, tl.abs(_gated(gate_row, up_row, factor, cols, N)))
    scale, inverse = row_scale(tl.max(largest, axis=0))

    y8_row = y8_ptr + row * stride_y8m
    tl.store(y8_row + first, (y * inverse).to(y8_ptr.dtype.element_ty), mask=first < N)
    for block in range(1, BLOCKS_N):
        cols = block * BLOCK_N + first
        y = _gated(gate_row, up_row, factor, cols, N)
        tl.store(y8_row + cols, (y * inverse).to(y8_ptr.dtype.element_ty), mask=cols < N)
    tl.store(scale_ptr + row, scale)  # after the walk, as in fp8_rows.py


@triton.jit
def _gate_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dy_factor_ptr, factor_ptr, d8_ptr, scale_ptr, y_ptr,
    N, stride_dym, stride_gatem, stride_upm, stride_d8m, stride_ym,
    BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """One program writes a row of dgate and dup, over gate and up, of d8, over dy, and of y, BLOCK_N at a time."""
    row = tl.program_id(0).to(tl.int64)  # * stride can pass 2**31
    gate_row, up_row = gate_ptr + row * stride_gatem, up_ptr + row * stride_upm
    dy_factor, factor = _factor(dy_factor_ptr, row), _factor(factor_ptr, row)

    largest = tl.zeros([BLOCK_N], tl.float32)
    for block in range(BLOCKS_N):
        cols = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        dy = tl.load(dy_ptr + row * stride_dym + cols, mask=cols < N, other=0.0).to(tl.float32) * dy_factor
        gate = tl.load(gate_row + cols, mask=cols < N, other=0.0).to(tl.float32) * factor
        up = tl.load(up_row + cols, mask=cols < N, other=0.0).to(tl.float32) * factor
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dsilu = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        dup = (dy * silu).to(up_ptr.dtype.element_ty)
        dgate = (dy * up * dsilu).to(gate_ptr.dtype.element_ty)
        tl.store(gate_row + cols, dgate, mask=cols < N)
        tl.store(up_row + cols, dup, mask=cols < N)
        tl.store(y_ptr + row * stride_ym + cols, (silu * up).to(y_ptr.dtype.element_ty), mask=cols < N)
        largest = tl.maximum(largest, tl.maximum(tl.abs(dgate.to(tl.float32)), tl.abs(dup.to(tl.float32))))
    scale, inverse = row_scale(tl.max(largest, axis=0))
    tl.store(scale_ptr + row, scale)

    tl.debug_barrier()  # all of the row of dy is read, and of dgate and dup written, before another thread's turn
    d8_row = d8_ptr + row * stride_d8m
    for block in range(BLOCKS_N):
        cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
        dgate = tl.load(gate_row + cols, mask=cols < N, other=0.0).to(tl.float32)
        dup = tl.load(up_row + cols, mask=cols < N, other=0.0).to(tl.float32)
        tl.store(d8_row + cols, (dgate * inverse).to(d8_ptr.dtype.element_ty), mask=cols < N)
        tl.store(d8_row + N + cols, (dup * inverse).to(d8_ptr.dtype.element_ty), mask=cols < N)


def _tiling(N: int, largest: int, numbers: int) -> dict[str, int]:
    """Blocks of at most `largest` columns, `numbers` of them a thread."""
    BLOCK_N = min(largest, 1 << max(N - 1, 0).bit_length())
    return {"BLOCK_N": BLOCK_N, "BLOCKS_N": -(-N // BLOCK_N), "num_warps": max(1, BLOCK_N // (numbers * 32))}


def _forward_tiling(N: int) -> dict[str, int]:
    """A row in registers where it fits, by as many threads as there can be: 8192 x 14336 take 0.151 ms by 32 warps,
    0.174 by 16, and in two walks 0.258 (NVIDIA H200; the bytes 0.143). Longer rows: 0.342 by 16 warps, 0.420 by 32."""
    return _tiling(N, 16384, 16 if N <= 16384 else 32)


def _backward_tiling(N: int) -> dict[str, int]:
    """8 numbers a thread, one 128-bit load of each input in a 16-bit dtype, in few registers: loads are what it waits
    for, and several programs beside one another keep them coming."""
    return _tiling(N, 4096, 8)


def launch_forward(gate, up, y8, scale, factor=None, **tiling) -> None:
    """Write y8 [M, N] and scale [M], given gate and up [M, N]. Rows may be any stride apart.

    factor [M], fp32, or None: what the rows of gate and up are yet to be multiplied by. `tiling` overrides those of
    `_forward_tiling`. Raises NotImplementedError where there is no FP8.
    """
    check_fp8("swiglu_fp8", gate.device)
    M, N = gate.shape
    if M * N == 0:
        return
    with device_of(gate):
        _gate_kernel[(M,)](
            gate, up, factor, y8, scale, N, gate.stride(0), up.stride(0), y8.stride(0), **(_forward_tiling(N) | tiling)
        )


def launch_backward(dy, gate, up, scale, y, dy_factor=None, factor=None, **tiling) -> torch.Tensor:
    """Write dgate and dup over gate and up [M, N], y [M, N], and scale [M]; return d8 [M, 2 N], written over dy [M, N].

    dy has 16 bits a number and is contiguous; rows of the others may be any stride apart. dy_factor [M]: what those of
    dy are yet to be multiplied by; factor and `tiling` as in the forward.
    """
    check_fp8("swiglu_fp8", gate.device)
    (M, N), d8 = gate.shape, dy.view(FP8)
    if M * N == 0:
        return d8
    with device_of(gate):
        _gate_backward_kernel[(M,)](
            dy, gate, up, dy_factor, factor, d8, scale, y,
            N, dy.stride(0), gate.stride(0), up.stride(0), d8.stride(0), y.stride(0),
            **(_backward_tiling(N) | tiling),
        )  # fmt: skip
    return d8


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    M, N = 8192, 14336  # Mistral-7B, 4 sequences of 2,048 tokens
    empty = functools.partial(torch.empty, device="meta")
    gate, up = empty(M, 2 * N, dtype=dtype).chunk(2, 1)
    dy, y = empty(M, N, dtype=dtype), empty(M, N, dtype=dtype)
    forward = functools.partial(launch_forward, gate, up, empty(M, N, dtype=FP8), empty(M), empty(M))
    return {
        f"forward {M}x{N}": forward,
        f"backward {M}x{N}": functools.partial(launch_backward, dy, gate, up, empty(M), y, empty(M), empty(M)),
    }
