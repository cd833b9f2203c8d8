"""Several processes, through torchrun and gloo on the CPU: the losses of one, and what happens when one dies."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from tiny import tiny_data, tiny_model

from fastkit.errors import FastkitError
from fastkit.train import processes, run_folder
from fastkit.train.config import FinetuneConfig
from fastkit.train.data import Collator
from fastkit.train.finetune import finetune
from fastkit.train.order import LengthGrouped, filled

RECORDS = 6  # a step
STEPS = 6


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model, data = tiny_model(folder / "model"), tiny_data(folder / "data", records=22)  # the last step of an epoch: 4
    return dict(
        model=str(model), data=str(data), device="cpu", max_length=96, progress=False, samples=0, facts=False,
        kernels="on", plan="keep", optimizer="adamw", steps=STEPS, eval_steps=2, learning_rate=1e-3, patience=0,
    )  # fmt: skip


def torchrun(count, *args):
    """The finished torchrun of `count` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *args]
    environment = {name: value for name, value in os.environ.items() if "PROGRESS_BARS" not in name}
    environment |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONFAULTHANDLER": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def several(count, *runs):
    return torchrun(count, os.path.join(os.path.dirname(__file__), "several.py"), json.dumps(runs))


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def assert_same_run(ours, theirs):
    """All losses of two runs differ by fp32's rounding alone, and they saw the same tokens."""
    for name in ("losses", "validation_losses"):
        (steps, losses), (their_steps, their_losses) = (zip(*run[name], strict=True) for run in (ours, theirs))
        assert steps == their_steps
        assert max(abs(a - b) for a, b in zip(losses, their_losses, strict=True)) <= 1e-5, name
    for name in ("before", "after"):
        assert abs(ours[name]["validation_loss"] - theirs[name]["validation_loss"]) <= 1e-5
        assert ours[name].get("samples", theirs[name]["samples"]) == theirs[name]["samples"]
    assert ours["tokens"] == theirs["tokens"]


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("fastkit.kernels.common.INTERPRETED", False)
        return finetune(**{**settings, "samples": 1}, batch_size=RECORDS, output=str(folder))


@pytest.fixture(scope="module")
def killed(settings, tmp_path_factory):
    """(torchrun of two processes of which one was killed after step 3, the folder of the run)."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    done = several(2, {**settings, "batch_size": 3, "output": str(folder), "die_at": 3})
    return done, folder


@pytest.fixture(scope="module")
def by_two(settings, killed, tmp_path_factory):
    """(torchrun of two processes, the folder of their runs)."""
    root = tmp_path_factory.mktemp("two")
    shutil.copytree(killed[1], root / "resumed")
    runs = {
        "ddp": dict(batch_size=1, accumulation=3, progress=True),
        "fsdp2": dict(batch_size=1, accumulation=3, strategy="fsdp2", samples=1),
        "recomputed": dict(batch_size=3, strategy="fsdp2", plan="leanest"),
        "resumed": dict(batch_size=3, strategy="fsdp2", resume=True),
    }
    done = several(2, *({**settings, **run, "output": str(root / name)} for name, run in runs.items()))
    assert done.returncode == 0, done.stderr
    assert "not fused" not in done.stderr
    return done, root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "recomputed"])
def test_two_processes_have_the_losses_of_one(alone, by_two, name):
    ours = metrics(by_two[1] / name)
    assert ours["processes"] == 2 and ours["kernels"]["layers"] == 2
    assert_same_run(ours, alone)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(killed):
    done, folder = killed
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert not (folder / "metrics.json").exists()
    assert run_folder.last_checkpoint(folder).name == "checkpoint-2"


@pytest.mark.slow
def test_two_processes_go_on_sharded_from_a_run_that_was_not(alone, by_two):
    ours = metrics(by_two[1] / "resumed")
    assert ours["resumed_from"] == "checkpoint-2"
    assert_same_run(ours, alone)


@pytest.mark.slow
def test_one_process_goes_on_from_a_checkpoint_of_two(settings, alone, killed, tmp_path, monkeypatch):
    monkeypatch.setattr("fastkit.kernels.common.INTERPRETED", False)
    shutil.copytree(killed[1], tmp_path / "run")
    ours = finetune(**settings, batch_size=RECORDS, output=str(tmp_path / "run"), resume=True)
    assert ours["resumed_from"] == "checkpoint-2"
    assert_same_run(ours, alone)


@pytest.mark.slow
def test_three_processes_go_on_from_what_two_held_in_parts(settings, alone, by_two, tmp_path):
    shutil.copytree(by_two[1] / "resumed", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    done = several(3, {**settings, "batch_size": 2, "output": str(tmp_path / "run"), "resume": True})
    assert done.returncode == 0, done.stderr
    ours = metrics(tmp_path / "run")
    assert ours["resumed_from"] == "checkpoint-4"
    assert_same_run(ours, alone)


@pytest.mark.slow
def test_one_log_one_bar_and_one_writer(by_two):
    done, folder = by_two
    assert done.stdout.count("resuming from") == 1
    assert done.stderr.count("Tokenizing: 100%") == 2 * 4  # train and validation of four runs
    assert done.stderr.count("| 0/6 [00:00<?, ?step/s]") == 1
    for name in ("ddp", "fsdp2"):
        assert sorted(path.name for path in (folder / name).iterdir()) == [
            "adapter", "checkpoint-4", "checkpoint-6", "metrics.json", "run.json",
        ]  # fmt: skip
        assert (folder / name / "checkpoint-6/optimizer.pt").is_file()


@pytest.mark.slow
def test_an_error_of_the_first_process_is_said_once_and_ends_all(settings, by_two):
    flags = [f"--{name}={settings[name]}" for name in ("model", "data", "device")]
    done = torchrun(2, "-m", "fastkit", "finetune", *flags, f"--output={by_two[1] / 'ddp'}")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("fastkit: ")]
    assert len(said) == 1 and "already holds a run" in said[0]
    assert "already holds a run" in done.stderr.partition("Root Cause")[2]  # torchrun's last words
    assert "[rank" not in done.stderr  # no traceback


def test_fillers_come_last_and_train_nothing():
    tokens = Dataset.from_list([{"input_ids": [5, 6, 7][:n], "labels": [-100, 6, 7][:n]} for n in (3, 2, 3, 2, 3)])
    full = filled(tokens, 4)
    assert len(full) == 8 and filled(full, 4) is full
    order = LengthGrouped([3, 2, 3, 2, 3], 4, seed=0, fillers=3)
    assert len(order) == 8 and sorted(list(order)[:5]) == [0, 1, 2, 3, 4] and list(order)[5:] == [5, 6, 7]
    batch = Collator(0)([full[5], full[6]])
    assert (batch["shift_labels"] == -100).all() and batch["shift_labels"].shape == (2, 1)
    assert batch["logits_to_keep"].tolist() == [0]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "count", "fits"), [(2, 2, 1, True), (2, 1, 2, True), (4, 1, 2, False)]
)
def test_a_resumed_run_keeps_its_records_a_step(tmp_path, monkeypatch, batch_size, accumulation, count, fits):
    run_folder.claim(FinetuneConfig(batch_size=4, output=str(tmp_path)))
    monkeypatch.setenv("WORLD_SIZE", str(count))
    config = FinetuneConfig(batch_size=batch_size, accumulation=accumulation, output=str(tmp_path), resume=True)
    if fits:
        run_folder.check(config)
    else:
        with pytest.raises(FastkitError, match=r"8 records a step, which were 4: .* times 2 processes, is 4"):
            run_folder.check(config)


def test_each_process_takes_its_own_gpu(monkeypatch):
    assert processes.count() == 1 and processes.is_first() and processes.device_of("auto") == "auto"
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert processes.count() == 2 and not processes.is_first()
    assert processes.device_of("cuda") == "cuda:1" and processes.device_of("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert processes.device_of("auto") == "cuda:1"
    with pytest.raises(FastkitError, match="cuda:0 would put 2 processes on one GPU"):
        processes.device_of("cuda:0")


@pytest.mark.parametrize(
    ("settings", "part"), [(dict(optimizer="adamw8bit"), "--optimizer adamw"), (dict(dtype="fp16"), "bf16 or fp32")]
)
def test_what_cannot_be_sharded_is_refused(settings, part):
    with pytest.raises(FastkitError, match=part):
        FinetuneConfig(**{"strategy": "fsdp2", "optimizer": "adamw", **settings}).check()


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_process_ends_with_its_code_and_all_that_it_said(count):
    code = "import atexit; from fastkit.train import processes; atexit.register(print, 'b'); print('a'); "
    command = [sys.executable, "-c", f"{code}processes.end(3)"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"WORLD_SIZE": count})
    assert (done.returncode, done.stdout) == (3, "a\nb\n"), done.stderr
