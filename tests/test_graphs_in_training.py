"""--graphs: a fine-tune whose passes are launched as CUDA graphs."""

from types import SimpleNamespace

import pytest
import torch
from stopping import stop_at_a_checkpoint
from test_trainer import inputs, train  # noqa: F401  a fixture

from fastkit.errors import FastkitError
from fastkit.models import attend, graphs
from fastkit.train.config import FinetuneConfig
from fastkit.train.finetune import FineTune, finetune
from fastkit.train.packing import RowCollator


def test_rows_of_one_length(fresh_seed):
    rows = [[{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}], []]
    batch = RowCollator(0, width=16)(rows)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert all(x.shape == (1, 16) for x in batch.values())
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, *range(-11, 0)]
    assert batch["labels"][0].tolist() == [-100, 6, 7, -100, 9] + 11 * [-100]


@pytest.mark.parametrize("flags", [{"plan": "off"}, {"plan": "keep", "packing": "off"}])
def test_graphs_need_fused_layers_and_packed_rows(flags):
    with pytest.raises(FastkitError, match="--graphs on is for fused layers and rows of one length"):
        FinetuneConfig(graphs="on", **flags).check()


@pytest.mark.parametrize("wanted", ["on", "auto"])
def test_where_a_run_cannot_be_captured(inputs, tmp_path, references, wanted):  # noqa: F811
    settings = dict(graphs=wanted, plan="keep", packing="on", kernels="on", steps=1)
    if wanted == "auto":
        assert not train(inputs, tmp_path / "run", **settings)["graphs"]
        return
    with pytest.raises(FastkitError, match="--graphs on: a step of this model cannot be captured: it is not on a GPU"):
        train(inputs, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "captured"),
    [
        ({}, True),
        ({"graphs": "off"}, False),
        ({"packing": "off"}, False),
        ({"private": True}, False),
        ({"max_length": 4096}, False),  # 7e9 parameters, 2.9e13 in all
        ({"max_length": 4096, "graphs": "on"}, True),
        ({"max_length": 4096, "compute": "fp8"}, True),
        ({"max_length": 8192, "compute": "fp8"}, False),
    ],
)
def test_small_passes_are_captured(monkeypatch, changes, captured):
    monkeypatch.setattr(graphs, "lacking", lambda model: "")
    monkeypatch.setattr(attend, "architecture", lambda device: device)
    base = SimpleNamespace(num_parameters=lambda: 7e9)
    run = SimpleNamespace(model=SimpleNamespace(get_base_model=lambda: base), dtype=torch.bfloat16, device="sm_90")
    run.config = FinetuneConfig(**{"packing": "on", "batch_size": 1, "max_length": 2048, **changes})
    assert FineTune._captures(run) == captured
    for run.device, run.dtype, why in (
        ("sm_90", torch.float16, "its losses are scaled"),
        ("sm_90", torch.float32, "attention in float32 is torch's on this card"),
        ("sm_75", torch.bfloat16, "attention in bfloat16 is torch's on this card"),
    ):
        if run.config.graphs == "on":
            with pytest.raises(FastkitError, match=f"cannot be captured: {why}"):
                FineTune._captures(run)
        else:
            assert not FineTune._captures(run)


@pytest.mark.gpu
def test_a_run_by_graphs_learns_the_same(inputs, tmp_path):  # noqa: F811
    settings = dict(device="cuda", plan="keep", packing="on", max_length=128, batch_size=1, accumulation=2, steps=8)
    apart = train(inputs, tmp_path / "apart", graphs="off", **settings)
    captured = train(inputs, tmp_path / "captured", **settings)  # as of itself, for it is small
    assert captured["graphs"] and not apart["graphs"] and captured["tokens"] == apart["tokens"]
    for name in ("losses", "validation_losses"):
        ours, theirs = ([loss for _, loss in run[name]] for run in (captured, apart))
        assert ours == pytest.approx(theirs, rel=5e-3), name
    settings = inputs | settings | dict(graphs="on", eval_steps=4, learning_rate=1e-3, output=str(tmp_path / "resumed"))
    stop_at_a_checkpoint(**settings)
    resumed = finetune(**settings, resume=True)
    assert resumed["resumed_from"] == "checkpoint-4"
    assert resumed["losses"][-1][1] == pytest.approx(captured["losses"][-1][1], rel=5e-3)
