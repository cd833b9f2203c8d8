"""Fine-tuning with fused layers: every plan, the budget's choice, and a step that runs out of memory."""

import pytest
import torch
from test_trainer import curve, inputs, train  # noqa: F401  a fixture

from fastkit.errors import FastkitError
from fastkit.models import mlp_half, pieces
from fastkit.models.plans import PLANS

SETTINGS = dict(steps=4, accumulation=2, batch_size=2)

pytestmark = [pytest.mark.usefixtures("references"), pytest.mark.slow]


@pytest.fixture(scope="module")
def stock(inputs, tmp_path_factory):  # noqa: F811
    return train(inputs, tmp_path_factory.mktemp("stock"), kernels="off", **SETTINGS)


def far(a, b):
    return max(abs(x - y) for x, y in zip(curve(a), curve(b), strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_learns_as_transformers_does(inputs, stock, tmp_path, plan):  # noqa: F811
    ours = train(inputs, tmp_path, kernels="on", plan=plan, **SETTINGS)
    assert ours["kernels"]["layers"] == 2 and not ours["kernels"]["left"] and not ours["plans_switched"]
    assert far(ours, stock) <= 1e-4
    assert ours["memory"]["plans"] == f"2 layers {plan}"


def test_auto_takes_what_the_budget_buys(inputs, stock, tmp_path, capsys):  # noqa: F811
    large = train(inputs, tmp_path / "large", kernels="on", plan="auto", budget="2GiB", **SETTINGS)
    assert large["memory"]["plans"] == "2 layers keep" and "peak" in capsys.readouterr().out
    peak = large["memory"]["peak"]
    small = train(inputs, tmp_path / "small", kernels="on", plan="auto", budget=f"{peak}GiB", **SETTINGS)
    assert small["memory"]["peak"] < peak and small["memory"]["plans"] != "2 layers keep"
    assert far(large, stock) <= 1e-4 and far(small, stock) <= 1e-4
    with pytest.raises(FastkitError, match="the leanest plan needs"):
        train(inputs, tmp_path / "none", kernels="on", plan="auto", budget="1MiB", **SETTINGS)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("gated", 3 * 2 + 2),  # once a layer and pass
        ("gated_backward_", 3 * 2 + 2),
    ],
    ids=["forward", "backward"],
)
def test_a_step_that_runs_out_of_memory_begins_again_and_loses_nothing(inputs, tmp_path, monkeypatch, name, call):  # noqa: F811
    """The second pass of the second step breaks off, when gradients of the first are there, and some of its own."""
    settings = SETTINGS | {"dropout": 0.3}
    expected = train(inputs, tmp_path / "without", kernels="on", plan="keep", **settings)
    calls, work = [], getattr(pieces, name)

    def breaks_once(*args):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return work(*args)

    monkeypatch.setattr(mlp_half.pieces, name, breaks_once)
    with pytest.warns(UserWarning, match="step 1 begins again under 2 layers"):
        ours = train(inputs, tmp_path / "with", kernels="on", plan="keep", **settings)
    assert len(ours["plans_switched"]) == 1
    assert far(ours, expected) <= 1e-6


def test_no_leaner_plan_ends_with_what_to_do(inputs, tmp_path, monkeypatch):  # noqa: F811
    def breaks(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(pieces, "gated_backward_", breaks)
    with pytest.warns(UserWarning, match="begins again"), pytest.raises(FastkitError, match="halve --batch_size"):
        train(inputs, tmp_path, kernels="on", plan="recompute-mlp-qkv+offload", **SETTINGS)


def test_an_unknown_plan_is_refused_before_anything_is_loaded(inputs, tmp_path):  # noqa: F811
    with pytest.raises(FastkitError, match="there is no plan 'fast'"):
        train(inputs, tmp_path, plan="fast")
    with pytest.raises(FastkitError, match="no amount of memory"):
        train(inputs, tmp_path, plan="auto", budget="lots")
