"""RMSNorm that writes its rows in FP8, each with a scale of its own, for a product that takes them so.

Forward, with x, weight, rstd and y as in `rms_norm.py`, x8 and scale as in `fp8_rows.py`:

    y     = weight * x * rstd
    scale = max |y| / 448  =  rstd * max |weight * x| / 448
    y8    = round(y / scale)

rstd is one number a row and positive, so one walk along the row finds both its sum of squares and its largest number. y
itself is never stored: 3 bytes a number move where norm and quantization, apart, move 7.

What the norm reads is often a sum that is yet to be made: of the residual stream's x and a product z in FP8, whose rows
are yet to be multiplied by their scales, here `factor` (see `fp8_rows.py`). Where a row fits one block the same kernel
makes it, and norms it as long as it is in registers:

    h     = x + z * factor              the residual stream from here on, as in `add_rms_norm.py`
    y     = weight * h * rstd           rstd of h

so 7 bytes a number move in 16 bits, where `fp8_rows.launch_scaled` and the norm, apart, move 9, to the same bits.

There is no backward here. That of y8 is taken to be y's, `rms_norm.launch_backward`, which needs x and rstd alone, and
writes dx in FP8 too where that is the next product's factor.

Casts: as in `rms_norm.py`, but y is rounded once, to e4m3. h is rounded once, to its own dtype, z * factor not by
itself; y is that of the h that was rounded.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels import fp8_rows, rms_norm
from fastkit.kernels.common import Cost, device_of, fp32, tl, triton
from fastkit.kernels.fp8_scale import FP8, check_fp8, row_scale
from fastkit.kernels.rms_norm import MAX_BLOCK_N, row_tiling


def cost(M: int, N: int, dtype=torch.bfloat16, sums: bool = False) -> Cost:
    """The least work for M rows of N numbers, x and weight of `dtype`: read both, write y8, scale and rstd.

    With `sums` z, of `dtype`, and factor are read too, and h is written.
    """
    bytes_moved, flops = M * N * (dtype.itemsize + 1) + N * dtype.itemsize + 8 * M, 7 * M * N
    if sums:
        bytes_moved, flops = bytes_moved + 2 * M * N * dtype.itemsize + 4 * M, flops + 2 * M * N
    return Cost(bytes_moved, flops)


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(y8 [M, N], scale [M]) of x [M, N] in plain torch, with the same casts."""
    return fp8_rows.reference(rms_norm.reference(x.float(), weight, eps))


@triton.jit
def _norm_kernel(
    x_ptr, weight_ptr, y8_ptr, scale_ptr, rstd_ptr,
    M, N, stride_xm, stride_y8m, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_M rows, BLOCK_N columns at a time."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]; * stride can pass 2**31
    in_rows = rows < M
    x_rows, y8_rows = x_ptr + rows[:, None] * stride_xm, y8_ptr + rows[:, None] * stride_y8m

    sum_sq, largest = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for block in range(BLOCKS_N):
        cols = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask = in_rows[:, None] & (cols < N)[None, :]
        x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)  # [BLOCK_N]
        sum_sq += tl.sum(x * x, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(x * weight[None, :]), axis=1))
    rstd = tl.rsqrt(sum_sq / N + fp32(eps))
    scale, inverse = row_scale(largest * rstd)

    for block in range(BLOCKS_N):
        cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = in_rows[:, None] & (cols < N)[None, :]
        x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        y = x * rstd[:, None] * weight[None, :]
        tl.store(y8_rows + cols[None, :], (y * inverse[:, None]).to(y8_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)  # after the walk, as in fp8_rows.py
    tl.store(scale_ptr + rows, scale, mask=in_rows)


@triton.jit
def _sum_kernel(
    x_ptr, z_ptr, factor_ptr, weight_ptr, h_ptr, y8_ptr, scale_ptr, rstd_ptr,
    M, N, stride_xm, stride_zm, stride_hm, stride_y8m, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_M rows of h and of y8, each as a whole: BLOCKS_N is 1."""
    tl.static_assert(BLOCKS_N == 1)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]; * stride can pass 2**31
    cols = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_rows = rows < M
    mask = in_rows[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    z = tl.load(z_ptr + rows[:, None] * stride_zm + cols[None, :], mask=mask, other=0.0)
    factor = tl.load(factor_ptr + rows, mask=in_rows, other=0.0)  # [BLOCK_M]
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)  # [BLOCK_N]
    h = tl.fma(z.to(tl.float32), factor[:, None], x.to(tl.float32)).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + rows[:, None] * stride_hm + cols[None, :], h, mask=mask)
    h = h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, axis=1) / N + fp32(eps))
    scale, inverse = row_scale(tl.max(tl.abs(h * weight[None, :]), axis=1) * rstd)
    y = h * rstd[:, None] * weight[None, :]
    y8 = (y * inverse[:, None]).to(y8_ptr.dtype.element_ty)
    tl.store(y8_ptr + rows[:, None] * stride_y8m + cols[None, :], y8, mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)
    tl.store(scale_ptr + rows, scale, mask=in_rows)


def launch(x, weight, eps: float, y8, scale, rstd, z=None, factor=None, h=None, **tiling) -> None:
    """Write y8 [M, N], scale and rstd [M] (fp32), given x [M, N]. Rows may be any stride apart.

    Given z [M, N] and factor [M] (fp32), those of h = x + z * factor instead, and h [M, N] too, which may be x or z
    itself; for rows that fit one block (N <= rms_norm.MAX_BLOCK_N), else raises ValueError. `tiling` overrides those of
    `row_tiling`. Raises NotImplementedError where there is no FP8.
    """
    check_fp8("rms_norm_fp8", x.device)
    M, N = x.shape
    if M == 0:
        return
    tiling = row_tiling(N) | tiling
    grid = (-(-M // tiling["BLOCK_M"]),)
    if z is not None and tiling["BLOCKS_N"] > 1:
        raise ValueError(f"rms_norm_fp8 sums rows of {MAX_BLOCK_N} numbers at most, and these have {N}")
    with device_of(x):
        if z is None:
            _norm_kernel[grid](
                x, weight, y8, scale, rstd, M, N, x.stride(0), y8.stride(0), eps, enable_fp_fusion=False, **tiling
            )
        else:
            _sum_kernel[grid](
                x, z, factor, weight, h, y8, scale, rstd, M, N, x.stride(0), z.stride(0), h.stride(0), y8.stride(0),
                eps, enable_fp_fusion=False, **tiling,
            )  # fmt: skip


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    M, empty = 8192, functools.partial(torch.empty, device="meta")  # 4 sequences of 2,048 tokens
    found = {  # Mistral-7B and Llama-2-7B; Llama-2-13B
        f"norm {M}x{N}": functools.partial(
            launch, empty(M, N, dtype=dtype), empty(N, dtype=dtype), 1e-6, empty(M, N, dtype=FP8), empty(M), empty(M)
        )
        for N in (4096, 5120)
    }
    for N in (4096, 5120):
        dy, x, weight = empty(M, N, dtype=dtype), empty(M, N, dtype=dtype), empty(N, dtype=dtype)
        found[f"sum and norm {M}x{N}"] = functools.partial(
            launch, x, weight, 1e-6, empty(M, N, dtype=FP8), empty(M), empty(M), z=dy, factor=empty(M), h=dy
        )
        found[f"backward {M}x{N}"] = functools.partial(
            rms_norm.launch_backward, dy, x, weight, empty(M), dy, False, x, empty(M),
            dx8=empty(M, N, dtype=FP8), scale=empty(M),
        )  # fmt: skip
    return found
