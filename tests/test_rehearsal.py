"""What is done before the first step: a pass of which nothing stays, and how the allocator works."""

import os
import subprocess
import sys

import pytest
import torch
from test_trainer import curve, inputs  # noqa: F401  a fixture

from fastkit.lab.sources import child_environment
from fastkit.models import pieces
from fastkit.train.callbacks import Rehearsal
from fastkit.train.finetune import FineTune
from fastkit.train.memory import ALLOCATOR, growing_segments

pytestmark = pytest.mark.slow


def train(inputs, output, rehearsed, **settings):  # noqa: F811
    defaults = dict(steps=4, batch_size=2, accumulation=2, eval_steps=4, learning_rate=1e-3)
    with FineTune(**{**inputs, **defaults, **settings}, output=str(output)) as run:
        run.prepare()
        if rehearsed and run.device.type == "cpu":  # on a GPU it is done anyway
            run.trainer.add_callback(Rehearsal(run.trainer.rehearse))
        return run.train()


@pytest.mark.parametrize("packing", ["off", "on"])
def test_nothing_stays_of_a_rehearsal(inputs, tmp_path, references, packing):  # noqa: F811
    settings = dict(kernels="on", plan="keep", dropout=0.3, packing=packing, device="cpu")
    with_one, without = (train(inputs, tmp_path / str(each), each, **settings) for each in (True, False))
    assert curve(with_one) == curve(without) and with_one["tokens"] == without["tokens"]
    assert with_one["validation_losses"] == without["validation_losses"]


@pytest.mark.parametrize("steps", [-1, 3])
@pytest.mark.parametrize("packing", ["off", "on"])
def test_the_widest_batch_is_rehearsed_and_the_first(inputs, tmp_path, references, packing, steps):  # noqa: F811
    settings = dict(kernels="on", plan="keep", packing=packing, device="cpu", batch_size=2, eval_steps=99, steps=steps)
    with FineTune(**{**inputs, **settings, "output": str(tmp_path)}) as run:
        run.prepare()
        collate, widths = run.trainer.data_collator, []

        def seen(records):
            batch = collate(records)
            widths.append(batch["input_ids"].shape[1])
            return batch

        run.trainer.data_collator = seen
        run.trainer.add_callback(Rehearsal(run.trainer.rehearse))
        run.train()
    count = run.trainer.state.max_steps
    rehearsed, trained = widths[:2], widths[2 : 2 + count]
    assert rehearsed == [max(trained), trained[0]]
    assert len(set(trained)) > 1 or packing == "on"


def test_a_rehearsal_finds_out_that_memory_does_not_suffice(inputs, tmp_path, references, monkeypatch):  # noqa: F811
    """The first step then has the leaner plan, and none of the rehearsal's passes."""
    settings = dict(kernels="on", plan="keep", device="cpu")
    expected = train(inputs, tmp_path / "without", True, **settings)
    work, calls = pieces.gated_backward_, []

    def breaks_once(*args):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return work(*args)

    monkeypatch.setattr(pieces, "gated_backward_", breaks_once)
    with pytest.warns(UserWarning, match="step 0 begins again under 2 layers"):
        ours = train(inputs, tmp_path / "with", True, **settings)
    assert len(ours["plans_switched"]) == 1
    assert len(calls) == 1 + 2 * 2 + 2 * 2 * 4  # two layers: the one that broke off, two passes before, two a step
    assert curve(ours) == pytest.approx(curve(expected), rel=1e-6)


@pytest.mark.gpu
def test_a_rehearsed_run_is_captured_before_its_first_step(inputs, tmp_path):  # noqa: F811
    settings = dict(device="cuda", plan="keep", packing="on", max_length=128, batch_size=1, graphs="on")
    with FineTune(**{**inputs, **settings, "steps": 2, "eval_steps": 2, "output": str(tmp_path)}) as run:
        run.prepare()
        captured, graphs = [], run.trainer.graphs
        one_pass = graphs._pass
        graphs._pass = lambda *args: captured.append(run.trainer.state.global_step) or one_pass(*args)
        run.train()
    assert captured == [0, 0]  # launch by launch and captured, both in the rehearsal


@pytest.fixture
def told(monkeypatch):
    """What torch's allocator is told; the environment says nothing to it."""
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")  # that it be as it was, afterwards
        monkeypatch.delenv(name)
    said = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", said.append)
    return said


@pytest.mark.skipif(sys.platform != "linux", reason="torch grows segments on Linux alone")
@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("PYTORCH_ALLOC_CONF", None, "expandable_segments:True"),
        ("PYTORCH_CUDA_ALLOC_CONF", "backend:native", "backend:native,expandable_segments:True"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False", None),
    ],
)
def test_the_allocator_grows_its_segments_unless_told_otherwise(name, given, expected, told, monkeypatch):
    if given is not None:
        monkeypatch.setenv(name, given)
    growing_segments()
    assert told == [expected] * (expected is not None)
    assert {name: os.environ[name] for name in ALLOCATOR if name in os.environ} == {name: expected or given}


@pytest.mark.gpu
def test_segments_grow_in_a_process_that_imported_all_and_saw_the_gpu():
    program = """
import torch
import fastkit.train.finetune
from fastkit.train.memory import growing_segments
torch.cuda.get_device_properties(0)
growing_segments()
x = torch.ones(2**24, device="cuda")
assert all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
"""
    environment = {name: value for name, value in child_environment().items() if name not in ALLOCATOR}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
