"""What the tests of AdamW share."""

import pytest
import torch

from fastkit.kernels.adamw_state import WRAPPED, State

LR, BETAS, EPS = 1e-2, (0.9, 0.99), 1e-8
BITS = pytest.mark.parametrize("bits", [32, 8])


def inputs(n, dtype=torch.float32, device="cpu", steps=1):
    """(param, gradients of `steps` steps): numbers of many sizes, as gradients are."""
    grads = torch.randn(steps, n, device=device) * 10 ** (2 * torch.rand(n, device=device) - 2)
    return torch.randn(n, device=device).to(dtype), list(grads.to(dtype))


def assert_same(one: State, other: State):
    for name, value in vars(one).items():
        assert value is None or torch.equal(value, getattr(other, name)), name


def bitsandbytes_step(param, grad, lr=LR, weight_decay=0.0, before=None):
    """(param, entry of the state_dict) after a step of bitsandbytes' AdamW8bit, from `before` on."""
    optim = pytest.importorskip("bitsandbytes.optim")
    param = torch.nn.Parameter(param.clone())
    optimizer = optim.AdamW8bit([param], lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay)
    if before is not None:
        optimizer.load_state_dict({"state": {0: before}, "param_groups": optimizer.state_dict()["param_groups"]})
    param.grad = grad.clone()
    optimizer.step()
    saved = optimizer.state_dict()["state"][0]
    return param.detach(), saved | saved.pop(WRAPPED, {})
