"""The first half of a decoder layer: norm, q, k, v, RoPE, attention, o, residual, with LoRA in all four products.

Forward, for x [M, K] (a token a row, M = B T), W_qkv [N, K] the merged weights of q, k and v below each other, W_o
[K, H D] that of o (see `projection.py`):

    n        = norm(x)                     [M, K], and rstd [M]
    [q k v]  = n @ W_qkv.T + bias          [M, H D + 2 H_k D], one product
    q, k     = norm(q), norm(k)            each head, in Qwen3 alone
    q, k     = RoPE(q), RoPE(k)            in place
    o        = attention(q, k, v)          [M, H D], and lse, 4 bytes a query and head
    y        = x + o @ W_o.T               the product adds the residual itself

Backward, given dy = ∂L/∂y. It reaches x directly, by the residual, and through the products:

    do         = dy @ W_o                  o's adapters: from o and dy
    dq, dk, dv = do through the attention  from q, k, v, o and lse, written into one buffer [M, N]
    dq, dk     = turned back               RoPE's backward; for a product in FP8 it writes [dq dk dv] so too
    dq, dk     = through their norms       in Qwen3 alone
    dn         = [dq dk dv] @ W_qkv        q's, k's and v's adapters: from x, rstd and [dq dk dv]
    dx         = dn through the norm + dy  the norm's kernel adds dy; written over dn

What the backward reads is x, rstd, q, k, v, o and lse. y is in none of it, so o's projection is computed again only
where the plan keeps nothing but x, and y is the other half's input: see `again`.

Kept: x and rstd; q, k and v unless the plan computes them again, by one product; o and lse unless it attends again. q,
k and v are kept as attention reads them; where they have norms, as these read them, and turned anew. W_qkv, written to
compute them again, is held until dn is computed.

Casts: x, y and dx have the residual stream's dtype, everything between the norm and o the compute dtype.
"""

import torch

from fastkit.kernels.fp8_scale import FP8
from fastkit.models import attend, pieces
from fastkit.models.half import Half
from fastkit.models.keeping import Keeper
from fastkit.models.plans import Plan
from fastkit.models.projection import Group


class AttentionHalf(Half):
    """norm: of the input. qk_norms: of the heads of q and of k, or None. shape: (B, T, heads, key heads, D).

    table: cos and sin [B or 1, T, R].
    """

    def __init__(
        self, norm: pieces.Norm, qkv: Group, qk_norms: tuple[pieces.Norm, pieces.Norm] | None, o: Group,
        shape: tuple[int, ...], table: tuple[torch.Tensor, torch.Tensor], options: attend.Attend,
        plan: Plan, keeper: Keeper,
    ):  # fmt: skip
        self.norm, self.qkv, self.qk_norms, self.o = norm, qkv, qk_norms, o
        self.shape, self.table, self.options, self.plan, self.keeper = shape, table, options, plan, keeper
        self.rstd = self.attended = self.made_again = None

    def parameters(self):
        return self.qkv.parameters() + self.o.parameters()

    def forward(self, x, keep):
        qkv, rstd = self._project(x)
        attended = attend.attend(*self._heads(qkv), self.options)
        y = self.added(x, self.o, self._flat(attended.o))
        if keep:
            self.rstd = rstd
            kept = {"x": x}
            if self.plan.qkv:
                kept["qkv"] = qkv
            if self.plan.attention:
                kept["o"] = attended.o
                self.attended = attended._replace(o=None)
            self.keep(**kept)
        return y

    def again(self) -> torch.Tensor:
        """y, computed again; what the backward needs of it stays, for that follows at once."""
        x = self.kept.tensors()["x"]
        qkv, _ = self._project(x)
        attended = attend.attend(*self._heads(qkv), self.options)
        self.made_again = qkv, attended
        return self.o.forward(self._flat(attended.o), residual=x)

    def backward(self, dy, x_grad, weight_grad, needed):
        kept = self.kept.tensors()
        x = kept["x"]
        if self.made_again is not None:
            qkv, attended = self.made_again
        else:
            qkv = kept.get("qkv")
            attended = None if self.attended is None else self.attended._replace(o=kept["o"])
        del kept
        self.kept = self.attended = self.made_again = None
        of_qkv, of_o = needed[: len(self.qkv.parameters())], needed[len(self.qkv.parameters()) :]
        dy_c = dy.to(self.o.dtype)
        inner = x_grad or weight_grad or any(of_qkv)
        W = None
        if inner or attended is None:
            if qkv is None:
                W = self.qkv.weight_both_ways() if self.plan.holds and (x_grad or weight_grad) else None
                qkv, _ = self._project(x, W)
            q, k, v = self._heads(qkv)
            if attended is None:  # the other half did not ask for `again`
                attended = attend.attend(q, k, v, self.options)
        o_gradients = self.o.gradients(self._flat(attended.o), dy_c, of_o)
        if not inner:
            return None, None, [None] * len(of_qkv) + o_gradients

        do = self._per_head(self.o.input_gradient(self.to_multiply(dy_c)))
        dqkv = torch.empty_like(qkv)
        dq, dk, dv = self._split(dqkv)
        in_fp8 = self.qkv.factors == FP8 and self.qk_norms is None and (x_grad or weight_grad)
        dqkv8 = attend.attend_backward(
            do, q, k, v, attended, self.options, dq, dk, dv, self.table, dqkv if in_fp8 else None
        )
        del do, attended, q, k, v
        if self.qk_norms is not None:
            self._through_qk_norms(dqkv, qkv)
        del qkv

        gradients = self.qkv.gradients(pieces.Normed(x, self.norm, self.rstd), dqkv, of_qkv)
        dx = dweight = None
        if x_grad or weight_grad:
            dn = self.qkv.input_gradient(dqkv if dqkv8 is None else dqkv8, W, unscaled=True)
            del dqkv, dqkv8, dq, dk, dv, W
            dx8 = self.room(x, self.qkv) if x_grad else None
            dx, dweight = pieces.norm_backward(dn, x, self.norm, self.rstd, dy, weight_grad, dx8)
        return dx if x_grad else None, dweight, gradients + o_gradients

    def _project(self, x: torch.Tensor, W: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(q, k and v [M, N] as they are kept: turned already where they have no norms, rstd [M])."""
        n, rstd = self.normed(x, self.qkv)
        if self.qk_norms is not None:
            return self.qkv.forward(n, W=W), rstd
        qkv, scale = pieces.apart(self.qkv.forward(n, W=W, unscaled=True))
        q, k, v = self._split(qkv)
        pieces.rotate_(q, k, *self.table, scale=scale, v=None if scale is None else v)
        return qkv, rstd

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v [B, heads, T, D] as attention reads them: where they have norms, normed and turned beside qkv."""
        q, k, v = self._split(qkv)
        if self.qk_norms is not None:
            q, k = (self._normed(x, norm)[0] for x, norm in zip((q, k), self.qk_norms, strict=True))
            pieces.rotate_(q, k, *self.table)
        return q, k, v

    def _normed(self, x: torch.Tensor, norm: pieces.Norm) -> tuple[torch.Tensor, torch.Tensor]:
        y, rstd = pieces.norm(x.transpose(1, 2), norm, x.dtype)
        return y.transpose(1, 2), rstd

    def _through_qk_norms(self, dqkv: torch.Tensor, qkv: torch.Tensor) -> None:
        """dqkv, with dq and dk behind their norms, before them instead; qkv is what the norms read."""
        for dx, x, norm in zip(self._split(dqkv)[:2], self._split(qkv)[:2], self.qk_norms, strict=True):
            _, rstd = self._normed(x, norm)
            dy = dx.transpose(1, 2).contiguous()
            dx.transpose(1, 2).copy_(pieces.norm_backward(dy, x.transpose(1, 2), norm, rstd)[0])

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q [B, H, T, D], k and v [B, H_k, T, D], views of qkv [M, N]."""
        B, T, H, H_k, D = self.shape
        parts = qkv.split([H * D, H_k * D, H_k * D], 1)
        return tuple(x.unflatten(0, (B, T)).unflatten(2, (-1, D)).transpose(1, 2) for x in parts)

    def _per_head(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, H D] as [B, H, T, D]."""
        B, T, H, _, D = self.shape
        return x.view(B, T, H, D).transpose(1, 2)

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, T, D] as [M, H D]."""
        return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])
