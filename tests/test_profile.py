"""Profiling: reading ncu's report, and what is said where it cannot be had; real counters on a GPU that has ncu."""

import json
import shutil
import stat
import sys

import pytest
import torch

from fastkit.errors import FastkitError
from fastkit.lab import profile as module
from fastkit.lab.profile import METRICS, beside, explain, find_ncu, not_found, parse, profile

# As Nsight Compute 2025 writes it with --csv --page raw --print-units base
REPORT = """==PROF== Connected to process 1234 (/usr/bin/python3.12)
==PROF== Profiling "_copy_kernel" - 0: 0%....50%....100% - 9 passes
==PROF== Disconnected from process 1234
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"gpu__time_duration.sum",\
"l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",\
"l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum","launch__registers_per_thread","dram__bytes_op_read.sum"
"","","","","","","","","","","","ns","sector/request","sector","register/thread","byte"
"0","1234","python3.12","host","_copy_kernel","1","7","(128, 1, 1)","(1024, 1, 1)","0","9.0","5,216","16","1,048,576",\
"18","33,554,432"
"1","1234","python3.12","host","void f<int, float>(int, float *)","1","7","(32, 4, 1)","(8, 1, 1)","0","9.0",\
"2,048.50","3.97","n/a","","0"
"""
DENIED = """==PROF== Connected to process 1234 (/usr/bin/python3.12)
==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters on the target \
device 0. For instructions on enabling permissions and to get more information see \
https://developer.nvidia.com/ERR_NVGPUCTRPERM
==PROF== Disconnected from process 1234
"""
MISSING = r"==ERROR== Failed to find metric regex:^dram__bytes_read(\.sum)?(\.(min|max))?$"


def wanted(*names):
    return {name: METRICS[name] for name in names}


def test_rows():
    names = ("duration_us", "load_sectors_per_request", "load_bytes_moved", "registers", "dram_read_bytes")
    first, second = parse(REPORT, wanted(*names))
    assert first == {
        "kernel": "_copy_kernel",
        "grid": "(1024, 1, 1)",
        "block": "(128, 1, 1)",
        "duration_us": pytest.approx(5.216),
        "load_sectors_per_request": 16,
        "load_bytes_moved": 32 * 1048576,
        "registers": 18,
        "dram_read_bytes": 33554432,  # by its second name
    }
    assert second["kernel"] == "void f<int, float>(int, float *)" and second["duration_us"] == pytest.approx(2.0485)
    assert second["load_sectors_per_request"] == 3.97 and second["dram_read_bytes"] == 0
    assert second["load_bytes_moved"] is second["registers"] is None


def test_ncu_names_pass_through():
    assert parse(REPORT, module._candidates(["gpu__time_duration.sum"]))[0]["gpu__time_duration.sum"] == 5216
    with pytest.raises(FastkitError, match="no metric 'duration': use Nsight Compute's names or duration_us, "):
        module._candidates(["duration"])


def test_metrics_that_the_card_lacks():
    asked = ["dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"]
    assert not_found(MISSING, asked) == {"dram__bytes_read.sum"}
    assert not_found("==ERROR== Failed to find metric dram__bytes_write.sum", asked) == {"dram__bytes_write.sum"}
    assert not_found(REPORT, asked) == set()


def test_explanations():
    assert explain(REPORT, "") == ""
    assert "NVreg_RestrictProfilingToAdminUsers=0" in explain(DENIED, "exit code 1")
    assert "saw no kernel" in explain("==WARNING== No kernels were profiled.\n", "")
    said = explain("==ERROR== The application returned an error code (1).\n", "Traceback\n\nValueError: no such shape")
    assert said == "profiling failed: ValueError: no such shape; The application returned an error code (1)."
    for report, error in ((DENIED, ""), ("", "killed"), (REPORT, "died after its first launch")):
        assert explain(report, error) and "\n" not in explain(report, error)


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """A stand-in for ncu: keeps its arguments and writes these reports, one a call; the last one again and again."""

    def install(*reports, code=0):
        (tmp_path / "reports.json").write_text(json.dumps(reports))
        program = tmp_path / "ncu"
        program.write_text(
            f"#!{sys.executable}\n"
            "import json, pathlib, shutil, sys\n"
            f"here = pathlib.Path({str(tmp_path)!r})\n"
            "reports = json.loads((here / 'reports.json').read_text())\n"
            "calls = json.loads((here / 'calls.json').read_text()) if (here / 'calls.json').exists() else []\n"
            "(here / 'calls.json').write_text(json.dumps([*calls, sys.argv[1:]]))\n"
            "shutil.copy(sys.argv[-1], here / 'script.py')\n"
            "log = pathlib.Path(sys.argv[sys.argv.index('--log-file') + 1])\n"
            "log.write_text(reports[min(len(calls), len(reports) - 1)])\n"
            f"sys.exit({code})\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(module, "_ABSENT", set())
        return lambda: json.loads((tmp_path / "calls.json").read_text())

    return install


def launch_a_copy():
    from fastkit.kernels.ladders import copy

    x = torch.randn(2**20, device="cuda")
    y = torch.empty_like(x)
    copy.RUNGS[-1].launch(x, y)


def test_how_ncu_is_called(ncu, tmp_path):
    calls = ncu(REPORT)
    rows = profile(launch_a_copy, metrics=["duration_us"], kernel="copy", launch_skip=2, launch_count=3)
    assert [row["kernel"] for row in rows] == ["_copy_kernel", "void f<int, float>(int, float *)"]
    ((*options, python, script),) = calls()
    assert python == sys.executable and script.endswith(".py")
    flags = dict(zip(options[1::2], options[2::2], strict=True))
    assert options[0] == "--csv" and flags["--page"] == "raw" and flags["--print-units"] == "base"
    assert flags["--clock-control"] == "none" and flags["--profile-from-start"] == "off"
    assert flags["--metrics"] == "gpu__time_duration.sum" and flags["--kernel-name"] == "regex:copy"
    assert flags["--launch-skip"] == "2" and flags["--launch-count"] == "3"
    text = (tmp_path / "script.py").read_text()
    compile(text, "script.py", "exec")
    assert text.index("launch_a_copy()  # compiles") < text.index("cudaProfilerStart") < text.rindex("launch_a_copy()")


def test_a_metric_that_is_missing_is_asked_for_by_its_other_name(ncu):
    calls = ncu(MISSING, REPORT)
    rows = profile("package.module:function", metrics=["dram_read_bytes", "registers"])
    asked = [call[call.index("--metrics") + 1] for call in calls()]
    assert asked == [
        "dram__bytes_read.sum,launch__registers_per_thread",
        "dram__bytes_op_read.sum,launch__registers_per_thread",
    ]
    assert rows[0]["dram_read_bytes"] == 33554432
    profile("package.module:function", metrics=["dram_read_bytes"])
    assert "dram__bytes_read.sum" not in calls()[-1]  # remembered


def test_no_metric_is_left(ncu):
    ncu(MISSING.replace("dram__bytes_read", "x__y"))
    with pytest.raises(FastkitError, match=r"none of the metrics x__y\.sum"):
        profile("package.module:function", metrics=["x__y.sum"])


def test_refusals_become_one_line(ncu, monkeypatch):
    ncu(DENIED, code=1)
    with pytest.raises(FastkitError, match="may not read the GPU's counters"):
        profile("package.module:function")
    with pytest.raises(FastkitError, match="cannot profile 'no_colon': give a function or"):
        profile("no_colon")


@pytest.mark.skipif(shutil.which("ncu") is not None, reason="needs a machine without ncu")
def test_no_ncu():
    try:
        find_ncu()
    except FastkitError as error:
        assert "https://developer.nvidia.com/nsight-compute" in str(error)
    else:
        pytest.skip("ncu is installed outside PATH")


def test_beside_the_tracer():
    pytest.importorskip("triton")
    from fastkit.kernels.ladders import copy
    from fastkit.lab.tracer import trace_launches

    x, y = (torch.empty(2**23, device="meta") for _ in range(2))
    (trace,) = trace_launches(lambda: copy.launch_vectorised(x, y))
    (row, _) = parse(REPORT, wanted("load_sectors_per_request", "load_bytes_moved", "registers"))
    found = {line["what"]: (line["predicted"], line["measured"]) for line in beside(trace, row)}
    assert found["load_sectors_per_request"] == (16, 16) and found["load_bytes_moved"] == (2**25, 2**25)
    assert found["registers"] == (trace.registers, 18) and found["store_bytes_moved"] == (2**25, None)
    assert not any("tma" in what or "shared" in what for what in found)


@pytest.mark.gpu
@pytest.mark.slow
def test_counters_of_a_copy():
    try:
        rows = profile(launch_a_copy, kernel="copy|vectorised")
    except FastkitError as error:
        if "not installed" in str(error) or "may not read" in str(error):
            pytest.skip(str(error))
        raise
    (row,) = rows
    assert row["load_sectors_per_request"] == row["store_sectors_per_request"] == 16
    assert row["load_bytes_moved"] == row["store_bytes_moved"] == 4 * 2**20
    assert row["load_requests"] == 4 * 2**20 / 512 and row["shared_load_conflicts"] == 0
    assert row["duration_us"] > 0 and row["registers"] > 0 and 0 < row["warps_active"] <= 1
