"""A killed run goes on as if nothing had happened: SIGKILL at a random step, and in the middle of a checkpoint."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_data, tiny_model

from fastkit.train.run_folder import last_checkpoint

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return tiny_model(folder / "model"), tiny_data(folder / "data", records=24)


def command(inputs, output, optimizer, *extra):
    model, data = inputs
    flags = f"--steps {STEPS} --batch-size 3 --accumulation 2 --eval-steps 2 --max-length 96 --device cpu --dropout 0.1"
    named = ["--model", str(model), "--data", str(data), "--output", str(output), "--optimizer", optimizer]
    return [sys.executable, "-m", "fastkit", "finetune", *named, *flags.split(), "--no_facts", "--no_progress", *extra]


def run(args, **changes):
    return subprocess.run(args, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | changes)


def losses(output) -> dict[int, float]:
    return dict(json.loads((Path(output) / "metrics.json").read_text())["losses"])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_killed_at_a_random_step_and_resumed_has_the_same_losses(inputs, tmp_path, optimizer):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(command(inputs, whole, optimizer)).returncode == 0
    kill_after = random.randrange(2, STEPS - 1, 2)  # a checkpoint stands at each even step
    print("killed after checkpoint", kill_after)
    process = subprocess.Popen(
        command(inputs, killed, optimizer),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (killed / f"checkpoint-{kill_after}").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "metrics.json").exists(), "the run ended before it was killed"
    resumed = run(command(inputs, killed, optimizer, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    expected, got = losses(whole), losses(killed)
    assert expected.keys() == got.keys() == set(range(1, STEPS + 1))
    assert max(abs(expected[s] - got[s]) for s in expected) <= 1e-5


KILL_IN_SAVE = """
import os, signal, sys
import torch
real = torch.save
def dying(value, path, *args, **kwargs):  # the optimizer's state: the adapter of this checkpoint is written already
    if "checkpoint-6" in str(path) and str(path).endswith("optimizer.pt"):
        open(path, "wb").write(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(value, path, *args, **kwargs)
torch.save = dying
from fastkit.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_kill_during_a_checkpoint_leaves_the_last_good_one(inputs, tmp_path):
    output = tmp_path / "run"
    args = command(inputs, output, "adamw8bit")
    died = run([sys.executable, "-c", KILL_IN_SAVE, *args[3:]])
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert last_checkpoint(output).name == "checkpoint-4"
    assert list(output.glob(".staging-*")), "the kill came while a checkpoint was being written"
    resumed = run(command(inputs, output, "adamw8bit", "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint-4" in resumed.stdout
    assert not list(output.glob(".staging-*"))


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(inputs, tmp_path):
    output = tmp_path / "run"
    assert run(command(inputs, output, "adamw", "--resume")).returncode == 0
    assert len(losses(output)) == STEPS
