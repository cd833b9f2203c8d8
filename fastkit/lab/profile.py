"""The hardware's own counters, by Nsight Compute (`ncu`), in the words of the tracer, so that both stand side by side.

A function is profiled in a process of its own: `ncu` replays each kernel launch as often as its counters need.
"""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from fastkit.errors import FastkitError

SECTOR = 32  # bytes

# Our name: [(Nsight Compute's metric, factor)], several where versions or cards differ: the first that is there counts.
# "requests" are instructions of a warp, "wavefronts" the turns that the memory takes for them. On an H100 the counters
# of global loads count cp.async too.
METRICS = {
    "duration_us": [("gpu__time_duration.sum", 1e-3)],
    "load_requests": [("l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum", 1)],
    "load_sectors_per_request": [("l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio", 1)],
    "load_bytes_moved": [("l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum", SECTOR)],
    "store_requests": [("l1tex__t_requests_pipe_lsu_mem_global_op_st.sum", 1)],
    "store_sectors_per_request": [("l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio", 1)],
    "store_bytes_moved": [("l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum", SECTOR)],
    "tma_load_bytes_moved": [("l1tex__m_xbar2l1tex_read_sectors_mem_global_op_tma_ld.sum", SECTOR)],
    "tma_store_bytes_moved": [("l1tex__m_l1tex2xbar_write_sectors_mem_global_op_tma_st.sum", SECTOR)],
    "dram_read_bytes": [("dram__bytes_read.sum", 1), ("dram__bytes_op_read.sum", 1)],
    "dram_write_bytes": [("dram__bytes_write.sum", 1), ("dram__bytes_op_write.sum", 1)],
    "shared_load_requests": [
        ("smsp__sass_inst_executed_op_shared_ld.sum", 1),
        ("smsp__inst_executed_op_shared_ld.sum", 1),
    ],
    "shared_load_wavefronts": [("l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum", 1)],
    "shared_load_conflicts": [("l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum", 1)],
    "shared_store_requests": [
        ("smsp__sass_inst_executed_op_shared_st.sum", 1),
        ("smsp__inst_executed_op_shared_st.sum", 1),
    ],
    "shared_store_wavefronts": [("l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum", 1)],
    "shared_store_conflicts": [("l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum", 1)],
    "ldmatrix_requests": [("smsp__inst_executed_op_ldsm.sum", 1)],
    "registers": [("launch__registers_per_thread", 1)],
    "shared_bytes": [("launch__shared_mem_per_block_dynamic", 1)],
    "occupancy": [("sm__maximum_warps_per_active_cycle_pct", 0.01)],
    "warps_active": [("sm__warps_active.avg.pct_of_peak_sustained_active", 0.01)],
    "blocks_by_registers": [("launch__occupancy_limit_registers", 1)],
    "blocks_by_shared_memory": [("launch__occupancy_limit_shared_mem", 1)],
    "blocks_by_warps": [("launch__occupancy_limit_warps", 1)],
    "tensor_cores_busy": [("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", 0.01)],
    "issue_busy": [("smsp__issue_active.avg.pct_of_peak_sustained_active", 0.01)],
    "dram_busy": [("dram__throughput.avg.pct_of_peak_sustained_elapsed", 0.01)],
}

_ABSENT = set()  # Nsight Compute's names that this process found missing

_CHILD = """
import torch
{text}
{entry}()  # compiles and tunes, unprofiled
torch.cuda.synchronize()
torch.cuda.cudart().cudaProfilerStart()
{entry}()
torch.cuda.synchronize()
torch.cuda.cudart().cudaProfilerStop()
"""


def profile(
    target,
    metrics: Iterable[str] = tuple(METRICS),
    kernel: str | None = None,
    launch_skip: int = 0,
    launch_count: int | None = None,
    timeout_s: float = 300,
) -> list[dict]:
    """Run `target` under Nsight Compute; a row for each kernel launch of one call, after an unprofiled one.

    target   a function without arguments that makes its inputs itself, carried over as source; "module:function"; or a
             Source (fastkit.lab.sources)
    metrics  names of METRICS, or of Nsight Compute ("gpu__time_duration.sum"), which keep their names and base units
    kernel   a regular expression that a kernel's name must match; launch_skip, launch_count: of those that do

    A row has kernel, grid, block and the metrics, None for those that this card or this version of ncu does not have.
    Counters are taken with cold caches and unlocked clocks. Raises FastkitError if ncu is missing, may not read the
    counters, finds no kernel, or the function fails.
    """
    ncu = find_ncu()
    wanted = _candidates(metrics)
    text, entry = _source(target)
    with tempfile.TemporaryDirectory() as folder:
        script, log = Path(folder) / "profiled.py", Path(folder) / "ncu.csv"
        script.write_text(_CHILD.format(text=text, entry=entry))
        while asked := _first_left(wanted):
            command = [*_command(ncu, asked, log, kernel, launch_skip, launch_count), sys.executable, str(script)]
            error, report = _run(command, log, timeout_s)
            missing = not_found(report, asked)
            if not missing:
                break
            _ABSENT.update(missing)
        else:
            raise FastkitError(f"this card has none of the metrics {', '.join(wanted)}")
    if explained := explain(report, error):
        raise FastkitError(explained)
    return parse(report, wanted)


def beside(trace, row: dict) -> list[dict]:
    """What the tracer predicts for a launch (a Trace) beside a row of `profile`: rows {what, predicted, measured}.

    A counter that no access of the trace feeds is left out; so is a prediction that is unknown.
    """
    rows = []
    for kind in ("load", "store"):
        if trace.of(kind, tma=False):
            rows.append((f"{kind}_requests", trace.requests(kind), row.get(f"{kind}_requests")))
            sectors = trace.sectors_per_request(kind)
            rows.append((f"{kind}_sectors_per_request", sectors, _sectors_per_request(row, kind)))
            rows.append((f"{kind}_bytes_moved", trace.bytes_moved(kind, tma=False), row.get(f"{kind}_bytes_moved")))
        if trace.of(kind, tma=True):
            name = f"tma_{kind}_bytes_moved"
            rows.append((name, trace.bytes_moved(kind, tma=True), row.get(name)))
        if any(access.kind == kind for access in trace.shared):
            rows.append((f"shared_{kind}_conflict_degree", trace.conflict_degree(kind), _conflict_degree(row, kind)))
    rows += [(name, getattr(trace, name), row.get(name)) for name in ("registers", "occupancy")]
    return [{"what": what, "predicted": p, "measured": m} for what, p, m in rows if p is not None]


def _sectors_per_request(row: dict, kind: str) -> float | None:
    moved, requests = row.get(f"{kind}_bytes_moved"), row.get(f"{kind}_requests")
    if requests and moved is not None:
        return moved / SECTOR / requests
    return row.get(f"{kind}_sectors_per_request")  # ncu's own ratio has two decimals


def _conflict_degree(row: dict, kind: str) -> float | None:
    """Turns of the banks for each that would do; the count of conflicts is that of the turns beyond."""
    turns, conflicts = row.get(f"shared_{kind}_wavefronts"), row.get(f"shared_{kind}_conflicts")
    return turns / (turns - conflicts) if turns and conflicts is not None else None


def find_ncu() -> str:
    """The path of ncu. Raises FastkitError that says how to get it."""
    installed = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    places = [shutil.which("ncu"), "/usr/local/cuda/bin/ncu", *map(str, reversed(installed))]
    for place in places:
        if place and os.access(place, os.X_OK):
            return place
    raise FastkitError(
        "ncu (Nsight Compute) is not installed: it comes with the CUDA toolkit, or from "
        "https://developer.nvidia.com/nsight-compute; the tracer predicts most counters without it"
    )


def parse(report: str, wanted: dict[str, list[tuple[str, float]]]) -> list[dict]:
    """The rows of ncu's report (`--csv --page raw`): a header, a line of units, a line for each launch."""
    lines = [line for line in report.splitlines() if line.startswith('"')]
    table = list(csv.DictReader(io.StringIO("\n".join(lines))))
    rows = []
    for cells in table:
        if not cells.get("ID"):  # the line of units
            continue
        row = {"kernel": cells["Kernel Name"], "grid": cells.get("Grid Size"), "block": cells.get("Block Size")}
        for name, options in wanted.items():
            values = ((_number(cells.get(ncu_name)), factor) for ncu_name, factor in options)
            row[name] = next((value * factor for value, factor in values if value is not None), None)
        rows.append(row)
    return rows


def not_found(report: str, asked: list[str]) -> set[str]:
    """Which of the metrics asked for ncu says that it does not have; it names them as regular expressions."""
    bases = set(re.findall(r"Failed to find metric (?:regex:\^?)?(\w+)", report))
    return {metric for metric in asked if metric.partition(".")[0] in bases}


def explain(report: str, error: str) -> str:
    """What went wrong, in one line, by ncu's report and what the failed process said; "" if nothing."""
    if "ERR_NVGPUCTRPERM" in report:
        return (
            "ncu may not read the GPU's counters (ERR_NVGPUCTRPERM): run as root, or have an administrator load the "
            "driver with NVreg_RestrictProfilingToAdminUsers=0; in a container, start it with --cap-add=SYS_ADMIN"
        )
    if any(line.startswith('"ID"') for line in report.splitlines()) and not error:
        return ""
    said = [line.partition("== ")[2] for line in report.splitlines() if line.startswith(("==ERROR==", "==WARNING=="))]
    if "No kernels were profiled" in report and not error:
        return "ncu saw no kernel to profile: does the function launch one, and does the kernel's name match?"
    last = error.strip().splitlines()[-1:]
    return f"profiling failed: {'; '.join([*last, *said]) or 'ncu wrote no table'}"


def _candidates(metrics: Iterable[str]) -> dict[str, list[tuple[str, float]]]:
    wanted = {}
    for name in metrics:
        if name not in METRICS and "__" not in name:
            raise FastkitError(f"no metric {name!r}: use Nsight Compute's names or {', '.join(METRICS)}")
        wanted[name] = METRICS.get(name, [(name, 1)])
    return wanted


def _first_left(wanted: dict[str, list[tuple[str, float]]]) -> list[str]:
    """For each metric the first of Nsight Compute's that is not known to be missing."""
    left = (next((name for name, _ in options if name not in _ABSENT), None) for options in wanted.values())
    return [name for name in left if name]


def _source(target: Callable | str) -> tuple[str, str]:
    """(Python code, the name of the function in it that is to be profiled)"""
    if isinstance(target, str):
        module, colon, function = target.partition(":")
        if not (colon and module and function.isidentifier()):
            raise FastkitError(f"cannot profile {target!r}: give a function or 'package.module:function'")
        return f"from {module} import {function}", function
    from fastkit.lab.sources import Source, carry

    source = target if isinstance(target, Source) else carry(target)
    return source.text, source.entry_name


def _command(ncu: str, asked: list[str], log: Path, kernel, launch_skip: int, launch_count) -> list[str]:
    options = ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    options += ["--target-processes", "all", "--profile-from-start", "off", "--clock-control", "none"]
    options += ["--metrics", ",".join(dict.fromkeys(asked))]
    options += ["--kernel-name", f"regex:{kernel}"] if kernel else []
    options += ["--launch-skip", str(launch_skip)] if launch_skip else []
    options += ["--launch-count", str(launch_count)] if launch_count is not None else []
    return [ncu, *options]


def _run(command: list[str], log: Path, timeout_s: float) -> tuple[str, str]:
    """(what the failed process said, "" if it did not fail; ncu's report)"""
    from fastkit.lab.sources import child_environment

    log.unlink(missing_ok=True)
    environment = child_environment(LC_ALL="C", TRITON_INTERPRET="0")
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise FastkitError(f"profiling took longer than {timeout_s:g} s: profile fewer launches or metrics") from None
    report = log.read_text() if log.is_file() else done.stdout
    return (done.stderr or f"exit code {done.returncode}") if done.returncode else "", report


def _number(cell: str | None) -> float | None:
    """A cell's number; None if it is empty or "n/a"."""
    try:
        value = float((cell or "").replace(",", ""))
    except ValueError:
        return None
    return int(value) if value.is_integer() else value
