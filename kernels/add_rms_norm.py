"""Residual add and RMSNorm in one pass: what a transformer does at every step from one half of a layer to the next.

Forward, for a row x of N numbers, the output of attention or of the MLP, and the residual stream's row:

    h    = x + residual                     the residual stream from here on
    rstd = 1 / sqrt(mean(h²) + eps)
    y    = weight * h * rstd                RMSNorm of h, what the next half reads

Apart, the add reads two tensors and writes h, and the norm reads h again and writes y. Here h is read once, from
registers: four tensors move instead of five.

Backward. h reaches the loss twice, through y and through the residual stream. With dy = ∂L/∂y, and dresidual_out for
∂L/∂h by way of the stream alone,

    dh = dresidual_out + (what RMSNorm's backward makes of dy; derived in rms_norm.py)

and because h = x + residual, dh is the gradient of x and of residual alike: one tensor, written once. Apart, the norm's
backward writes its part, and an add reads that and dresidual_out again: four tensors move instead of six. The kernel is
rms_norm.py's own, which adds dresidual_out, if there is one, before it rounds.

Saved for the backward: h (an output, no copy), weight and rstd, 4 bytes a row. Neither x nor residual is needed again.

Casts: x + residual is rounded once to their dtype, because h lives on in it; y is computed from the h that was rounded,
as Hugging Face's models do and as the backward will see it. All else is fp32, rounded once when it is stored.
"""

import functools
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from fastkit.kernels import rms_norm
from fastkit.kernels.common import Cost, as_rows, check_floats, device_of, fp32, on_triton, tl, triton


def cost(M: int, N: int, dtype=torch.bfloat16, weight_grad: bool = False) -> tuple[Cost, Cost]:
    """The least work for M rows of N numbers, all of `dtype`: (forward, backward)."""
    forward, backward = rms_norm.cost(M, N, dtype, weight_grad)
    tensor_bytes = M * N * dtype.itemsize
    return (
        Cost(forward.bytes_moved + 2 * tensor_bytes, forward.flops + M * N),  # read residual too, write h too
        Cost(backward.bytes_moved + tensor_bytes, backward.flops + M * N),  # read dresidual_out too
    )


def reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, with the same casts, differentiated by autograd. fp64 stays fp64: the tests' truth."""
    h = x + residual
    return rms_norm.reference(h, weight, eps), h


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr,
    M, N, stride_xm, stride_residualm, stride_ym, stride_hm, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_N columns of BLOCK_M rows of h and of y, as RMSNorm's does with those of y."""
    tile, block = tl.program_id(0) // BLOCKS_N, tl.program_id(0) % BLOCKS_N
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]; rows * stride can pass 2**31
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_rows, in_cols = rows < M, cols < N
    mask = in_rows[:, None] & in_cols[None, :]
    x_rows = x_ptr + rows[:, None] * stride_xm
    residual_rows = residual_ptr + rows[:, None] * stride_residualm

    h = _add(x_rows, residual_rows, cols, mask)  # [BLOCK_M, BLOCK_N]
    tl.store(h_ptr + rows[:, None] * stride_hm + cols[None, :], h, mask=mask)
    h = h.to(tl.float32)
    sum_sq = tl.sum(h * h, axis=1)  # [BLOCK_M]; masked lanes add 0
    for step in range(1, BLOCKS_N):  # the rest of a long row; compiled away when the row fits the block
        far_cols = (block + step) % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
        far_h = _add(x_rows, residual_rows, far_cols, in_rows[:, None] & (far_cols < N)[None, :]).to(tl.float32)
        sum_sq += tl.sum(far_h * far_h, axis=1)
    rstd = tl.rsqrt(sum_sq / N + fp32(eps))
    tl.store(rstd_ptr + rows, rstd, mask=in_rows & (block == 0))  # one writer a row

    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)  # [BLOCK_N]
    y = h * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + rows[:, None] * stride_ym + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add(x_rows, residual_rows, cols, mask):
    """Some columns of x + residual, rounded to their dtype: [BLOCK_M, BLOCK_N], 0 where masked."""
    x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0)
    residual = tl.load(residual_rows + cols[None, :], mask=mask, other=0.0)
    return (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)


def launch_forward(x, residual, weight, eps: float, y, h, rstd, **tiling) -> None:
    """Write y and h [M, N], and rstd [M] (fp32), given x and residual [M, N]. Rows may be any stride apart.

    As long as a row fits one block (N <= rms_norm.MAX_BLOCK_N), h and y may each be x or residual itself, which saves
    buffers. `tiling` overrides BLOCK_M and num_warps.
    """
    M, N = x.shape
    if M == 0:
        return
    tiling = rms_norm.row_tiling(N) | tiling
    grid = (-(-M // tiling["BLOCK_M"]) * tiling["BLOCKS_N"],)
    with device_of(x):
        _forward_kernel[grid](
            x, residual, weight, y, h, rstd,
            M, N, x.stride(0), residual.stride(0), y.stride(0), h.stride(0), eps, enable_fp_fusion=False, **tiling,
        )  # fmt: skip


def launch_backward(dy, dresidual_out, h, weight, rstd, dh, weight_grad: bool, **tiling) -> torch.Tensor | None:
    """Write dh [M, N], the gradient of x and of residual; return dweight [N] if `weight_grad`, else None.

    dh may be dy or dresidual_out itself, as long as a row fits one block. `tiling` as in rms_norm.launch_backward.
    """
    return rms_norm.launch_backward(dy, h, weight, rstd, dh, weight_grad, dresidual_out, **tiling)


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    M, found = 8192, {}  # 4 sequences of 2,048 tokens
    for N in (4096, 5120):  # Mistral-7B and Llama-2-7B; Llama-2-13B, whose rows take the longest block
        x, residual, y, h = (torch.empty(M, N, dtype=dtype, device="meta") for _ in range(4))
        weight, rstd = torch.empty(N, dtype=dtype, device="meta"), torch.empty(M, device="meta")
        backward = functools.partial(launch_backward, y, residual, h, weight, rstd, x)
        found[f"forward {M}x{N}"] = functools.partial(launch_forward, x, residual, weight, 1e-6, y, h, rstd)
        found[f"backward {M}x{N}"] = functools.partial(backward, weight_grad=False)
        found[f"backward with dweight {M}x{N}"] = functools.partial(backward, weight_grad=True)
    return found


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        ctx.set_materialize_grads(False)  # an output that nothing used has no gradient, not one of zeros to be read
        weight = weight.contiguous()
        rows = as_rows(x)
        y, h = x.new_empty(x.shape), x.new_empty(x.shape)
        rstd = x.new_empty(rows.shape[0], dtype=torch.float32)
        launch_forward(rows, as_rows(residual), weight, eps, as_rows(y), as_rows(h), rstd)
        ctx.save_for_backward(h, weight, rstd)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dresidual_out):
        if dy is None:
            return dresidual_out, dresidual_out, None, None
        h, weight, rstd = ctx.saved_tensors
        dh = h.new_empty(h.shape)
        dresidual_out = None if dresidual_out is None else as_rows(dresidual_out)
        weight_grad = ctx.needs_input_grad[2]
        dweight = launch_backward(as_rows(dy), dresidual_out, as_rows(h), weight, rstd, as_rows(dh), weight_grad)
        return dh, dh, dweight, None


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of x + residual over the last dimension, x + residual); see `rms_norm` (arXiv:1910.07467).

    x, residual  [..., N], the same shape, dtype (float32, float16 or bfloat16) and device, 1 <= N <= 65536. Contiguous
                 tensors and column slices of them are read in place, other layouts copied first. Zero rows are fine.
    weight       [N], float32, float16 or bfloat16, not necessarily x's dtype. No work is done for its gradient unless
                 it requires one.
    returns      (y, h), each [..., N], contiguous, in x's dtype. h = x + residual is rounded to that dtype once, and y,
                 its norm, once more; in between arithmetic is fp32; so under autocast.

    Differentiable once, in x, residual and weight. Raises TypeError for another dtype or two different ones, ValueError
    for shapes or devices that do not match or rows too long, NotImplementedError for a device without kernels. CPU
    tensors take `reference` (see `on_triton`).
    """
    check_floats("add_rms_norm", x=x, residual=residual, weight=weight)
    rms_norm.check_rows("add_rms_norm", x, weight)
    if residual.shape != x.shape:
        raise ValueError(
            f"add_rms_norm: residual has shape {tuple(residual.shape)} but x has {tuple(x.shape)}; make them the same"
        )
    if residual.dtype != x.dtype:
        raise TypeError(
            f"add_rms_norm: residual has dtype {residual.dtype} but x has {x.dtype}; convert one to the other's"
        )
    if not on_triton("add_rms_norm", "x", x):
        return reference(x, residual, weight, eps)
    return _AddRMSNorm.apply(x, residual, weight, float(eps))
