"""compute="fp8" in a fine-tune and its warm-up."""

import copy

import pytest
import torch
from cards import needs_fp8
from fused_case import BATCH, fused, model_of
from test_trainer import inputs, train  # noqa: F401  a fixture

from fastkit.errors import FastkitError
from fastkit.models import half, pieces
from fastkit.models.patch import fused_layers
from fastkit.models.plans import PLANS
from fastkit.models.warmup import warm_up
from fastkit.train.config import FinetuneConfig

pytestmark = needs_fp8
SETTINGS = dict(steps=4, accumulation=2, batch_size=2)


@pytest.mark.slow
def test_a_fine_tune(inputs, tmp_path, references):  # noqa: F811
    plain = train(inputs, tmp_path / "plain", kernels="on", plan="keep", **SETTINGS)
    ours = train(inputs, tmp_path / "fp8", kernels="on", plan="auto", budget="2GiB", compute="fp8", **SETTINGS)
    assert ours["config"]["compute"] == "fp8" and ours["kernels"]["layers"] == 2
    assert ours["memory"]["workspace"] <= plain["memory"]["workspace"]
    assert 0 < abs(ours["after"]["validation_loss"] - plain["after"]["validation_loss"]) <= 0.02
    with pytest.raises(
        FastkitError, match="--compute fp8 is for fused layers, and this run has none: add --kernels on"
    ):
        train(inputs, tmp_path / "none", plan="keep", compute="fp8", device="cpu", **SETTINGS)


def test_a_warm_up(folders, references):
    found = warm_up(
        str(folders["llama"]), batch=1, seq=8, rank=4, plans=["keep"], compute="fp8", every_length=False, device="cpu"
    )
    assert found.steps == 4
    with pytest.raises(FastkitError, match="no compute 'fp4'"):
        warm_up(str(folders["llama"]), seq=8, plans=["keep"], compute="fp4", every_length=False, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(), "--compute fp8 is for fused layers, and --plan off fuses none: add --plan auto"),
        (dict(plan="auto", dropout=0.1), "--compute fp8 has the adapters in the weights: leave out --dropout 0.1"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(FastkitError, match=message):
        FinetuneConfig(compute="fp8", **settings).check()


def test_a_resumed_run_keeps_its_compute():
    config = FinetuneConfig(compute="fp8", plan="auto")
    assert config.differences(FinetuneConfig(plan="auto").as_dict()) == ["compute"]
    assert not config.differences(copy.deepcopy(config).as_dict())


HOOKS = {"another": lambda gradient: 1.5 * gradient, "in place": lambda gradient: gradient.mul_(1.5)}


@pytest.mark.parametrize("between", ["nothing", *HOOKS, "a sum"])
@pytest.mark.parametrize("plan", ["keep", "recompute-all", "leanest"])
def test_a_gradient_in_fp8_is_taken_for_the_one_beside_it_alone(folder, references, monkeypatch, between, plan):
    """Not where a hook between two layers changed that, or another was added; nor in parts. No bit differs for it."""
    model, taken, to_multiply = fused(model_of(folder), plan, "fp8"), [], half.Half.to_multiply

    def watched(self, dy):
        taken.append(isinstance(found := to_multiply(self, dy), pieces.FP8Rows))
        return found

    def meddle(module, args, y):
        if between in HOOKS:
            y.register_hook(HOOKS[between])  # a tensor's hook that returns what it was given changes it in place
        elif between == "a sum":
            seen.append(y)

    def run():
        seen.clear(), model.zero_grad()
        loss = model(**BATCH, use_cache=False).loss
        (loss + sum(y.square().sum() for y in seen)).backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    seen = []
    monkeypatch.setattr(half.Half, "to_multiply", watched)
    fused_layers(model)[0].layer.register_forward_hook(meddle)
    loss, gradients = run()
    expected = [False, True, between == "nothing", True]  # back from the last half
    assert taken == (expected if PLANS[plan].chunks == 1 else [False] * len(taken))
    assert not half._written
    monkeypatch.setattr(half.Half, "room", lambda self, x, group: None)
    again, expected = run()
    assert loss == again and all(torch.equal(gradients[name], each) for name, each in expected.items())
