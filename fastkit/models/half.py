"""What both halves of a decoder layer share: the autograd Function around a forward and a backward written by hand.

What a half keeps hangs on the half itself, not in autograd's saved tensors. So it decides alone what to keep and when
to let go: gate and up are overwritten by their gradients, and nothing outlives the layer's backward. And the
saved-tensor hooks of others stay out of it: under transformers' gradient checkpointing nothing of a half is computed a
second time but what its plan says.

In FP8 a half's dx is needed twice by the half that gets it: as it is, and in FP8 for a product. The norm's kernel has
its rows in hand and writes both; the second waits, by a weak reference, for whoever is called with the first as it was.
A sum with other gradients, or what a hook made of it, is another tensor or another version, and is quantized anew.

A half's y, likewise, is what the half after it takes the norm of, in FP8. One kernel adds up y and norms it; the norm
waits for whoever is called with y as it was and has that same norm. It waits for the next half alone: most plans keep y
until the backward, and a norm that nobody took would stay with it.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from fastkit.kernels.fp8_scale import FP8
from fastkit.kernels.rms_norm import MAX_BLOCK_N
from fastkit.models import pieces
from fastkit.models.keeping import Keeper, Kept
from fastkit.models.plans import Plan
from fastkit.models.projection import Group

_written = WeakTensorKeyDictionary()  # by a half's dx: (its version, itself in FP8)
_normed = WeakTensorKeyDictionary()  # by a half's y, one at most: (its version, a norm, what that made of it)
Ahead = tuple[pieces.FP8Rows, torch.Tensor]  # a norm's output, and its rstd [M]


class Half:
    """One pass of half a layer through forward and backward. x and y are [M, K], of one dtype.

    keeper and kept   where what the plan keeps goes, and what went there
    dy8 and dx8       dy and dx in FP8, where they were written
    n and next_n      the norms of x, and of y by next_norm, where they were taken with the sums that x and y are
    """

    norm: pieces.Norm  # of the half's input
    next_norm: pieces.Norm | None = None  # of its output, in the half after it, if known
    plan: Plan
    keeper: Keeper
    kept: Kept | None = None
    dy8: pieces.FP8Rows | None = None
    dx8: pieces.FP8Rows | None = None
    n: Ahead | None = None
    next_n: Ahead | None = None

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
        self.n = _waiting(x, self.norm)
        with torch.autocast(x.device.type, enabled=False):
            y = _Function.apply(self, x, self.norm.weight, *self.parameters())
        if self.next_n is not None:
            _normed[y], self.next_n = (y._version, self.next_norm, self.next_n), None
        return y

    def normed(self, x: torch.Tensor, group: Group) -> tuple[torch.Tensor | pieces.FP8Rows, torch.Tensor]:
        """(the norm of x [M, K] as `group` multiplies it, rstd [M]); in a forward x is all that the half was given."""
        found, self.n = self.n, None
        return found or pieces.norm(x, self.norm, group.factors)

    def added(self, x: torch.Tensor, group: Group, a: torch.Tensor | pieces.FP8Rows) -> torch.Tensor:
        """y [M, K] = x + the product of `group` with a; and its norm ahead, where it is there as a whole and in FP8."""
        whole = self.next_norm is not None and self.plan.chunks == 1 and x.dtype == group.dtype
        if not whole or group.factors != FP8 or any(p.bias is not None for p in group.projections):
            return group.forward(a, residual=x)
        y, *next_n = pieces.norm_of_sum(group.unscaled(a), x, self.next_norm)
        self.next_n = tuple(next_n)
        return y

    def keep(self, **tensors: torch.Tensor) -> None:
        self.kept = self.keeper.keep(tensors, self.plan.offload)

    def to_multiply(self, dy: torch.Tensor) -> torch.Tensor | pieces.FP8Rows:
        """dy [M, K], in FP8 if it was written; for one product."""
        dy8, self.dy8 = self.dy8, None
        return dy if dy8 is None else dy8

    def room(self, x: torch.Tensor, group: Group) -> pieces.FP8Rows | None:
        """Where dx is to be written in FP8 too; None where products take it otherwise, or in parts."""
        fits = x.dtype == group.dtype and x.shape[1] <= MAX_BLOCK_N and self.plan.chunks == 1
        self.dx8 = pieces.FP8Rows.empty(*x.shape, x.device) if group.factors == FP8 and fits else None
        return self.dx8


def _waiting(x: torch.Tensor, norm: pieces.Norm) -> Ahead | None:
    """`norm` of x if it was taken before, of x as it is now. Nothing waits any more afterwards."""
    version, taken, found = _normed.pop(x, (None, None, None))
    _normed.clear()
    same = found is not None and version == x._version and taken.weight is norm.weight and taken.eps == norm.eps
    return found if same else None


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
        version, dy8 = _written.pop(dy, (None, None))
        half.dy8 = dy8 if version == dy._version and half.plan.chunks == 1 else None
        del dy8
        with torch.autocast(dy.device.type, enabled=False):
            dx, dweight, gradients = half.backward(dy.reshape(-1, dy.shape[-1]), x_grad, weight_grad, needed)
        if dx is None:
            return None, None, dweight, *gradients
        dx = dx.view(ctx.shape)
        if half.dx8 is not None:
            _written[dx] = dx._version, half.dx8
        return None, dx, dweight, *gradients
