"""The products of a Group in FP8 (e4m3), at twice the rate: of frozen 4-bit weights with their adapters merged in.

Forward, with x8 [M, K] and its scale a row sx [M] (`kernels/fp8_rows.py`), and W8 [N, K] with sw [N], written straight
from 4 bits (`kernels/merged_dequantize.py`):

    y  = (x8 @ W8.T) * sx[:, None] * sw[None, :] + bias

A scale can be taken out of a sum that does not run along it. dx = dy @ W sums over the rows of W, where sw lies, so the
backward writes the weight anew: V8 [K, N] is W.T, with a scale sv [K] for each of its rows, and

    dx = (dy8 @ V8.T) * sdy[:, None] * sv[None, :]

is the same product again. Weights below each other in W have rows of their own. In V they lie side by side, and a row,
which runs through all of them, has the largest of their scales.

Where a kernel holds a row it writes that in FP8 itself: the norm, SwiGLU and its backward. The attention's output, its
gradients in q, k and v, and those of both halves' outputs take a pass of their own.

The adapters' gradients come of x and dy in the compute dtype, as in `projection.py`; so do norms and attention.

Casts: factors have 4 significant bits; sums are the tensor cores', which Hopper keeps to some 14 bits; y and dx are
rounded once, to bfloat16. On a CPU the same numbers are multiplied in fp32, for tests and trials.
"""

import functools

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from fastkit.errors import FastkitError
from fastkit.kernels.fp8_scale import FP8, merged_scale
from fastkit.models import pieces
from fastkit.models.pieces import FP8Rows
from fastkit.models.projection import Group, Projection
from fastkit.ops import NF4Weight, merged_dequantize_fp8, weight_bounds

_bounds = WeakTensorKeyDictionary()  # by absmax: FSDP2 has the weight itself in another place each time


def bounds(weight: NF4Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight_bounds`, computed once a weight."""
    if weight.absmax not in _bounds:
        _bounds[weight.absmax] = weight_bounds(weight)
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

    def __init__(self, projections: list[Projection], dtype: torch.dtype):
        super().__init__(projections, dtype)
        self.factors = FP8
        for projection in projections:
            if why := lacking(projection):
                raise FastkitError(f'compute="fp8": {why}')
        if dtype != torch.bfloat16 and projections[0].weight.device.type == "cuda":
            raise FastkitError(f'compute="fp8" gives bfloat16, and the model computes in {dtype}: use bfloat16')

    def forward(self, x: FP8Rows | torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = self._product(x, *self.weight_fp8(transposed=False), self._bias())
        if residual is None:
            return y
        return y.add_(residual) if residual.dtype == y.dtype else residual + y

    def input_gradient(self, dy: FP8Rows | torch.Tensor) -> torch.Tensor:
        return self._product(dy, *self.weight_fp8(transposed=True), None)

    def weight_fp8(self, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(W8 [N, K], sw [N]), or (V8 [K, N], sv [K]) if `transposed`."""
        if len(self.projections) == 1:
            return _merged(self.projections[0], transposed)
        N, (first, *_) = sum(self.sizes), (p.weight for p in self.projections)
        shape = (first.shape[1], N) if transposed else (N, first.shape[1])
        w8 = torch.empty(shape, dtype=FP8, device=first.device)
        parts = zip(self.projections, w8.split(self.sizes, int(transposed)), strict=True)
        if not transposed:
            return w8, torch.cat([_merged(projection, False, out=part)[1] for projection, part in parts])
        scale = torch.stack([_scale(projection, True) for projection in self.projections]).amax(0)
        for projection, part in parts:
            _merged(projection, True, scale, part)
        return w8, scale

    def _product(self, x: FP8Rows | torch.Tensor, w8, scale, bias: torch.Tensor | None) -> torch.Tensor:
        """x @ (w8 * scale[:, None]).T + bias [M, rows of w8], a new tensor of the compute dtype."""
        x8, x_scale = x if isinstance(x, FP8Rows) else pieces.quantized(x)
        if x8.device.type == "cuda":
            return torch._scaled_mm(
                x8, w8.T, x_scale[:, None], scale[None, :], bias=bias, out_dtype=self.dtype, use_fast_accum=True
            )
        y = (x8.float() * x_scale[:, None]) @ (w8.float() * scale[:, None]).T
        return (y if bias is None else y + bias).to(self.dtype)


def _merged(projection: Projection, transposed: bool, scale=None, out=None) -> tuple[torch.Tensor, torch.Tensor]:
    bound = bounds(projection.weight)[transposed] if scale is None else None
    return merged_dequantize_fp8(
        projection.weight, bound, *projection.stacked(), transposed=transposed, scale=scale, out=out
    )


def _scale(projection: Projection, transposed: bool) -> torch.Tensor:
    return merged_scale(bounds(projection.weight)[transposed], *projection.stacked(), transposed=transposed)


GROUPS = {"auto": Group, "fp8": FP8Group}  # by what `patch` calls compute
