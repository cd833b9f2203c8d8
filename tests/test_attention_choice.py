"""Choosing an attention: what is offered, what is forced, what is remembered."""

import pytest
import torch

from fastkit.kernels import attention_choice as module
from fastkit.kernels import choices
from fastkit.kernels.attention import reference
from fastkit.kernels.attention_choice import BACKENDS, attend_by, choose, deciding

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


@pytest.fixture
def as_on_a_gpu(monkeypatch, tmp_path):
    """(times, asked): the times that the backends are said to take, None for one that cannot; and who was tried."""
    times, asked = {"cudnn": None, "flash": 2.0, "ours": 1.0, "efficient": 3.0, "math": 9.0}, []
    monkeypatch.setenv("FASTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_card", lambda device: "a card")
    monkeypatch.setattr(module, "candidates", lambda *a: tuple(BACKENDS))
    monkeypatch.setattr(module, "_time", lambda name, *a, **b: asked.append(name) or times[name])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choices._read.cache_clear()
    yield times, asked
    choices._read.cache_clear()


def test_the_fastest_is_timed_once_and_remembered(monkeypatch, as_on_a_gpu):
    times, asked = as_on_a_gpu
    assert choose(*inputs(T_q=31), timed=False) == "flash" and asked == ["cudnn", "flash"]  # the first that can
    assert choose(*inputs(T_q=31), timed=False) == "flash" and len(asked) == 2  # remembered
    asked.clear()
    assert choose(*inputs()) == "ours" and asked == list(BACKENDS)
    assert choose(*inputs()) == "ours" and len(asked) == 5  # remembered
    assert choose(*inputs(T_q=30)) == "ours" and len(asked) == 10  # another shape
    assert choose(*inputs(), timed=False) == "ours" and len(asked) == 10  # the fastest is known
    assert choose(*inputs(T_q=31)) == "ours" and len(asked) == 15  # it was only tried
    times["ours"] = 5.0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(*inputs()) == "ours" and choose(*inputs(T_q=32)) == "ours" and len(asked) == 15  # nothing is tried


def test_what_was_timed_is_known_to_the_next_process(monkeypatch, as_on_a_gpu):
    times, asked = as_on_a_gpu
    assert choose(*inputs()) == "ours" and len(asked) == 5
    monkeypatch.setattr(module, "_chosen", {})
    times["ours"] = 5.0
    assert choose(*inputs()) == choose(*inputs(), timed=False) == "ours" and len(asked) == 5
    assert choose(*inputs(), among=("cudnn", "flash", "ours")) == "flash" and len(asked) == 8  # another question
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_card", lambda device: "another card")
    assert choose(*inputs()) == "flash" and len(asked) == 13
    (tmp,) = choices.folder().glob("attention-a_card-*.json")
    tmp.write_text(tmp.read_text().replace('"ours"', '"a backend of the future"'))
    choices._read.cache_clear()
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_card", lambda device: "a card")
    assert choose(*inputs()) == "flash" and len(asked) == 18


def test_a_warm_up_decides_how_to_choose(as_on_a_gpu):
    _, asked = as_on_a_gpu
    with deciding("efficient"):
        assert choose(*inputs()) == "efficient" and not asked
        assert choose(*inputs(), among=("cudnn", "flash")) == "flash"  # timed: efficient may not be taken
        with deciding("timed"):
            assert choose(*inputs(T_q=30), timed=False) == "ours"
    assert choose(*inputs(T_q=30), timed=False) == "ours" and len(asked) == 2 + 5


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
