"""`fastkit bench learning`: ours beside transformers, step by step, on a tiny model; and that it would show a fault."""

import json
import math

import pytest
import torch
from tiny import tiny_data, tiny_model

from fastkit.cli import main
from fastkit.errors import FastkitError
from fastkit.lab import results
from fastkit.models import pieces
from fastkit.models.patch import Report
from fastkit.models.plans import PLANS
from fastkit.train import same_learning
from fastkit.train.same_learning import LIMITS, Learned, SameLearningConfig, compare, differences, judge, learn, table

pytestmark = pytest.mark.usefixtures("references")


@pytest.fixture(scope="module")
def inputs(folder):
    return {"model": str(tiny_model(folder / "tiny")), "data": str(tiny_data(folder / "data", records=24))}


def config(inputs, **changes) -> SameLearningConfig:
    small = dict(steps=5, device="cpu", dtype="fp32", rank=4, learning_rate=2e-3, max_length=64, validation_records=4)
    return SameLearningConfig(**{**inputs, **small, **changes})


def furthest(a: Learned, b: Learned) -> float:
    return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("learning_rate", [2e-4, 2e-3])  # ten times that, at rank 64, one bit grows to 0.1
def test_thirty_steps_in_fp32(inputs, rank, learning_rate):
    found = compare(config(inputs, steps=30, rank=rank, learning_rate=learning_rate))
    ours = found["rows"][1]
    assert found["dtype"] == "fp32" and ours["beyond"] is None
    assert ours["max_drift"] <= 2e-5, ours
    assert abs(ours["validation_drift"]) <= 1e-5, ours
    assert found["runs"]["transformers"].losses[-1] < found["runs"]["transformers"].losses[0] - 1e-3  # it learned


def test_every_plan_and_a_second_run(inputs):
    found = compare(config(inputs, plan=["all"], repeat_stock=True, optimizer="adamw"))
    rows = {row["who"]: row for row in found["rows"]}
    assert list(rows) == ["transformers", "transformers again", *(f"ours, {plan}" for plan in PLANS)]
    assert rows["transformers again"]["max_drift"] == 0 and "beyond" not in rows["transformers again"]
    for plan in PLANS:
        assert rows[f"ours, {plan}"]["max_drift"] <= 2e-5 and rows[f"ours, {plan}"]["beyond"] is None


def test_each_run_is_judged_by_the_limits_of_what_it_computes_in(inputs, monkeypatch):
    def learned(config, plan, batches, compute):
        return Learned([2.1 if compute == "fp8" else 2.001] if plan else [2.0], 2.02 if plan else 2.0), batches

    monkeypatch.setattr(same_learning, "learn", learned)
    found = compare(config(inputs, compute=["auto", "fp8"]))
    assert [row["who"] for row in found["rows"]] == ["transformers", "ours, keep", "ours, keep, FP8"]
    assert "a loss of the first steps" in found["rows"][1]["beyond"]  # 1e-4 in fp32
    assert found["rows"][2]["beyond"] is None  # 1.5% of the validation loss


def test_the_truth_is_transformers_in_fp32(inputs, monkeypatch):
    of = {("fp32", None): 2.0, ("bf16", None): 2.1, ("bf16", "keep"): 2.01}

    def learned(config, plan, batches, compute):
        return Learned([of[config.dtype, plan]] * 2, of[config.dtype, plan]), batches

    monkeypatch.setattr(same_learning, "learn", learned)
    found = compare(config(inputs, dtype="bf16", truth=True))
    stock, truth, ours = found["rows"]
    assert truth["who"] == same_learning.TRUTH and "beyond" not in truth
    assert not any("from_fp32" in name for name in truth)
    assert stock["mean_relative_drift_from_fp32"] == pytest.approx(0.05)
    assert ours["validation_drift_from_fp32"] == pytest.approx(0.005) and "the mean of the losses" in ours["beyond"]
    shown = table(found).split("fp32, the mean of the losses and the validation loss:\n")[1]
    assert shown.split("\n") == ["  transformers: 5.0000%, +5.0000%", "  ours, keep: 0.5000%, +0.5000%"]


def test_splitting_and_packing_change_no_loss(inputs):
    for plan in (None, "leanest"):
        whole, _ = learn(config(inputs), plan)
        for changes in (dict(accumulation=4), dict(packed=True), dict(accumulation=2, packed=True)):
            other, _ = learn(config(inputs, **changes), plan)
            assert furthest(whole, other) <= 2e-5, (plan, changes)
            assert other.validation == pytest.approx(whole.validation, abs=1e-5)
    other_seed, _ = learn(config(inputs, seed=1), None)
    assert furthest(whole, other_seed) > 1e-2


@pytest.mark.parametrize("fault", ["a gradient by half a percent", "a layer that is left out"])
def test_a_fault_shows(inputs, monkeypatch, fault):
    if fault.startswith("a gradient"):
        right = pieces.gated_backward_
        monkeypatch.setattr(pieces, "gated_backward_", lambda da, gate_up: right(da, gate_up).mul_(1.005))
        rows = compare(config(inputs, steps=12, learning_rate=2e-2))["rows"]
        assert "a loss of the first steps differs by" in rows[1]["beyond"]
    else:
        monkeypatch.setattr(same_learning, "patch", lambda *_, **__: Report(layers=1, left={"layers.1": "quantized"}))
        with pytest.raises(FastkitError, match=r"(?s)not all of .* is fused: .*layers\.1: quantized"):
            compare(config(inputs))


def test_a_batch_that_goes_through_transformers_is_no_result(inputs, monkeypatch):
    from fastkit.models.projection import Refusal
    from fastkit.models.sequences import Sequences

    def read(*_):
        raise Refusal("for the test")

    monkeypatch.setattr(Sequences, "read", read)
    with pytest.raises(UserWarning, match="not fused: for the test"):
        learn(config(inputs), "keep")


def test_differences_and_limits():
    stock, ours = Learned([2.0, 4.0, 1.0], 2.0), Learned([2.0, 4.4, 0.9], 1.9)
    found = differences(stock, ours)
    assert found["max_drift"] == pytest.approx(0.4) and found["mean_drift"] == pytest.approx(0.5 / 3)
    assert found["mean_relative_drift"] == pytest.approx(0.2 / 3) and found["validation_drift"] == pytest.approx(-0.05)
    late = differences(Learned([1.0] * 40, 1.0), Learned([1.0] * 35 + [1.1] * 5, 1.0))
    assert late["max_drift_first"] == 0 and late["max_drift"] == pytest.approx(0.1)
    assert judge(late, LIMITS["fp32"]) == [] and len(judge(late, LIMITS["bf16"])) == 1
    assert len(judge(found, LIMITS["bf16"])) == 2 and len(judge(found, LIMITS["fp8"])) == 1
    assert judge(found, LIMITS["fp32"]) == ["a loss of the first steps differs by 0.4, allowed is 0.0001"]
    none = differences(stock, Learned([2.0, math.nan, 1.0], math.nan))
    assert judge(none, LIMITS["fp32"]) and len(judge(none, LIMITS["bf16"])) == 2


def test_the_command(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(same_learning, "record", lambda *args: results.record(*args, folder=tmp_path))
    monkeypatch.setattr(same_learning, "resolve_device", lambda device="cpu": torch.device("cpu"))
    flags = ["--model", inputs["model"], "--data", inputs["data"], "--steps", "2", "--max_length", "64", "--rank", "4"]
    assert main(["bench", "learning", *flags, "--truth", "--record", "trial"]) == 0
    out = capsys.readouterr().out
    assert "ours, keep: drift at most" in out and "the same, within limits" in out and "recorded in" in out
    rows = results.load(tmp_path / "trial.json")["rows"]
    assert [row["step"] for row in rows if row["what"] == "loss"] == [1, 2]
    assert {row["who"] for row in rows if row["what"] == "run"} == {"transformers", same_learning.TRUTH, "ours, keep"}
    monkeypatch.setattr(same_learning, "LIMITS", {"fp32": same_learning.Limits(each=-1.0)})
    assert main(["bench", "learning", *flags, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["losses"]["transformers"]) == 2


def test_what_is_broken_off_leaves_the_runs_before(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(same_learning, "record", lambda *args: results.record(*args, folder=tmp_path))
    monkeypatch.setattr(same_learning, "resolve_device", lambda device="cpu": torch.device("cpu"))
    learn = same_learning.learn

    def interrupted(config, plan, *rest):
        if plan is not None:
            raise KeyboardInterrupt
        return learn(config, plan, *rest)

    monkeypatch.setattr(same_learning, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        same_learning.run(config(inputs, steps=2, truth=True, record="trial"), "fastkit bench learning")
    rows = results.load(tmp_path / "trial.json")["rows"]
    assert [row["who"] for row in rows if row["what"] == "run"] == ["transformers", same_learning.TRUTH]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "0"], "--steps 0 must be 1 or more"),
        (["--learning_rate", "0"], "--learning_rate 0.0 must be above 0"),
        (["--batch_size", "4", "--accumulation", "3"], "do not split into --accumulation 3 passes"),
        (["--plan", "fastest"], "there is no plan 'fastest'"),
        (["--compute", "fp4"], "--compute 'fp4' is unknown"),
        (["--batch_size", "999"], "do not make a step of --batch_size 999"),
    ],
)
def test_bad_input_is_one_line(inputs, capsys, flags, said):
    given = ["--model", inputs["model"], "--data", inputs["data"], "--max_length", "64"]
    assert main(["bench", "learning", *given, *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastkit: ") and said in error
