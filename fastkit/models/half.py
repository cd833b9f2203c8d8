"""What both halves of a decoder layer share: the autograd Function around a forward and a backward written by hand.

What a half keeps hangs on the half itself, not in autograd's saved tensors. So it decides alone what to keep and when
to let go: gate and up are overwritten by their gradients, and nothing outlives the layer's backward. And the
saved-tensor hooks of others stay out of it: under transformers' gradient checkpointing nothing of a half is computed a
second time but what its plan says.
"""

import torch
from torch.autograd.function import once_differentiable

from fastkit.models.keeping import Keeper, Kept
from fastkit.models.plans import Plan


class Half:
    """One pass of half a layer through forward and backward. x and y are [M, K], of one dtype.

    keeper and kept   where what the plan keeps goes, and what went there
    """

    norm: "pieces.Norm"  # noqa: F821  of the half's input
    plan: Plan
    keeper: Keeper
    kept: Kept | None = None

    def parameters(self) -> list[torch.Tensor]:
        """The adapters' A and B, in the order of the last of what `backward` returns."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, keep: bool) -> torch.Tensor:
        """y; keeps what the backward needs if `keep`."""
        raise NotImplementedError

    def backward(
        self, dy: torch.Tensor, x_grad: bool, weight_grad: bool, needed: list[bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
        """(dx, dweight of the norm, gradients of `parameters`), those that are asked for. dy is left as it is."""
        raise NotImplementedError

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """y [B, T, K] of x [B, T, K], differentiable once in x, the norm's weight and the adapters."""
        with torch.autocast(x.device.type, enabled=False):
            return _Function.apply(self, x, self.norm.weight, *self.parameters())

    def keep(self, **tensors: torch.Tensor) -> None:
        self.kept = self.keeper.keep(tensors, self.plan.offload)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, half, x, weight, *adapters):
        ctx.half, ctx.shape = half, x.shape
        y = half.forward(x.reshape(-1, x.shape[-1]), any(ctx.needs_input_grad))
        return torch.ops.aten._unsafe_view(y, x.shape)  # y is nobody else's: no view for autograd to warn of

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        half, ctx.half = ctx.half, None
        if half is None:
            raise RuntimeError(
                "a fused decoder layer goes backward once, since it frees what it kept: leave out retain_graph, or "
                "unpatch the model"
            )
        _, x_grad, weight_grad, *needed = ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):
            dx, dweight, gradients = half.backward(dy.reshape(-1, dy.shape[-1]), x_grad, weight_grad, needed)
        return None, None if dx is None else dx.view(ctx.shape), dweight, *gradients
