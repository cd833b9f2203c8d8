"""The second half of a decoder layer: norm, gate and up, SwiGLU, down, residual, with LoRA in all three products.

Forward, for x [M, K] (a token a row), W_gu [2 I, K] the merged weights of gate and up below each other, W_d [K, I]
that of down (see `projection.py`):

    n      = norm(x)                       [M, K], and rstd [M]
    [g u]  = n @ W_gu.T                    [M, 2 I], one product
    a      = silu(g) * u                   [M, I]
    y      = x + a @ W_d.T                 the product adds the residual itself

Backward, given dy = ∂L/∂y. It reaches x directly, by the residual, and through the products:

    da      = dy @ W_d                     down's adapters: from a and dy
    [dg du] = da through silu(g) * u       written over [g u]
    dn      = [dg du] @ W_gu               gate's and up's adapters: from n and [dg du]
    dx      = dn through the norm + dy     the norm's kernel adds dy; written over dn

What the backward reads is x, rstd, g and u, and a and n, which are computed again from these: a before [g u] is
overwritten. y itself is in none of it, so the down projection is never computed again.

Kept: x and rstd; g and u unless the plan computes them again, by one product. Under the plan that does not keep x
either, `again` is asked for it: the first half's forward, whose result x was.

Casts: x, y and dx have the residual stream's dtype, everything between the norm and down the compute dtype.
"""

from collections.abc import Callable

import torch

from fastkit.models import pieces
from fastkit.models.half import Half
from fastkit.models.plans import Plan
from fastkit.models.projection import Group


class MLPHalf(Half):
    def __init__(self, norm: pieces.Norm, gate_up: Group, down: Group, plan: Plan, again: Callable[[], torch.Tensor]):
        self.norm, self.gate_up, self.down, self.plan, self.again = norm, gate_up, down, plan, again
        self.rstd = self.hidden = None

    def parameters(self):
        return self.gate_up.parameters() + self.down.parameters()

    def forward(self, x, keep):
        n, rstd = pieces.norm(x, self.norm, self.gate_up.dtype)
        hidden = self.gate_up.forward(n)  # [M, 2 I]: g and u
        del n
        if keep:
            self.rstd = rstd
            if self.plan.attention:
                self.keep_input(x)
            if self.plan.gate_up:
                self.hidden = hidden
        a = pieces.gated(hidden)
        del hidden  # unless kept, before the next product
        return self.down.forward(a, residual=x)

    def backward(self, dy, x_grad, weight_grad, needed):
        x = self.kept_input() if self.plan.attention else self.again()
        hidden, self.hidden = self.hidden, None
        of_gate_up, of_down = needed[: len(self.gate_up.parameters())], needed[len(self.gate_up.parameters()) :]
        inner = x_grad or weight_grad
        if hidden is None:
            n, _ = pieces.norm(x, self.norm, self.gate_up.dtype)
            hidden = self.gate_up.forward(n)
            del n

        dy_c = dy.to(self.down.dtype)
        down_gradients = (
            self.down.gradients(pieces.gated(hidden), dy_c, of_down) if any(of_down) else [None] * len(of_down)
        )
        dhidden = None
        if inner or any(of_gate_up):
            dhidden = pieces.gated_backward_(self.down.input_gradient(dy_c), hidden)
        del hidden
        gradients = [None] * len(of_gate_up)
        if any(of_gate_up):
            n, _ = pieces.norm(x, self.norm, self.gate_up.dtype)
            gradients = self.gate_up.gradients(n, dhidden, of_gate_up)
            del n
        dx = dweight = None
        if inner:
            dn = self.gate_up.input_gradient(dhidden)
            del dhidden
            dx, dweight = pieces.norm_backward(dn, x, self.norm, self.rstd, dy, weight_grad)
        return dx if x_grad else None, dweight, gradients + down_gradients
