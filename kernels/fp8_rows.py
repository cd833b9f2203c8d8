"""Rows in FP8 (e4m3), each with a scale of its own: what a product in FP8 takes of activations and of gradients.

For a row x of N numbers, as e4m3 ends at 448:

    scale = max |x| / 448           one number a row, fp32
    x8    = round(x / scale)        4 significant bits, whatever the size of the row

so that x8 * scale is x to one part in 16 of each number, or 2**-10 of scale, and (x8 @ w8.T) * scale * scale_w is
x @ w.T with w8 and scale_w of `kernels/merged_dequantize.py`. As each row has a scale of its own, a token whose
gradients are small loses no more than one whose are large.

A product of such rows and a weight of one scale can leave their scales to whoever reads its result, if that kernel can
multiply (`swiglu_fp8.py`, `rms_norm_fp8.py` with the residual). For others `launch_scaled` does it, in the pass that
adds the residual, or in place.

The largest number of a row must be known before the first is written, so a program walks along its rows twice. The
second walk finds its numbers in registers, where a row fits one block, or else in the cache. `rms_norm_fp8.py`,
`swiglu_fp8.py`, `rope_fp8.py` and the backward of `rms_norm.py` write such rows themselves: nothing then reads them
once more to quantize them.

Casts: a load is converted to fp32 at once, 1 / scale is fp32, and x8 is rounded once, when it is stored.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels.common import Cost, architecture, as_rows, check_floats, device_of, on_triton, tl, triton
from fastkit.kernels.fp8_scale import FP8, check_fp8, lacks_fp8, reference_fp8, reference_scale, row_scale
from fastkit.kernels.rms_norm import row_tiling


def cost(M: int, N: int, dtype=torch.bfloat16) -> Cost:
    """The least work for x [M, N] of `dtype`: read it, write x8 and scale."""
    return Cost(M * N * (dtype.itemsize + 1) + 4 * M, 3 * M * N)  # |x|, its maximum, / scale


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x8 [M, N], scale [M]) of x [M, N] in plain torch, with the same casts."""
    x = x.float()
    scale = reference_scale(x.abs().amax(1), None, None, 1.0)
    return reference_fp8(x, scale), scale


def on_fp8_kernels(op: str, x: torch.Tensor) -> bool:
    """Whether `op` writes FP8 by its kernel: on a GPU that has e4m3. Triton's interpreter rounds to it wrongly."""
    return on_triton(op, "x", x) and x.device.type == "cuda" and not lacks_fp8(architecture(x.device))


@triton.jit
def _quantize_kernel(
    x_ptr, x8_ptr, scale_ptr,
    M, N, stride_xm, stride_x8m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_M rows, BLOCK_N columns at a time."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]; * stride can pass 2**31
    in_rows = rows < M
    x_rows, x8_rows = x_ptr + rows[:, None] * stride_xm, x8_ptr + rows[:, None] * stride_x8m

    largest = tl.zeros([BLOCK_M], tl.float32)
    for block in range(BLOCKS_N):
        cols = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask = in_rows[:, None] & (cols < N)[None, :]
        x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
    scale, inverse = row_scale(largest)

    for block in range(BLOCKS_N):
        cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = in_rows[:, None] & (cols < N)[None, :]
        x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(x8_rows + cols[None, :], (x * inverse[:, None]).to(x8_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + rows, scale, mask=in_rows)  # after the walk: a store before it would have it load again


def launch(x, x8, scale, **tiling) -> None:
    """Write x8 [M, N] and scale [M], given x [M, N]. Rows may be any stride apart.

    `tiling` overrides those of `row_tiling`. Raises NotImplementedError where there is no FP8.
    """
    check_fp8("quantize_rows_fp8", x.device)
    M, N = x.shape
    if M * N == 0:
        return
    tiling = row_tiling(N) | tiling
    with device_of(x):
        _quantize_kernel[(-(-M // tiling["BLOCK_M"]),)](x, x8, scale, M, N, x.stride(0), x8.stride(0), **tiling)


@triton.jit
def _scaled_kernel(
    x_ptr, scale_ptr, residual_ptr, y_ptr,
    M, N, stride_xm, stride_residualm, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_M rows of BLOCK_N columns."""
    rows = (tl.program_id(0) // BLOCKS_N * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    cols = tl.program_id(0) % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + rows, mask=rows < M, other=0.0)[:, None]
    if residual_ptr is None:
        y = x * scale
    else:
        residual_rows = residual_ptr + rows[:, None] * stride_residualm
        residual = tl.load(residual_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.fma(x, scale, residual)  # rms_norm_fp8.py's bits
    tl.store(y_ptr + rows[:, None] * stride_ym + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def launch_scaled(x, scale, residual, y, **tiling) -> None:
    """Write y = x * scale + residual [M, N], rounded once; scale [M], fp32; residual may be None, and y may be x.

    Rows may be any stride apart. `tiling` overrides those of `row_tiling`.
    """
    M, N = x.shape
    if M * N == 0:
        return
    tiling, stride_residualm = row_tiling(N) | tiling, 0 if residual is None else residual.stride(0)
    with device_of(x):
        _scaled_kernel[(-(-M // tiling["BLOCK_M"]) * tiling["BLOCKS_N"],)](
            x, scale, residual, y, M, N, x.stride(0), stride_residualm, y.stride(0), **tiling
        )


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    M, empty = 8192, functools.partial(torch.empty, device="meta")  # 4 sequences of 2,048 tokens
    x = empty(M, 4096, dtype=dtype)
    return {  # Mistral-7B: o and dy; the gradients of q, k and v; those of gate and up
        f"rows of {M}x{N}": functools.partial(launch, empty(M, N, dtype=dtype), empty(M, N, dtype=FP8), empty(M))
        for N in (4096, 6144, 28672)
    } | {f"scaled {M}x4096": functools.partial(launch_scaled, x, empty(M), x, x)}


def quantize_rows_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in FP8 (e4m3), each row divided by a scale of its own, its largest magnitude over 448.

    x        [M, N], float32, float16 or bfloat16. Rows may be any stride apart; other layouts are copied first.
    returns  (x8 [M, N], contiguous, scale [M] in fp32); x8 * scale[:, None] is x, to the 4 significant bits of e4m3

    No gradient. A row with an infinite or undefined number is undefined (NaN) in that number at least. Raises TypeError
    for another dtype, ValueError for another shape, NotImplementedError for a device without kernels. CPU tensors and
    GPUs before sm_89 take `reference`.
    """
    check_floats("quantize_rows_fp8", x=x)
    if x.dim() != 2:
        raise ValueError(f"quantize_rows_fp8: x has shape {tuple(x.shape)}; give a matrix [M, N]")
    if x.numel() == 0 or not on_fp8_kernels("quantize_rows_fp8", x):
        return reference(x.detach()) if x.numel() else (x.to(FP8), x.new_zeros(len(x), dtype=torch.float32))
    x, x8 = as_rows(x), torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    launch(x, x8, scale)
    return x8, scale
