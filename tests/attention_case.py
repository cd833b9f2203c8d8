"""What the tests of attention share: inputs, and how close to the truth its results must be."""

import math

import torch
from tolerance import SLACK, assert_as_close_as_torch, assert_draws_as_close_as_torch

from fastkit.kernels import attention as module
from fastkit.kernels.common import INTERPRETED


def run(attend, q, k, v, do, *options):
    """(o, dq, dk, dv) of one forward and backward through `attend`."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = attend(q, k, v, *options)
    o.backward(do)
    return o, q.grad, k.grad, v.grad


def eager(q, k, v, causal=True, window=None, scale=None):
    """Attention in torch's separate operations, in the inputs' dtype, as Hugging Face's eager one."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = module.seen_pairs(q.shape[2], k.shape[2], causal, window, q.device)
    if seen is not None:
        s = s.masked_fill(~seen & seen.any(1, keepdim=True), -math.inf)
    p = s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)
    return p @ v if seen is None else p * seen.any(1, keepdim=True) @ v


def check(attend, q, k, v, *options):
    """Assert that o, dq, dk and dv of `attend` are as close to the truth as those of torch."""
    for result in results(attend, q, k, v, *options):
        assert_as_close_as_torch(*result)


def check_draws(attend, draws, *options):
    """The same of several (q, k, v) of one shape: p and ds are rounded to 16 bits by both, but not the same numbers, so
    that of few keys the one or the other has by far the largest error."""
    for draws_of_one in zip(*(results(attend, *draw, *options) for draw in draws), strict=True):
        assert_draws_as_close_as_torch(draws_of_one)


def results(attend, q, k, v, *options):
    """(ours, torch's, the truth, name, scale) of o, dq, dk and dv.

    In ds = p (dp - delta) terms cancel: their size is given. To it comes what every flash attention rounds and eager
    torch does not or not there, p and the o that delta = do · o starts from, as the size of sums of random errors.

    In p = exp(s - lse) cancel the D terms that s is the sum of, and lse through it. Eager torch sums them once, and
    where p is near 1 their error is gone from it. The p of dv is of an s summed anew, and as k qᵀ, in an order that
    need not be q kᵀ's: with OpenBLAS the CPU decides. So s and lse no longer match: e is the size of five roundings in
    fp32, s in the forward and anew, lse, and s and lse in powers of 2. Of e, o sees p (1 - p) e: its p add up to 1.
    """
    do = torch.randn(q.shape, device=q.device).to(q.dtype)
    ours, theirs = run(attend, q, k, v, do, *options), run(eager, q, k, v, do, *options)
    rounding = torch.finfo(q.dtype).eps / 2 / SLACK
    q, k, v, do = (x.double() for x in (q, k, v, do))
    truth = run(eager, q, k, v, do, *options)
    group, scale = q.shape[1] // k.shape[1], (*options, None, None, None)[2] or q.shape[-1] ** -0.5
    p = eager(q, k, torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1), *options)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    e = 5 * torch.finfo(torch.float32).eps / 2 / SLACK * scale * (q.abs() @ k.mT.abs())
    ds = do.norm(dim=-1, keepdim=True) * v.abs().max() + rounding * (do * truth[0]).norm(dim=-1, keepdim=True)
    scales = (
        truth[0].abs() + ((p * (rounding + (1 - p) * e)) ** 2 @ v**2).sqrt(),
        scale * ds * (p @ k.abs()),
        scale * ((ds * p).mT @ q.abs()).unflatten(1, (-1, group)).sum(2),
        (p.mT @ do.abs() + ((p * (rounding + e)) ** 2).mT.matmul(do**2).sqrt()).unflatten(1, (-1, group)).sum(2),
    )
    return list(zip(ours, theirs, truth, ("o", "dq", "dk", "dv"), scales, strict=True))


def assert_same(ours, theirs):
    """The same bits in the interpreter; on a GPU other layouts may take other tiles, which sum in another order."""
    for a, b in zip(ours, theirs, strict=True):
        if INTERPRETED:
            assert torch.equal(a, b)
        elif b.numel():
            size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=8 * torch.finfo(b.dtype).eps * size, equal_nan=True)


def inputs(B, H, H_k, T_q, T_k, D, dtype, device):
    """q, k and v whose scores spread as a trained model's do, by some units."""
    shapes = (B, H, T_q, D), (B, H_k, T_k, D), (B, H_k, T_k, D)
    q, k, v = (torch.randn(shape, device=device) for shape in shapes)
    return (2 * q).to(dtype), (2 * k).to(dtype), v.to(dtype)


def packed(lengths_q, lengths_k, H, H_k, D, dtype, device):
    """(q, k, v, cu_q, cu_k) of sequences end to end."""
    q, k, v = inputs(1, H, H_k, sum(lengths_q), sum(lengths_k), D, dtype, device)
    cu = [torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    return *(x[0].transpose(0, 1).contiguous() for x in (q, k, v)), *cu
