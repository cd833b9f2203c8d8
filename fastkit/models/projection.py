"""Linear layers that share an input, with their LoRA adapters (arXiv:2106.09685), as one product each way.

Forward, for layers i of one input x [M, K], with W_i [N_i, K], A_i [r_i, K], B_i [N_i, r_i]:

    y_i = x @ W_i.T + bias_i + scaling_i * (x @ A_i.T) @ B_i.T  =  x @ (W_i + scaling_i * B_i @ A_i).T + bias_i

The bracket is the merged weight, which `ops.merged_dequantize` writes from the 4-bit one in a single pass. With those
of all layers below each other in one buffer W [N, K], N = sum of N_i, and y = [y_1 ... y_n] [M, N]:

    y  = x @ W.T + bias

Backward, given dy = ∂L/∂y. The same W serves, and the adapters' gradients are those of `kernels/lora.py`:

    dx   = dy @ W
    dA_i = scaling_i * (dy_i @ B_i).T @ x           dB_i = scaling_i * dy_i.T @ (x @ A_i.T)

W is written for each use and freed after it: to keep it would be to keep the model in 16 bits.

Dropout acts on the adapter's input alone, so that no one weight does both. Then it is two products a layer, with
z_i = x * mask_i / (1 - p), where mask_i is drawn anew from its own seed wherever it is needed, and never kept:

    y_i += scaling_i * (z_i @ A_i.T) @ B_i.T        dx += scaling_i * (dy_i @ B_i) @ A_i * mask_i / (1 - p)

and z_i for x in dA_i and dB_i.

Casts: W, x, y and dx have the compute dtype. Adapters in fp32 are rounded to it where it has 16 bits, once a pass, as
autocast does with peft's; 4-bit weights are merged in fp32 and rounded once. dA and dB have the dtype of the adapters.
"""

import sys
import weakref
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from fastkit.kernels import gated_product
from fastkit.kernels.merged_dequantize import MAX_RANK
from fastkit.models.bnb import bnb
from fastkit.ops import NF4Weight, lora_gradients, merged_dequantize


class Refusal(Exception):
    """Why a layer, or one call of it, is left to transformers."""


class Adapter(NamedTuple):
    """scaling * B @ A beside a weight, with dropout (a probability) on its input."""

    A: torch.Tensor  # [r, K]
    B: torch.Tensor  # [N, r]
    scaling: float
    dropout: float


@dataclass(frozen=True)
class Projection:
    """A linear layer as it stands in this call: weight [N, K], bias [N] or None, and the adapters that are active."""

    weight: NF4Weight | torch.Tensor
    bias: torch.Tensor | None
    adapters: tuple[Adapter, ...]
    compute_dtype: torch.dtype | None  # that a 4-bit layer is set to

    def merged(self, dtype: torch.dtype, with_adapters: bool, out: torch.Tensor | None) -> torch.Tensor:
        """The weight, with the adapters or without, in `dtype`; in `out` if that is given."""
        A, B, scaling = self.stacked() if with_adapters else (None, None, 1.0)
        if isinstance(self.weight, NF4Weight):
            return merged_dequantize(self.weight, A, B, scaling, dtype=dtype, out=out)
        weight = self.weight.detach().to(dtype)
        if A is None:
            return weight if out is None else out.copy_(weight)
        return torch.addmm(weight, B.detach().to(dtype), A.detach().to(dtype), alpha=scaling, out=out)

    def stacked(self) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
        """(A, B, scaling) of all adapters as one, of the sum of their ranks."""
        if not self.adapters:
            return None, None, 1.0
        if len(self.adapters) == 1:
            return self.adapters[0][:3]
        As, Bs = zip(*((a.A.float(), a.B.float() * a.scaling) for a in self.adapters), strict=True)
        return torch.cat(As), torch.cat(Bs, 1), 1.0


class Group:
    """Projections of one input, for one forward pass and its backward.

    x is [M, K] and y [M, N], both of the compute dtype and contiguous in a row. Draws the seeds of dropout from torch's
    generator, so that torch.manual_seed fixes them. `products.py` has one that multiplies in FP8.

    factors what x and dy are best given in to be multiplied: the compute dtype, here
    chunk   which part of the tokens x holds, where they come in parts: each has a mask of dropout of its own
    copies  of the projections, by `rounded`, if they are made already
    """

    chunk = 0

    def __init__(self, projections: list[Projection], dtype: torch.dtype, copies: "Copies | None" = None):
        self.trained = trained(projections)
        self.projections, self.flat = copies or rounded([projections], dtype)[0]
        self.dtype = self.factors = dtype
        self.sizes = [p.weight.shape[0] for p in projections]
        self.adapters = [(i, adapter) for i, p in enumerate(self.projections) for adapter in p.adapters]
        self.dropout = any(adapter.dropout for _, adapter in self.adapters)
        self.seeds = torch.randint(2**62, (len(self.adapters),)).tolist() if self.dropout else ()

    def parameters(self) -> list[torch.Tensor]:
        """A and B of each adapter, in the order of `gradients`."""
        return self.trained

    def weight(self) -> torch.Tensor:
        """W [N, K], merged unless there is dropout."""
        if len(self.projections) == 1:
            return self.projections[0].merged(self.dtype, not self.dropout, None)
        first = self.projections[0].weight
        W = torch.empty(sum(self.sizes), first.shape[1], dtype=self.dtype, device=first.device)
        for projection, rows in zip(self.projections, W.split(self.sizes), strict=True):
            projection.merged(self.dtype, not self.dropout, rows)
        return W

    def weight_both_ways(self) -> torch.Tensor | None:
        """The weight, for `forward` and `input_gradient` of one backward; None where these take different ones."""
        return self.weight()

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, W: torch.Tensor | None = None,
        unscaled: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """y, or residual + y in residual's dtype, in a new tensor.

        W         of `weight_both_ways`, if it is there already
        unscaled  whether the caller takes pieces.Unscaled, if that is faster
        """
        W, bias = self.weight() if W is None else W, self._bias()
        if residual is not None and residual.dtype == self.dtype:  # added by the product itself
            y = torch.addmm(residual, x, W.T)
            y = y if bias is None else y.add_(bias)
        else:
            y = x @ W.T if bias is None else torch.addmm(bias, x, W.T)
        if self.dropout:
            for y_i, (_, A, B, scaling), z, _ in self._each(x, y):
                y_i.addmm_(z @ A.T, B.T, alpha=scaling)
        return y if residual is None or residual.dtype == self.dtype else residual + y

    def gated(self, x: torch.Tensor) -> torch.Tensor | None:
        """silu(gate) * up [M, I] of a group of gate and up, without writing y; None where no kernel does that."""
        I, biased = self.sizes[0], any(p.bias is not None for p in self.projections)
        if self.factors != self.dtype or self.dropout or biased or not gated_product.takes(x, I):
            return None
        a = torch.empty(len(x), I, dtype=self.dtype, device=x.device)
        gated_product.launch(x, self.weight(), a)
        return a

    def input_gradient(self, dy: torch.Tensor, W: torch.Tensor | None = None, unscaled: bool = False) -> torch.Tensor:
        """dx [M, K], a new tensor; the rest as in `forward`."""
        dx = dy @ (self.weight() if W is None else W)
        if self.dropout:
            for dy_i, (_, A, B, scaling), _, mask in self._each(dx, dy):
                dropped = (dy_i @ B) @ A
                dx.add_(dropped if mask is None else dropped.mul_(mask), alpha=scaling)
        return dx

    def gradients(
        self, x: "torch.Tensor | pieces.Normed", dy: torch.Tensor, needed: list[bool],  # noqa: F821
    ) -> list[torch.Tensor | None]:  # fmt: skip
        """dA and dB of each adapter, None where `needed`, as long as `parameters`, says that none is.

        A norm's output is best given as pieces.Normed: it is computed only for dropout, or where x has another dtype.
        """
        found: list[torch.Tensor | None] = [None] * len(needed)
        wanted = [j for j in range(len(self.adapters)) if needed[2 * j] or needed[2 * j + 1]]
        if not wanted:
            return found
        factors = {}
        if not isinstance(x, torch.Tensor):
            if self.dropout or x.x.dtype != dy.dtype:
                x = x.computed(dy.dtype)
            else:
                x, factors = x.x, {"rstd": x.rstd, "weight": x.norm.weight}
        dys = dy.split(self.sizes, 1)
        pieces = [(dys[self.adapters[j][0]], *self.adapters[j][1][:3]) for j in wanted]
        if self.dropout:
            inputs = [self._dropped(x, j)[0] for j in wanted]
            each = [
                lora_gradients(z, *([part] for part in piece), self.trained[0].dtype)
                for z, piece in zip(inputs, pieces, strict=True)
            ]
            dAs, dBs = ([pair[side][0] for pair in each] for side in (0, 1))
        else:
            dAs, dBs = lora_gradients(x, *zip(*pieces, strict=True), self.trained[0].dtype, **factors)
        for j, dA, dB in zip(wanted, dAs, dBs, strict=True):
            found[2 * j] = dA if needed[2 * j] else None
            found[2 * j + 1] = dB if needed[2 * j + 1] else None
        return found

    def adapters_flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All numbers of the A, and of the B, as they are merged: [sum of r_i K], [sum of N_i r_i]."""
        if self.flat is not None:
            return self.flat.split([sum(t.numel() for t in side) for side in (self.trained[::2], self.trained[1::2])])
        empty = self.projections[0].weight.absmax.new_empty(0, dtype=torch.float32)
        return tuple(
            torch.cat([empty, *(t.detach().flatten() for t in side)])
            for side in (self.trained[::2], self.trained[1::2])
        )

    def _bias(self) -> torch.Tensor | None:
        if all(p.bias is None for p in self.projections):
            return None
        if len(self.projections) == 1:
            return self.projections[0].bias.detach().to(self.dtype)
        zeros = self.projections[0].weight
        return torch.cat([
            torch.zeros(size, dtype=self.dtype, device=zeros.device) if p.bias is None else p.bias.to(self.dtype)
            for p, size in zip(self.projections, self.sizes, strict=True)
        ])  # fmt: skip

    def _each(self, like: torch.Tensor, y: torch.Tensor):
        """For each adapter: its columns of y, itself in the compute dtype, z, and the mask over 1 - p (or None)."""
        ys = y.split(self.sizes, 1)
        for j, (i, adapter) in enumerate(self.adapters):
            A, B = (tensor.detach().to(self.dtype) for tensor in adapter[:2])
            yield ys[i], (adapter, A, B, adapter.scaling), *self._dropped(like, j)

    def _dropped(self, x: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        p = self.adapters[j][1].dropout
        if not p:
            return x, None
        generator = torch.Generator(x.device).manual_seed(self.seeds[j] + self.chunk)
        mask = torch.empty_like(x).bernoulli_(1 - p, generator=generator).mul_(1 / (1 - p))
        return x * mask, mask


Copies = tuple[list[Projection], torch.Tensor | None]  # of `rounded`


def trained(projections: list[Projection]) -> list[torch.Tensor]:
    """A and B of each adapter."""
    return [tensor for p in projections for adapter in p.adapters for tensor in adapter[:2]]


def rounded(groups: list[list[Projection]], dtype: torch.dtype) -> list[Copies]:
    """Each group's projections with adapters in a 16-bit `dtype`, and the numbers of these copies, all A before all B.

    Copied at once for all groups: the work is small, and its launch is not. Where nothing is to be rounded the
    projections are as they were, and there are no copies.
    """
    order = [[*tensors[::2], *tensors[1::2]] for tensors in map(trained, groups)]
    every = [tensor for tensors in order for tensor in tensors]
    if dtype.itemsize != 2 or all(tensor.dtype == dtype for tensor in every):
        return [(projections, None) for projections in groups]
    buffer = torch.empty(sum(t.numel() for t in every), dtype=dtype, device=every[0].device)
    views = [piece.view(t.shape) for piece, t in zip(buffer.split([t.numel() for t in every]), every, strict=True)]
    with torch.no_grad():
        torch._foreach_copy_(views, every)
    found, views = [], iter(views)
    parts = buffer.split([sum(t.numel() for t in tensors) for tensors in order])
    for projections, tensors, flat in zip(groups, order, parts, strict=True):
        own = [next(views) for _ in tensors]
        pairs = zip(own[: len(own) // 2], own[len(own) // 2 :], strict=True)
        copied = (
            tuple(a._replace(A=A, B=B) for a, (A, B) in zip(p.adapters, pairs, strict=False)) for p in projections
        )
        found.append(([replace(p, adapters=adapters) for p, adapters in zip(projections, copied, strict=True)], flat))
    return found


def read(module: nn.Module) -> Projection:
    """`module`, a linear layer of torch, bitsandbytes or peft, as it stands now. Raises Refusal with what is wrong."""
    base, adapters = module, ()
    lora = sys.modules.get("peft.tuners.lora")  # a layer of peft's cannot be here unless peft is
    if lora is not None and isinstance(module, lora.LoraLayer):
        base, adapters = module.base_layer, _adapters(module)
    bias = base.bias if isinstance(base, nn.Linear) else None
    if bias is not None and bias.requires_grad:
        raise Refusal("its bias is trained")
    if isinstance(base, bnb.nn.Linear4bit):
        return Projection(_nf4(base), bias, adapters, base.compute_dtype if base.compute_type_is_set else None)
    if isinstance(base, bnb.nn.Linear8bitLt):
        raise Refusal("quantized as int8")
    if type(base) is not nn.Linear:
        raise Refusal(f"a {type(base).__module__}.{type(base).__name__}")
    if base.weight.requires_grad:
        raise Refusal("its weight is trained")
    return Projection(base.weight, bias, adapters, None)


def _adapters(module) -> tuple[Adapter, ...]:
    """The adapters that a LoRA layer of peft adds in a forward pass now."""
    if module.disable_adapters:
        if module.merged:  # as peft does in its own forward
            module.unmerge()
        return ()
    if module.merged:
        return ()
    names = [name for name in module.active_adapters if name in module.lora_A]
    for name in names:
        if name in module.lora_variant:
            raise Refusal(f"LoRA variant {type(module.lora_variant[name]).__name__}")
        if module.lora_bias[name]:
            raise Refusal("LoRA with a bias")
    if getattr(module, "fan_in_fan_out", False):
        raise Refusal("its weight is stored transposed (fan_in_fan_out)")
    found = []
    for name in names:
        dropout = module.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        if p == 1.0:
            raise Refusal("LoRA dropout of 1")
        A, B = module.lora_A[name].weight, module.lora_B[name].weight
        found.append(Adapter(A, B, float(module.scaling[name]), p))
    if (rank := sum(len(a.A) for a in found)) > MAX_RANK:
        raise Refusal(f"LoRA of rank {rank}, above {MAX_RANK}")
    return tuple(found)


# a view costs some 20 us to make, seven times a layer; kept while the layer holds the same weight
_views: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()


def forget(layer: nn.Module) -> None:
    """Let go of `layer`'s 4-bit weight, which is about to be another one."""
    _views.pop(layer, None)


def _nf4(layer) -> NF4Weight:
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise Refusal("its 4-bit weight is not quantized yet: move the model to its device first")
    if getattr(state, "packing_format_for_cpu", False):
        raise Refusal("its weight was repacked for the CPU, which has no gradient: see keep_differentiable")
    if weight.requires_grad:
        raise Refusal("its weight is trained")
    key = (weight.data_ptr(), id(state))
    known = _views.get(layer)
    if known is None or known[0] != key or known[1] is not state:
        try:
            view = NF4Weight.from_bitsandbytes(weight.data, state)
        except ValueError as error:
            raise Refusal(str(error).removeprefix("NF4Weight: ")) from None
        known = _views[layer] = (key, state, view)
    return known[2]
