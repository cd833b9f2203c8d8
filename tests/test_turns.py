"""One process at a time measures on a GPU."""

import os
import subprocess
import sys
import types

import pytest
import torch

from fastkit.lab import turns

pytest.importorskip("fcntl")
HOLD = """
import sys
from fastkit.lab import turns
with turns._lock_file("{gpu}") as lock:
    turns.fcntl.flock(lock, turns.fcntl.LOCK_EX)
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def gpu(monkeypatch):
    name = f"test-{os.getpid()}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=name))
    return name


def test_who_comes_second_waits_and_says_so(gpu, capsys, monkeypatch):
    with turns.turn():
        pass
    assert capsys.readouterr().out == ""
    command, flock = [sys.executable, "-c", HOLD.format(gpu=gpu)], turns.fcntl.flock
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"

        def watched(lock, how):
            if how == turns.fcntl.LOCK_EX:  # it is about to wait
                other.kill()  # who ends, however it ends, lets go
            flock(lock, how)

        monkeypatch.setattr(turns.fcntl, "flock", watched)
        with turns.turn():
            assert other.wait(10) < 0
    assert "waiting for its turn to end" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_held(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(turns, "_lock_file", lambda gpu: pytest.fail("held"))
    with turns.turn():
        pass
