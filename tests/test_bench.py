"""`fastkit bench`: what it refuses, what it leaves out, its table; on a GPU a real run that is recorded."""

import os
import re
import warnings

import kernel_limits
import pytest
import torch

from fastkit.cli import main
from fastkit.kernels.common import Cost
from fastkit.lab import bench_case, bench_kernels, bench_ladders, bench_peers, worker
from fastkit.lab.bench import _is_right, groups, table
from fastkit.lab.bench_case import Case
from fastkit.lab.results import load


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(capsys):
    assert main(["bench", "rms_norm", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "need a GPU; recorded ones are in data/results: " in captured.err
    assert "ladders_h100" in captured.err and captured.err.count("\n") == 1


def test_unknown_names_and_flags(capsys):
    assert main(["bench", "softmux"]) == 2
    assert "no benchmark 'softmux': there are kernels, ladders, rms_norm, add_rms_norm, " in capsys.readouterr().err
    for argv in (["bench", "--speed"], ["bench", "--record", "x", "copy"]):
        assert main(argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "fastkit bench [kernels rms_norm " in capsys.readouterr().out


def case(**other):
    expected = torch.arange(6.0)
    found = dict(op="f", size="6", dtype=torch.float32, cost=Cost(1, 1), contenders={}, expected=(expected,))
    return Case(**found | other)


def refuse():
    raise NotImplementedError("needs sm_90 and this is sm_80")


@pytest.mark.parametrize(
    ("run", "note"),
    [
        (lambda: torch.arange(6.0), None),
        (lambda: (torch.arange(6.0) * 1.00001,), None),
        (lambda: torch.arange(6.0) * 1.01, r"f 6: it is WRONG by up to 0\.05, allowed is 0\.0005: not timed"),
        (lambda: torch.arange(6.0).log(), "it is WRONG by up to inf"),
        (lambda: torch.arange(6.0).where(torch.arange(6) < 5, torch.nan), "it is WRONG by up to nan"),
        (refuse, "f 6: it is left out: needs sm_90 and this is sm_80"),
    ],
)
def test_only_right_results_are_timed(run, note):
    notes = []
    assert _is_right("it", run, case(), "f 6", notes) == (note is None)
    assert len(notes) == (note is not None)
    if note:
        assert re.search(note, notes[0])


def test_an_output_left_unwritten_is_wrong():
    output = torch.arange(6.0)  # right, but by another contender
    notes = []
    assert not _is_right("it", lambda: output, case(output=output), "f 6", notes) and "WRONG" in notes[0]


def test_the_table():
    row = dict(op="copy", size="64", dtype="float32", floor_ms=0.5, predicted_ms=0.5, limit="memory", unit="GB/s")
    times = dict(median_ms=0.625, p20_ms=0.6, p80_ms=0.7, noise_ms=0.01, runs=9, launch_us=4.0, times_fastest=1.0)
    fast = row | times | dict(who="fastkit", verdict="fastest", rate=2400.0, of_floor=0.8)
    other = fast | dict(op="transpose", limit="launch")
    lines = table([fast, fast | dict(who="torch"), other]).splitlines()
    assert [line for line in lines if "floor 0.5" in line] == [
        "copy 64 float32: floor 0.5000 ms, by memory",
        "transpose 64 float32: floor 0.5000 ms, by launch",
    ]
    assert lines[2].split() == ["fastkit", "0.6250", "0.6000", "0.7000", "0.0100", "2,400", "GB/s", "80%", "fastest"]


def test_peers_that_are_not_here_are_said_to_be(monkeypatch):
    monkeypatch.setitem(bench_peers.PEERS, "swiglu", [("Someone", "a_package_that_is_not_there", None)])
    assert bench_peers.peers("swiglu") == ({}, {"Someone": "not installed"})
    monkeypatch.setitem(bench_peers.PEERS, "swiglu", [("Re", "re", lambda: re.no_such_function)])
    found, absent = bench_peers.peers("swiglu")
    assert not found and absent["Re"].startswith("does not import: AttributeError: ")


def test_tracing_after_peers(monkeypatch):
    """The tracer goes by lines, which Triton leaves out where the environment says so."""
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    started = []

    def process(command, env, **pipes):
        started.append(env)
        raise InterruptedError

    monkeypatch.setattr(worker.subprocess, "Popen", process)
    with pytest.raises(InterruptedError):
        worker.Worker(interpret=True).start()
    assert started[0]["TRITON_DISABLE_LINE_INFO"] == "0" and started[0]["TRITON_INTERPRET"] == "1"


@pytest.fixture
def small_sizes(monkeypatch, device):
    """The benchmark's cases are built small and on this machine; torch.compile is left to the GPU."""
    small = {
        bench_case: dict(ROWS=24, DEVICE=device),
        bench_kernels: dict(
            HIDDEN=24, INTERMEDIATE=40, VOCABULARIES=(50, 70), HEADS=4, KEY_HEADS=2, HEAD=16, TOKENS=3, TRAINED=600,
            BATCHES=(1, 3),
        ),
        bench_ladders: dict(COPY_N=2**10, TRANSPOSE_N=(24, 33), SOFTMAX_MN=((5, 40), (3, 130)), MATMUL_N=64),
    }  # fmt: skip
    for module, values in small.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))  # so that FP8 is among the cases
        for module in small:  # bfloat16 the interpreter cannot round
            monkeypatch.setattr(module, "half", lambda: torch.float16)


def test_a_peer_leaves_the_environment_alone(monkeypatch, tmp_path):
    (tmp_path / "a_peer.py").write_text("""
import os
os.environ |= {"TRITON_DISABLE_LINE_INFO": "1", "KEPT": "no", "UNSLOTH_OWN": "1"}
os.environ.pop("ALSO_KEPT")
print("\\.")
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TRITON_DISABLE_LINE_INFO", raising=False)
    for name in ("KEPT", "ALSO_KEPT", "UNSLOTH_OWN"):
        monkeypatch.setenv(name, "yes")
    monkeypatch.setitem(bench_peers.PEERS, "swiglu", [("Someone", "a_peer", lambda: print)])
    with warnings.catch_warnings(record=True) as warned:
        assert bench_peers.peers("swiglu") == ({"Someone": print}, {})
    left = {name: os.environ.get(name) for name in ("TRITON_DISABLE_LINE_INFO", "KEPT", "ALSO_KEPT", "UNSLOTH_OWN")}
    assert list(left.values()) == [None, "yes", "yes", "1"] and not warned


def test_every_contender_is_right_on_small_tensors(small_sizes):
    ours = set()
    for make in (make for group in groups().values() for make in group.values()):
        for found in make():
            notes = []
            assert found.contenders and not found.absent.keys() & found.contenders.keys()
            for who, run in found.contenders.items():
                assert _is_right(who, run, found, f"{found.op} {found.size}", notes), notes
                ours.add((found.op, who))
    assert ("swiglu backward", "fastkit") in ours and ("matmul", "grouped") in ours and ("softmax", "online") in ours
    assert ("merged dequantize, transposed, to FP8", "fastkit") in ours
    assert ("nf4 matvec", "bitsandbytes") in ours and ("adamw, 8-bit state", "bitsandbytes") in ours


@pytest.mark.gpu
@pytest.mark.slow
def test_a_recorded_run(monkeypatch, tmp_path, capsys):
    from fastkit.lab import bench

    record = bench.record
    monkeypatch.setattr(bench, "record", lambda *arguments: record(*arguments, folder=tmp_path))
    assert main(["bench", "copy", "swiglu", "--record", "trial"]) == 0
    out = capsys.readouterr().out
    assert "of floor" in out and "fastest" in out and "recorded in " in out
    result = load(tmp_path / "trial.json")
    rows = {(row["op"], row["who"]): row for row in result["rows"]}
    assert ("copy", "vectorised") in rows and ("swiglu backward", "torch.compile") in rows
    for row in rows.values():
        assert row["limit"] == "memory" and row["of_floor"] > 0 and row["runs"] >= 6


def test_a_peer_that_fails_is_left_out(monkeypatch):
    def broken(x):
        raise RuntimeError("no such\n thing")

    others = {"Liger": broken, "Unsloth": lambda x: x.detach() * 2}
    monkeypatch.setattr(bench_case, "peers", lambda op, *fixed: (dict(others), {}))
    of = ("double", "4", [Cost(32, 4), Cost(32, 4)], lambda x: x * 2, {"fastkit": lambda x: x * 2}, (torch.ones(4),))
    forward, backward = bench_case.both_ways(*of)
    step = bench_case.together(*of)
    assert set(forward.contenders) == {"fastkit", "Unsloth"} and set(backward.contenders) == {"fastkit"}
    assert set(step.contenders) == {"fastkit"} and step.absent == {
        "Liger": "RuntimeError: no such thing",
        "Unsloth": bench_case.NO_BACKWARD,
    }
    notes = []
    failing = Case("double", "4", torch.float32, Cost(32, 4), {}, (torch.ones(4),))
    assert not _is_right("Liger", lambda: broken(None), failing, "double 4", notes)
    assert notes == ["double 4: Liger failed: RuntimeError: no such thing"]
    for ours in ("fastkit", "vectorised"):
        with pytest.raises(RuntimeError):
            _is_right(ours, lambda: broken(None), failing, "double 4", notes)
    monkeypatch.setattr(bench_case, "peers", lambda op, *fixed: ({}, {}))
    with pytest.raises(RuntimeError):
        bench_case.together(*of[:4], {"fastkit": broken}, of[5])


def test_each_launch_whose_limits_are_counted(small_sizes):
    found = kernel_limits.launches()
    assert len(found) == 8
    for launch in found.values():
        launch()


@pytest.mark.gpu
@pytest.mark.slow
def test_counters_are_of_each_launch(monkeypatch):
    monkeypatch.setattr(kernel_limits, "record", lambda name, rows, command: (name, rows))
    name, rows = kernel_limits.main()
    assert name.startswith("limits_") and [row["op"] for row in rows] == list(kernel_limits.launches())
    assert all(0 < row["dram_busy"] <= 1 and 0 < row["issue_busy"] <= 1 for row in rows)
