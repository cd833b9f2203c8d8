"""Every kernel of the library, compiled for every architecture: it fits, or its file says what runs instead."""

import dataclasses
import json
import re
import sys
from collections import Counter

import pytest
import torch

import fastkit.kernels
from fastkit.cli import main
from fastkit.errors import FastkitError
from fastkit.kernels import swiglu
from fastkit.kernels.common import tl, triton
from fastkit.kernels.ladders import matmul
from fastkit.lab import portability, worker
from fastkit.lab.compiling import ARCHITECTURES, compile_launch
from fastkit.lab.launches import catch, launch
from fastkit.lab.occupancy import LIMITS
from fastkit.lab.portability import check, kernel_files, key_instructions, misfit, rows, table, unanswered

pytest.importorskip("triton")

FORWARD = "forward 8192x14336"
MATRIX_UNITS = {
    "sm_75": set(),
    "sm_80": {"HMMA"},
    "sm_86": {"HMMA"},
    "sm_89": {"HMMA"},
    "sm_90": {"WGMMA", "HMMA"},  # HMMA for tiles of fewer than 64 rows
    "sm_100": {"TCGEN05", "HMMA"},
    "sm_120": {"HMMA"},
    "gfx942": {"MFMA"},
    "gfx1100": {"WMMA"},
}


@pytest.fixture(scope="module")
def report() -> list[dict]:
    """Everything, for all architectures: some minutes; seconds where Triton's cache, keyed by the source, has it.

    Hence the mark: `make architectures` runs what needs it, plain pytest does not.
    """
    return rows()


def of(report, **wanted):
    return [row for row in report if all(row[key] == value for key, value in wanted.items())]


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def pipelined(size=4096, **tiling):
    """A launch of the ladder's matmul, with a tiling that it would not choose."""
    tiling = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_stages": 3} | tiling
    (made,) = catch(lambda: matmul.launch_pipelined(*(meta(size, size) for _ in range(3)), **tiling))
    return made


@triton.jit
def odd_kernel(x_ptr):
    tl.store(x_ptr + tl.arange(0, 100), 0.0)  # which has to be a power of two


@pytest.mark.architectures
def test_every_kernel_fits_or_says_what_runs_instead(report):
    assert not unanswered(report), table(unanswered(report))


@pytest.mark.architectures
def test_nothing_is_left_out(report):
    assert {"rms_norm", "swiglu", "ladders.copy", "ladders.matmul"} <= set(kernel_files())
    for name, path in kernel_files().items():
        mine = of(report, kernel=name)
        defined = set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
        assert mine and defined <= {row["function"] for row in mine}
        for case in {row["case"] for row in mine}:
            assert list(dict.fromkeys(row["arch"] for row in of(mine, case=case))) == list(ARCHITECTURES)


@pytest.mark.architectures
def test_figures(report):
    for row in report:
        if row["registers"] is None:
            assert not row["fits"] and not row["instructions"] and row["function"] is None
            continue
        limit = LIMITS[row["arch"]]
        assert 0 < row["registers"] <= limit.registers_thread and 0 < row["occupancy"] <= 1
        assert row["shared_bytes"] <= row["shared_limit"] == limit.shared_kib * 1024
        assert row["num_warps"] * limit.warp_size <= 1024 and row["limiter"] and row["dtype"]
        assert row["arch"] != "sm_75" or row["dtype"] != "bfloat16"


@pytest.mark.architectures
def test_tensor_cores_work_where_there_are_any(report):
    for arch, units in MATRIX_UNITS.items():
        used = Counter()
        for row in of(report, arch=arch):
            used += Counter(row["instructions"])
        assert set(used) & set().union(*MATRIX_UNITS.values()) == units
        refused = of(report, arch=arch, kernel="ladders.matmul", fits=False)
        assert {row["case"].split()[0] for row in refused} == {
            name for name, least in (("tensor_cores", 80), ("pipelined", 80), ("persistent", 90))
            if (arch.startswith("gfx") and least == 90) or (arch.startswith("sm") and int(arch[3:]) < least)
        }  # fmt: skip
    (row,) = of(report, arch="sm_75", case="pipelined 8192x8192x8192")
    assert row["why"].endswith("needs sm_80 and this is sm_75") and row["fallback"] == "rung 'grouped'"
    (row,) = of(report, arch="sm_90", case="persistent 8192x8192x8192")
    assert row["instructions"]["TMA load"] and "cp.async.128" not in row["instructions"]


@pytest.mark.architectures
def test_wide_loads_in_the_model_s_kernels(report):
    mine = [row for row in report if row["kernel"] in ("rms_norm", "swiglu") and row["arch"] != "gfx942"]
    assert len(mine) == 8 * 8
    for row in mine:
        made = set(row["instructions"])
        assert "st.global.128" in made and made & {"ld.global.128", "cp.async.128"}, row


def test_a_launch_that_spills():
    row = check(pipelined(num_warps=4), "sm_80")
    assert not row["fits"] and row["registers"] == 255 and row["spilled_bytes"] > 100
    assert row["why"] == f"spills {row['spilled_bytes']:,} bytes a thread" and row["fallback"] is None


def test_a_launch_that_overflows_shared_memory():
    made = pipelined(num_stages=4)
    assert check(made, "sm_80")["fits"]
    row = check(made, "sm_89")
    assert (row["why"], row["occupancy"]) == ("takes 144.0 KiB of shared memory, of 99", 0)


def test_a_launch_of_too_many_threads():
    kernel, (M, N) = swiglu._forward_kernel, (64, 4096)
    made = launch(kernel, (M,), (*(meta(M, N) for _ in range(3)), N, N, N, N), BLOCK_N=4096, num_warps=32)
    assert check(made, "sm_90")["fits"]
    assert check(made, "gfx942")["why"] == "has 2048 threads in 32 warps, of 1024"


def test_a_launch_that_the_compiler_refuses():
    row = check(launch(odd_kernel, 1, (meta(128),)), "sm_80")
    assert not row["fits"] and row["why"].startswith("odd_kernel cannot be compiled for sm_80: ")
    assert row["function"] == "odd_kernel" and row["registers"] is None


def test_limits_are_reached_not_passed():
    (made,) = catch(lambda: swiglu.launch_forward(*(meta(64, 1024) for _ in range(3))))
    compiled = compile_launch(made, "sm_86")
    for field, most in (("shared_bytes", 99 * 1024), ("spilled_bytes", portability.STACK_BYTES), ("num_warps", 32)):
        assert not misfit(dataclasses.replace(compiled, **{field: most}))
        assert misfit(dataclasses.replace(compiled, **{field: most + 1}))
    assert (
        misfit(dataclasses.replace(compiled, num_warps=32, registers=65))
        == "needs 65 registers for each of 1024 threads"
    )
    assert not misfit(dataclasses.replace(compiled, num_warps=32, registers=64))
    both = misfit(dataclasses.replace(compiled, spilled_bytes=8192, shared_bytes=2**20))
    assert both == "spills 8,192 bytes a thread, takes 1024.0 KiB of shared memory, of 99"


def test_key_instructions():
    counts = {"shfl": 9, "ld.global.32": 1, "ld.global.128": 4, "HMMA": 8, "ld.shared.32": 1, "TMA load": 2}
    assert key_instructions(counts) == "ld.global.128,32 TMA load HMMA"


def test_a_helper_that_is_lost_is_a_row(monkeypatch):
    monkeypatch.setattr(worker, "TIME_LIMIT_S", 0)
    found = rows(["swiglu"], ["sm_80"])
    assert len(found) == len(unanswered(found)) == 2 and "took more than 0 s" in found[0]["why"]
    assert "compile_example took more than 0 s" in table(found) and "nothing is named" in table(found)


def test_errors(monkeypatch, tmp_path):
    with pytest.raises(FastkitError, match=r"'swigloo': there are .*rms_norm, .*swiglu, .*ladders\.copy"):
        rows(["swiglu", "swigloo"])
    with pytest.raises(FastkitError, match="architecture 'sm_70': use one of sm_75"):
        rows(["swiglu"], ["sm_90", "sm_70"])
    with pytest.raises(FastkitError, match="architecture 'sm_70'"):
        check(pipelined(), "sm_70")
    (tmp_path / "silent.py").write_text(
        "from fastkit.kernels.common import triton\n\n\n@triton.jit\ndef k_kernel():\n    pass\n"
    )
    monkeypatch.setattr(fastkit.kernels, "__path__", [*fastkit.kernels.__path__, str(tmp_path)])
    with pytest.raises(FastkitError, match=r"kernels/silent\.py has no examples\(dtype\)"):
        rows(["silent"])
    monkeypatch.delitem(sys.modules, "fastkit.kernels.silent")
    monkeypatch.setattr(portability, "TRITON_MISSING", "No module named 'triton'")
    with pytest.raises(FastkitError, match="where Triton is installed"):
        rows()


# The command


def test_one_says_what_runs_instead():
    row = {"kernel": "a", "case": "b", "arch": "sm_75", "registers": None, "why": "none", "fallback": "torch"}
    assert table([row | {"fits": False}]).endswith("\n0 of 1 fit, 1 says what runs instead")


def test_the_table(capsys):
    assert main(["compile", "swiglu", "ladders.matmul", "--arch", "sm_75", "sm_89"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("swiglu, forward 8192x14336\n") and text.count("  sm_75 ") == text.count("  sm_89 ") == 8
    assert "does not fit: matmul: rung 'pipelined' needs sm_80 and this is sm_75; instead: rung 'grouped'\n" in text
    assert text.endswith("\n12 of 16 fit, 4 say what runs instead\n")
    assert re.search(r"sm_89 +_forward_kernel +bf16 +\d+ +0 +0\.0/99 +4 +100%  warps +ld\.global\.128 st\.gl", text)


@pytest.mark.architectures
def test_json(capsys, report):
    assert main(["compile", "rms_norm", "swiglu", "--arch", "sm_90", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["triton"] == triton.__version__
    assert found["rows"] == [row for row in of(report, arch="sm_90") if row["kernel"] in ("rms_norm", "swiglu")]


def test_exit_codes(capsys, monkeypatch):
    for argv, part in (
        (["swigloo"], "no kernel file 'swigloo'"),
        (["swiglu", "--arch", "sm_70"], "architecture 'sm_70'"),
    ):
        assert main(["compile", *argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fastkit: ") and part in error and error.count("\n") == 1
    spilling = {"kernel": "ladders.matmul", "case": "pipelined"} | check(pipelined(num_warps=4), "sm_80")
    monkeypatch.setattr(portability, "rows", lambda *_: [spilling])
    assert main(["compile"]) == 1
    assert re.search(
        r"does not fit: spills [\d,]+ bytes a thread; instead: nothing is named\n", capsys.readouterr().out
    )
    spilling["fallback"] = "rung 'grouped'"
    assert main(["compile"]) == 0
