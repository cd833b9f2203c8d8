"""The products of a Group in FP8 (e4m3), at twice the rate: of frozen 4-bit weights with their adapters merged in.

Forward, with x8 [M, K] and its scale a row sx [M] (`kernels/fp8_rows.py`), and W8 [N, K] with one scale sw for all of
it, written straight from 4 bits (`kernels/merged_dequantize.py`, `shared_scale`):

    y  = (x8 @ W8.T) * sx[:, None] * sw + bias

dx = dy @ W sums over the rows of W, and FP8 tensor cores want both factors with neighbours along the sum. So the
backward writes the weight anew, as V8 [K, N] = W8.T, of the same scale:

    dx = (dy8 @ V8.T) * sdy[:, None] * sw

Weights below each other in W lie side by side in V.

Where W has more rows than columns, the product itself is scaled by both: cuBLAS does that on sm_90 from 12.9 on, and is
faster then (8192x28672x4096, H200: 1.45 ms and 1.52; a step of Mistral-7B 344 and 347). Elsewhere by sw alone, which is
faster on long sums (8192x4096x28672: 1.44 and 1.47). There sx waits for whoever reads y: the norms' backward multiplies
by it as it reads, and where a residual is added, so does that pass; the gradient of attention's output, with no such
reader, is scaled by cuBLAS as well. On other cards SwiGLU, its backward and RoPE, which takes v too, multiply too, and
what nobody does takes a pass, in place: with a scale a row torch has CUTLASS's kernel, slower on long sums
(pytorch/pytorch issue 153809), or none (192707: sm_120).

Where a kernel holds a row it writes that in FP8 itself: the norm, which adds the residual to what it reads in the same
pass, SwiGLU, and the backward of both; that of the norm for the half that gets the gradient, beside it (`half.py`); and
RoPE's backward (`kernels/rope_fp8.py`), unless it works in place, which our attention leaves it to do, or norms come
after it. The attention's output and the gradient that the last layer gets take a pass of their own.

The adapters' gradients come of x and dy in the compute dtype, as in `projection.py`; so do norms and attention.

Casts: factors have 4 significant bits; sums are the tensor cores', which Hopper keeps to some 14 bits; y and dx are
rounded once, to bfloat16. On a CPU the same numbers are multiplied in fp32, for tests and trials.
"""

import functools

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from fastkit.errors import FastkitError
from fastkit.kernels.fp8_scale import FP8
from fastkit.kernels.nf4 import reference_absmax
from fastkit.models import pieces
from fastkit.models.pieces import FP8Rows, Unscaled
from fastkit.models.projection import Copies, Group, Projection
from fastkit.ops import NF4Weight, merged_dequantize_fp8, shared_scale

_bounds = WeakTensorKeyDictionary()  # by absmax: FSDP2 has the weight itself in another place each time


def bound(weight: NF4Weight) -> float:
    """The largest absmax, in magnitude: no number of the weight is larger. Found once a weight, which waits for it."""
    if weight.absmax not in _bounds:
        _bounds[weight.absmax] = reference_absmax(weight).abs().max().item()
    return _bounds[weight.absmax]


def lacking(projection: Projection) -> str:
    """Why its products cannot run in FP8, and what to do; "" if they can."""
    weight, dropout = projection.weight, max((adapter.dropout for adapter in projection.adapters), default=0.0)
    if not isinstance(weight, NF4Weight):
        return "its weight is not in 4 bits, and no other is written in FP8: load the model quantized"
    if any(size % 16 for size in weight.shape):
        return f"its weight is {list(weight.shape)}, and products in FP8 need multiples of 16: leave compute out"
    if dropout:
        return f"LoRA dropout {dropout} keeps the adapter out of the weight: set it to 0, or leave compute out"
    return _lacking_card(weight.device)


@functools.cache
def _lacking_card(device: torch.device) -> str:
    if device.type != "cuda" or (not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)):
        return ""
    return (
        f"{torch.cuda.get_device_name(device)} has no FP8 tensor cores, as sm_89 (RTX 40) and newer: leave compute out"
    )


class FP8Group(Group):
    """A Group whose `forward` and `input_gradient` multiply in FP8: they take FP8Rows, or quantize what is none.

    Raises FastkitError for a projection that has something `lacking`, and on a GPU for another dtype than bfloat16.
    """

    def __init__(self, projections: list[Projection], dtype: torch.dtype, copies: Copies | None = None):
        super().__init__(projections, dtype, copies)
        self.factors, self.scale = FP8, None
        for projection in projections:
            if why := lacking(projection):
                raise FastkitError(f'compute="fp8": {why}')
        if dtype != torch.bfloat16 and projections[0].weight.device.type == "cuda":
            raise FastkitError(f'compute="fp8" gives bfloat16, and the model computes in {dtype}: use bfloat16')

    def weight_both_ways(self) -> None:
        """W8 and V8 are two."""

    def forward(
        self, x: FP8Rows | torch.Tensor, residual: torch.Tensor | None = None, W: None = None, unscaled: bool = False
    ) -> torch.Tensor | Unscaled:
        bias = self._bias()
        if residual is not None and bias is None:
            return self.unscaled(x).scaled(residual)
        y = self._product(x, *self.weight_fp8(transposed=False), unscaled and bias is None)
        if bias is None:
            return y
        y.add_(bias)
        return y if residual is None else (residual + y).to(residual.dtype)

    def unscaled(self, x: FP8Rows | torch.Tensor) -> Unscaled:
        """`forward` without a bias, to be multiplied by the scales of x's rows."""
        return self._unscaled_product(x, *self.weight_fp8(transposed=False))

    def input_gradient(
        self, dy: FP8Rows | torch.Tensor, W: None = None, unscaled: bool = False
    ) -> torch.Tensor | Unscaled:
        return self._product(dy, *self.weight_fp8(transposed=True), unscaled)

    def weight_fp8(self, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(W8 [N, K], its scale [N]), or (V8 [K, N], its scale [K]) if `transposed`; all scales are the same."""
        N, (first, *_) = sum(self.sizes), (p.weight for p in self.projections)
        rows, columns = (first.shape[1], N) if transposed else (N, first.shape[1])
        w8 = torch.empty(rows, columns, dtype=FP8, device=first.device)
        if self.scale is None:
            self.scale = self._shared_scale(max(rows, columns))
        for projection, part in zip(self.projections, w8.split(self.sizes, int(transposed)), strict=True):
            scale, inverse = (each[: len(part)] for each in self.scale)
            merged_dequantize_fp8(
                projection.weight, None, *projection.stacked(), transposed=transposed,
                scale=scale, inverse=inverse, out=part,
            )  # fmt: skip
        return w8, self.scale[0][:rows]

    def _shared_scale(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale of all weights with their adapters, and its inverse, `rows` times each."""
        gain = max(sum(abs(a.scaling) * len(a.A) for a in p.adapters) for p in self.projections)
        return shared_scale(max(bound(p.weight) for p in self.projections), *self.adapters_flat(), gain, rows)

    def _product(
        self, x: FP8Rows | torch.Tensor, w8: torch.Tensor, scale: torch.Tensor, unscaled: bool
    ) -> torch.Tensor | Unscaled:
        """x @ (w8 * scale).T [M, rows of w8], a new tensor of the compute dtype; Unscaled where allowed and faster."""
        short = w8.shape[0] > w8.shape[1]
        if _scales_rows(w8.device) and (short or not unscaled):
            x8, x_scale = _in_fp8(x)
            scales = x_scale[:, None], scale[None, :]
            return torch._scaled_mm(x8, w8.T, *scales, out_dtype=self.dtype, use_fast_accum=True)
        y = self._unscaled_product(x, w8, scale)
        return y if unscaled else y.scaled()

    def _unscaled_product(self, x: FP8Rows | torch.Tensor, w8: torch.Tensor, scale: torch.Tensor) -> Unscaled:
        x8, x_scale = _in_fp8(x)
        if x8.device.type == "cpu":
            return Unscaled((x8.float() @ (w8.float() * scale[0]).T).to(self.dtype), x_scale)
        y = torch._scaled_mm(x8, w8.T, _one(x8.device), scale[0], out_dtype=self.dtype, use_fast_accum=True)
        return Unscaled(y, x_scale)


def _in_fp8(x: FP8Rows | torch.Tensor) -> FP8Rows:
    return x if isinstance(x, FP8Rows) else pieces.quantized(x)


@functools.cache
def _scales_rows(device: torch.device) -> bool:
    """Whether cuBLAS multiplies by a scale a row, and by one a column, as it writes."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return tuple(int(part) for part in torch.version.cuda.split(".")[:2]) >= (12, 9)


@functools.cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device)


GROUPS = {"auto": Group, "fp8": FP8Group}  # by what `patch` calls compute
