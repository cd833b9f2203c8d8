"""The elementwise pieces of a decoder layer, each forward and backward, without autograd; attention is `attend.py`'s.

Each runs the launchers of its kernel file where `on_triton` says so, and otherwise that file's torch reference, in
fp32; its backward then differentiates the reference. The maths stands in the kernel files.

What a product takes is written in the dtype of its factors: a tensor or, in e4m3, FP8Rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fastkit.kernels import fp8_rows, rms_norm, rms_norm_fp8, rope, rope_fp8, swiglu, swiglu_fp8
from fastkit.kernels.common import as_rows, on_triton
from fastkit.kernels.fp8_rows import on_fp8_kernels
from fastkit.kernels.fp8_scale import FP8
from fastkit.ops import quantize_rows_fp8


class Norm(NamedTuple):
    """An RMSNorm's weight [N] and epsilon."""

    weight: torch.Tensor
    eps: float


class Normed(NamedTuple):
    """The output of a norm [M, N] as what it read, x, and gave, rstd [M]: for those that can do without it."""

    x: torch.Tensor
    norm: Norm
    rstd: torch.Tensor

    def computed(self, dtype: torch.dtype) -> torch.Tensor:
        return norm(self.x, self.norm, dtype)[0]


class FP8Rows(NamedTuple):
    """Rows in e4m3 [M, N], each to be multiplied by its scale [M], in fp32."""

    numbers: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def empty(cls, M: int, N: int, device: torch.device) -> "FP8Rows":
        return cls(torch.empty(M, N, dtype=FP8, device=device), torch.empty(M, dtype=torch.float32, device=device))


class Unscaled(NamedTuple):
    """A result of FP8Rows whose rows [M, N] are yet to be multiplied by theirs: scale [M], in fp32."""

    numbers: torch.Tensor
    scale: torch.Tensor

    def scaled(self, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The rows multiplied, in place; or residual + them, in a new tensor of its dtype."""
        if on_fp8_kernels("scaled_rows", self.numbers):
            y = self.numbers if residual is None else torch.empty_like(residual)
            fp8_rows.launch_scaled(self.numbers, self.scale, residual, y)
            return y
        y = self.numbers.float() * self.scale[:, None]
        return y.to(self.numbers.dtype) if residual is None else (residual + y).to(residual.dtype)


def apart(x: torch.Tensor | Unscaled) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the numbers, what their rows are yet to be multiplied by, None if by nothing)."""
    return x if isinstance(x, Unscaled) else (x, None)


def joined(x: torch.Tensor | None, scale: torch.Tensor | None) -> torch.Tensor | Unscaled | None:
    """What was taken `apart`."""
    return x if scale is None else Unscaled(x, scale)


def quantized(x: torch.Tensor) -> FP8Rows:
    """x [M, N] in FP8."""
    return FP8Rows(*quantize_rows_fp8(x))


def differentiated(function: Callable, inputs: list, douts: torch.Tensor | tuple) -> tuple[torch.Tensor, ...]:
    """The gradients of function(*inputs) in its inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return torch.autograd.grad(function(*inputs), inputs, douts)


# --- RMSNorm


def norm(x: torch.Tensor, weight: Norm, dtype: torch.dtype) -> tuple[torch.Tensor | FP8Rows, torch.Tensor]:
    """(y [..., N] in `dtype`, contiguous; rstd [rows] in fp32) of x [..., N], for FP8 [M, N]."""
    if dtype == FP8:
        return _norm_fp8(x, weight)
    if on_triton("rms_norm", "x", x):
        rows = as_rows(x)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        rstd = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        rms_norm.launch_forward(rows, weight.weight, weight.eps, as_rows(y), rstd)
        return y, rstd
    rows = x.float()
    rstd = torch.rsqrt(rows.square().mean(-1) + weight.eps).flatten()
    return rms_norm.reference(rows, weight.weight, weight.eps).to(dtype), rstd


def _norm_fp8(x: torch.Tensor, weight: Norm) -> tuple[FP8Rows, torch.Tensor]:
    if not on_fp8_kernels("rms_norm_fp8", x):
        y, rstd = norm(x, weight, torch.float32)
        return quantized(y), rstd
    rows, y = as_rows(x), FP8Rows.empty(*x.shape, x.device)
    rstd = torch.empty_like(y.scale)
    rms_norm_fp8.launch(rows, weight.weight, weight.eps, *y, rstd)
    return y, rstd


def norm_of_sum(y: Unscaled, residual: torch.Tensor, weight: Norm) -> tuple[torch.Tensor, FP8Rows, torch.Tensor]:
    """(h = y.scaled(residual) [M, N], its norm in FP8, rstd [M]), in one pass where a row fits one block.

    Overwrites y, if h fits it.
    """
    numbers = y.numbers
    if not on_fp8_kernels("rms_norm_fp8", numbers) or numbers.shape[1] > rms_norm.MAX_BLOCK_N:
        h = y.scaled(residual)
        return h, *norm(h, weight, FP8)
    h = numbers if numbers.dtype == residual.dtype else torch.empty_like(numbers, dtype=residual.dtype)
    n = FP8Rows.empty(*h.shape, h.device)
    rstd = torch.empty_like(n.scale)
    rms_norm_fp8.launch(as_rows(residual), weight.weight, weight.eps, *n, rstd, *y, h)
    return h, n, rstd


def norm_backward(
    dy: torch.Tensor | Unscaled, x: torch.Tensor, weight: Norm, rstd: torch.Tensor,
    dresidual: torch.Tensor | None = None, weight_grad: bool = False, dx8: "FP8Rows | None" = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(dx in x's dtype, with dresidual added; dweight or None). Overwrites dy [..., N], contiguous, if dx fits it.

    dx8, if given, is dx in FP8, written too: for rows of rms_norm.MAX_BLOCK_N at most.
    """
    if dx8 is not None and not on_fp8_kernels("rms_norm", x):
        dx, dweight = norm_backward(dy, x, weight, rstd, dresidual, weight_grad)
        for out, written in zip(dx8, quantized(as_rows(dx)), strict=True):
            out.copy_(written)
        return dx, dweight
    dy, factor = apart(dy)
    if on_triton("rms_norm", "x", x):
        fits = dy.dtype == x.dtype and x.shape[-1] <= rms_norm.MAX_BLOCK_N
        dx = dy if fits else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        residual = None if dresidual is None else as_rows(dresidual)
        return dx, rms_norm.launch_backward(
            as_rows(dy), as_rows(x), weight.weight, rstd, as_rows(dx), weight_grad, residual, factor,
            **({} if dx8 is None else {"dx8": dx8.numbers, "scale": dx8.scale}),
        )  # fmt: skip
    dy = dy.float() if factor is None else dy.float() * factor[:, None]
    dx, dweight = differentiated(
        lambda x, w: rms_norm.reference(x, w, weight.eps), [x.float(), weight.weight.float()], dy
    )
    dx = dx if dresidual is None else dx + dresidual.float()
    return dx.to(x.dtype), dweight.to(weight.weight.dtype) if weight_grad else None


# --- RoPE


def rotate_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False,
    into: tuple[torch.Tensor, ...] | None = None, scale: torch.Tensor | None = None, v: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Turn q [B, H, T, D] and k [B, H_k, T, D] by cos and sin [B or 1, T, R], or back by them.

    Back is also the backward: of dq and dk. scale [B T], if given, is what the tokens of q, k and v are yet to be
    multiplied by. v, if given, goes with them and is not turned. In place, or `into` others; v and its other strided as
    k and its.
    """
    into = into or (q, k, v)
    if on_triton("rope", "q", q):
        beside = {} if v is None else {"v": v, "v_out": into[2]}
        rope.launch(q, k, cos, sin, *into[:2], inverse=inverse, scale=scale, **beside)
        return
    if scale is not None:
        scale = scale.view(q.shape[0], 1, -1, 1)
        q, k, v = (x if x is None else x.float() * scale for x in (q, k, v))
    found = rope.reference(q, k, cos, -sin if inverse else sin)
    for x, made in zip(into, found if v is None else (*found, v), strict=False):
        x.copy_(made)


def turned_back_fp8(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dqkv: torch.Tensor
) -> FP8Rows:
    """dqkv [M, N] in FP8, written both ways: dq and dk turned back, and dv, side by side."""
    dqkv8 = FP8Rows.empty(*dqkv.shape, dqkv.device)
    rope_fp8.launch(dq, dk, dv, cos, sin, dqkv, *dqkv8)
    return dqkv8


# --- SwiGLU


def gated(gate_up: torch.Tensor | Unscaled, dtype: torch.dtype) -> torch.Tensor | FP8Rows:
    """silu(gate) * up [M, N], of gate_up [M, 2 N]; dtype: gate_up's, or FP8. Only to FP8 gate_up may be Unscaled."""
    if dtype == FP8:
        return _gated_fp8(gate_up)
    gate, up = gate_up.chunk(2, 1)
    if not on_triton("swiglu", "gate", gate):
        return swiglu.reference(gate, up)
    a = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    swiglu.launch_forward(gate, up, a)
    return a


def gated_backward_(da: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """dgate and dup [M, 2 N], given da [M, N], written over gate_up; and silu(gate) * up, written over da."""
    gate, up = gate_up.chunk(2, 1)
    if on_triton("swiglu", "gate", gate):
        swiglu.launch_backward(da, gate, up, gate, up, da)
    else:
        a, dgate_up = swiglu.reference(gate, up), differentiated(swiglu.reference, [gate, up], da)
        for x, written in zip((gate, up, da), (*dgate_up, a), strict=True):
            x.copy_(written)
    return gate_up


def gated_backward_as_(
    da: torch.Tensor | Unscaled, gate_up: torch.Tensor | Unscaled, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | FP8Rows, torch.Tensor]:
    """(dgate and dup [M, 2 N], the same in `dtype`, silu(gate) * up [M, N]): dtype is gate_up's, or FP8.

    Overwrites da and gate_up, which only for FP8 may be Unscaled.
    """
    if dtype != FP8:
        return (gated_backward_(da, gate_up),) * 2 + (da,)
    if not on_fp8_kernels("swiglu_fp8", apart(da)[0]):
        da, gate_up = (x.scaled() if isinstance(x, Unscaled) else x for x in (da, gate_up))
        dgate_up = gated_backward_(da, gate_up)
        return dgate_up, quantized(dgate_up), da
    (da, da_factor), (gate_up, factor) = apart(da), apart(gate_up)
    gate, up = gate_up.chunk(2, 1)
    scale, a = torch.empty(len(gate), dtype=torch.float32, device=gate.device), torch.empty_like(da)
    d8 = swiglu_fp8.launch_backward(da, gate, up, scale, a, da_factor, factor)
    return gate_up, FP8Rows(d8, scale), a


def _gated_fp8(gate_up: torch.Tensor | Unscaled) -> FP8Rows:
    gate_up, factor = apart(gate_up)
    gate, up = gate_up.chunk(2, 1)
    if not on_fp8_kernels("swiglu_fp8", gate):
        gate, up = (x if factor is None else x.float() * factor[:, None] for x in (gate, up))
        return FP8Rows(*swiglu_fp8.reference(gate, up))
    a = FP8Rows.empty(*gate.shape, gate.device)
    swiglu_fp8.launch_forward(gate, up, *a, factor)
    return a
