"""Choosing an attention: what is offered, what is forced, what is remembered."""

import pytest
import torch

from fastkit.kernels import attention_choice as module
from fastkit.kernels.attention import reference
from fastkit.kernels.attention_choice import BACKENDS, attend_by, choose

pytestmark = pytest.mark.usefixtures("fresh_seed")


def inputs(T_q=40, T_k=40, device="cpu", dtype=torch.float32):
    return tuple(torch.randn(1, H, T, 16, device=device).to(dtype) for H, T in ((4, T_q), (2, T_k), (2, T_k)))


def test_the_cpu_has_no_choice():
    assert choose(*inputs()) == "ours" and choose(*inputs(), timed=False) == "ours"


@pytest.mark.parametrize(
    ("T_q", "T_k", "causal", "window"), [(40, 40, True, None), (9, 40, True, 5), (40, 9, False, None)]
)
def test_backends_agree(T_q, T_k, causal, window):
    q, k, v = inputs(T_q, T_k)
    for backend in ("ours", "math"):
        o = attend_by(backend, q, k, v, causal, window, 0.3)
        torch.testing.assert_close(o, reference(q, k, v, causal, window, 0.3))


def test_unknown_names():
    for function in (lambda: attend_by("flush", *inputs()), lambda: choose(*inputs(), force="flush")):
        with pytest.raises(ValueError, match="no backend 'flush'; take one of cudnn, flash, ours, efficient, math"):
            function()


def test_the_fastest_is_timed_once_and_remembered(monkeypatch):
    """As on a GPU, with times that are given."""
    times, asked = {"cudnn": None, "flash": 2.0, "ours": 1.0, "efficient": 3.0, "math": 9.0}, []
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_card", lambda device: "a card")
    monkeypatch.setattr(module, "candidates", lambda *a: tuple(BACKENDS))
    monkeypatch.setattr(module, "_time", lambda name, *a, **b: asked.append(name) or times[name])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(*inputs()) == "ours" and asked == list(BACKENDS)
    assert choose(*inputs()) == "ours" and len(asked) == 5  # remembered
    assert choose(*inputs(T_q=30)) == "ours" and len(asked) == 10  # another shape
    assert choose(*inputs(), timed=False) == "flash" and asked[10:] == ["cudnn", "flash"]  # the first that can
    times["ours"] = 5.0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(*inputs()) == "ours" and choose(*inputs(T_q=31)) == "ours" and len(asked) == 12  # nothing is tried


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 30])
def test_every_candidate_is_right(window, device):
    q, k, v = inputs(device=device, dtype=torch.float16)
    found = choose(q, k, v, True, window)
    assert found in module.candidates(q, k, True, window)
    truth = reference(q.double(), k.double(), v.double(), True, window)
    for name in module.candidates(q, k, True, window):
        if module._time(name, q, k, v, True, window, None, runs=0) is not None:
            error = (attend_by(name, q, k, v, True, window).double() - truth).abs().max()
            assert error <= 1e-3 * truth.abs().max(), name
    assert choose(q, k, v, True, window, force="ours") == "ours"
