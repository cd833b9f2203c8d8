"""compute="fp8" in a fine-tune and its warm-up."""

import copy

import pytest
from cards import needs_fp8
from test_trainer import inputs, train  # noqa: F401  a fixture

from fastkit.errors import FastkitError
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
