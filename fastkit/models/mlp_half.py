"""The second half of a decoder layer: norm, gate and up, SwiGLU, down, residual, with LoRA in all three products.

Forward, for x [M, K] (a token a row), W_gu [2 I, K] the merged weights of gate and up below each other, W_d [K, I]
that of down (see `projection.py`):

    n      = norm(x)                       [M, K], and rstd [M]
    [g u]  = n @ W_gu.T                    [M, 2 I], one product
    a      = silu(g) * u                   [M, I]
    y      = x + a @ W_d.T                 the product adds the residual itself

Backward, given dy = ∂L/∂y. It reaches x directly, by the residual, and through the products:

    da      = dy @ W_d
    [dg du] = da through silu(g) * u       written over [g u]; and a, over da
                                           down's adapters: from a and dy
    dn      = [dg du] @ W_gu               gate's and up's adapters: from x, rstd and [dg du], see kernels/lora.py
    dx      = dn through the norm + dy     the norm's kernel adds dy; written over dn

What the backward reads is x, rstd, g and u, and a, which is computed again from these by the kernel that has g and u in
hand. y itself is in none of it, so the down projection is never computed again.

Kept: x and rstd; g and u unless the plan computes them again, by one product. Where they are not kept they need not be
written: on sm_90 one kernel multiplies and takes a of the products (`kernels/gated_product.py`). Under the plan that
does not keep x either, `again` is asked for it: the first half's forward, whose result x was.

W_gu, written to compute g and u again, is held until dn is computed. But every row of all this is one token's, and the
adapters' gradients are sums over tokens. So a plan may send the tokens through in chunks, each with its own W_gu and
W_d, which are then written each time rather than held.

Casts: x, y and dx have the residual stream's dtype, everything between the norm and down the compute dtype.
"""

from collections.abc import Callable

import torch

from fastkit.models import pieces
from fastkit.models.half import Half
from fastkit.models.keeping import Keeper
from fastkit.models.plans import Plan
from fastkit.models.projection import Group


class MLPHalf(Half):
    def __init__(
        self, norm: pieces.Norm, gate_up: Group, down: Group, plan: Plan, keeper: Keeper,
        again: Callable[[], torch.Tensor],
    ):  # fmt: skip
        self.norm, self.gate_up, self.down, self.plan, self.keeper = norm, gate_up, down, plan, keeper
        self.again, self.rstd, self.hidden, self.factor = again, None, None, None

    def parameters(self):
        return self.gate_up.parameters() + self.down.parameters()

    def forward(self, x, keep):
        parts, kept = [], {}
        for part in self._chunks(x):
            n, rstd = self.normed(part, self.gate_up)
            keeps = keep and self.plan.gate_up
            a = None if keeps else self.gate_up.gated(n)
            hidden = self.gate_up.forward(n, unscaled=True) if a is None else None  # [M, 2 I]: g and u
            del n
            if hidden is not None:
                a = pieces.gated(hidden, self.down.factors)
            if keeps:
                kept["hidden"], self.factor = pieces.apart(hidden)
            del hidden  # unless kept, before the next product
            parts.append((self.added(part, self.down, a), rstd))
            del a
        y, rstd = (_joined(each) for each in zip(*parts, strict=True))
        if keep:
            self.rstd = rstd
            if self.plan.attention:
                kept["x"] = x
            if kept:
                self.keep(**kept)
        return y

    def backward(self, dy, x_grad, weight_grad, needed):
        kept = {} if self.kept is None else self.kept.tensors()
        x = kept["x"] if self.plan.attention else self.again()
        self.hidden = pieces.joined(kept.get("hidden"), self.factor)
        del kept
        self.kept = self.factor = None
        parts, first = [], 0
        for part in self._chunks(x):
            rows = slice(first, first := first + len(part))
            parts.append(self._backward(dy[rows], part, self.rstd[rows], x_grad, weight_grad, needed))
        dxs, dweights, gradients = zip(*parts, strict=True)
        del parts
        return _joined(dxs), _summed(dweights), [_summed(each) for each in zip(*gradients, strict=True)]

    def _backward(self, dy, x, rstd, x_grad, weight_grad, needed):
        hidden, self.hidden = self.hidden, None
        of_gate_up, of_down = needed[: len(self.gate_up.parameters())], needed[len(self.gate_up.parameters()) :]
        inner, W = x_grad or weight_grad, None
        if hidden is None:
            n, _ = pieces.norm(x, self.norm, self.gate_up.factors)
            W = self.gate_up.weight_both_ways() if inner and self.plan.holds else None
            hidden = self.gate_up.forward(n, W=W, unscaled=True)
            del n

        dy_c = dy.to(self.down.dtype)
        da = self.down.input_gradient(self.to_multiply(dy_c), unscaled=True)
        dhidden, factor, a = pieces.gated_backward_as_(da, hidden, self.gate_up.factors)  # factor: for the product
        del da, hidden
        down_gradients = self.down.gradients(a, dy_c, of_down)
        del a
        gradients = self.gate_up.gradients(pieces.Normed(x, self.norm, rstd), dhidden, of_gate_up)
        del dhidden
        dx = dweight = None
        if inner:
            dn = self.gate_up.input_gradient(factor, W, unscaled=True)
            del factor, W
            dx8 = self.room(x, self.gate_up) if x_grad else None
            dx, dweight = pieces.norm_backward(dn, x, self.norm, rstd, dy, weight_grad, dx8)
        return dx if x_grad else None, dweight, gradients + down_gradients

    def _chunks(self, x: torch.Tensor):
        """The tokens' parts, of 16 rows or a multiple, but for the last: tiles of tensor cores."""
        rows = max(16, -(-len(x) // (16 * self.plan.chunks)) * 16)
        for self.gate_up.chunk, part in enumerate(x.split(rows)):
            self.down.chunk = self.gate_up.chunk
            yield part


def _joined(parts: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    return parts[0] if len(parts) == 1 else None if parts[0] is None else torch.cat(parts)


def _summed(parts: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    return parts[0] if len(parts) == 1 else None if parts[0] is None else sum(parts[1:], parts[0])
