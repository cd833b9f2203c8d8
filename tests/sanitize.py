"""Run the GPU tests of each kernel under compute-sanitizer: `make sanitize`, or `python tests/sanitize.py KERNEL ...`.

memcheck sees accesses out of bounds and misaligned, racecheck the hazards in shared memory. A line for each kernel and
tool; exit code 0 if all are clean. Before them, faults planted on purpose (planted.py) must be found: else "clean"
would say nothing. Logs are in build/sanitize/. Tests are small and few, since what is checked runs ten to a hundred
times slower: a few minutes on 16 cores.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "kernels"
LOGS = TESTS.parent / "build" / "sanitize"
FOUND = 86  # the exit code for errors found; pytest has none as high
SMALL = "close_to_the_truth and not any_ and not fp16"  # bf16 runs the same code as fp16
OPTIONS = {
    # torch and Triton ask for symbols that a driver may lack; bitsandbytes 0.50.2 reads beyond a short absmax
    "memcheck": ["--report-api-errors", "no", "--kernel-name-exclude", "regex=^_Z[0-9]+kDequantizeBlockwise"],
    # what others compiled is not ours to mend, and slow: torch's kernels, and those of cuBLAS
    # all hazards are printed, for `of_dispatch`
    "racecheck": [
        "--print-limit",
        "100000",
        "--kernel-name-exclude",
        "regex=^(_Z|cublas|cutlass|nvjet|gemm|sm[0-9]+_)",
    ],
}
PLUGINS = {"memcheck": [], "racecheck": ["-p", "without_cublas"]}


@dataclass(frozen=True)
class Check:
    """Tests of an operation: the files of kernels/ that they run, their own in tests/, what `pytest -k` takes there."""

    kernels: tuple[str, ...]
    files: tuple[str, ...]
    select: str = SMALL


CHECKS = {
    "adamw": Check(
        ("adamw",), ("adamw", "adamw_8bit"), f"({SMALL}) or decay_by_the_block or as_the_reference_rounds or is_skipped"
    ),
    "add_rms_norm": Check(("add_rms_norm",), ("add_rms_norm",), f"({SMALL}) or longer_than_a_block or no_rows"),
    "attention": Check(("attention_forward", "attention_backward"), ("attention",), f"({SMALL}) or test_lse"),
    "attention_packed": Check(
        ("attention_forward", "attention_backward"),
        ("attention_varlen",),
        "(do_not_leak or one_by_one or own_tiles) and not fp16",
    ),
    "attention_backward_hopper": Check(
        ("attention_backward_hopper", "attention_backward_ends"),
        ("attention_backward_hopper", "attention_backward_turned"),
        "close_to_the_truth",
    ),
    "attention_hopper": Check(("attention_hopper",), ("attention_hopper",), "close_to_the_truth"),
    "cross_entropy": Check(("cross_entropy",), ("cross_entropy",), f"({SMALL}) or gradient_in_the_forward"),
    "fp8": Check(("fp8_rows", "rms_norm_fp8", "swiglu_fp8"), ("fp8_rows",), "(kernel or norm or swiglu) and not fp16"),
    "gated_product": Check(("gated_product",), ("gated_product",), "close_to_the_truth and bf16"),
    "geglu": Check(("geglu",), ("geglu",), f"({SMALL}) or may_overwrite"),
    "linear_cross_entropy": Check(("linear_cross_entropy",), ("linear_cross_entropy",), f"({SMALL}) or test_scale"),
    "lora_gradients": Check(("lora_passes",), ("lora_gradients",), f"({SMALL}) or two_dtypes"),
    "lora_hopper": Check(("lora_hopper",), ("lora_hopper",), "on_a_gpu and not fp16"),
    "merged_dequantize": Check(
        ("merged_dequantize", "fp8_scale"), ("merged_dequantize",), f"({SMALL}) or same_bits or stacked or fp8"
    ),
    "merged_lines": Check(("merged_lines",), ("merged_lines",), "on_a_gpu or strided_adapters"),
    "nf4": Check(("nf4", "nf4_quantize"), ("nf4",), "odd_sizes or last_block or nested_kernel or other_dtypes"),
    "nf4_matvec": Check(("nf4_matvec",), ("nf4_matvec",), f"({SMALL}) or shapes_and_layouts"),
    "nf4_matvec_lines": Check(("nf4_matvec_lines",), ("nf4_matvec_lines",), "on_a_gpu and (bf16 or 2-333)"),
    "rms_norm": Check(("rms_norm",), ("rms_norm",), f"({SMALL}) or longer_than_a_block or no_rows"),
    "rope": Check(("rope",), ("rope",), f"({SMALL}) or in_place or packed_sequences"),
    "rope_fp8": Check(("rope_fp8",), ("rope_fp8",), "test_kernel and not fp16"),
    "swiglu": Check(("swiglu",), ("swiglu",), f"({SMALL}) or may_overwrite or halves"),
    "warp": Check(("warp",), ("warp",), f"({SMALL}) or integers or broadcast or by_hand_is"),
}


def pytest_command(tool: str, check: Check) -> list[str]:
    files = [str(TESTS / f"test_{name}.py") for name in check.files]
    options = ["-q", "-x", "-p", "no:cacheprovider", *PLUGINS[tool]]
    return [sys.executable, "-m", "pytest", *options, *files, "-k", check.select]


def sanitize(tool: str, name: str, command: list[str], timeout: float) -> tuple[int | None, str, float]:
    """(exit code, None if it took too long; what was printed; seconds) of `command` under `tool`."""
    start = time.monotonic()
    full = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), *OPTIONS[tool], *command]
    # each tensor an allocation of its own, whose end memcheck knows
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    options = {"cwd": TESTS.parent, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    log = LOGS / f"{tool}-{re.sub('[^a-z0-9_]+', '-', name)}.log"
    with log.open("w") as out, subprocess.Popen(full, stdout=out, **options) as process:
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # pytest too, which is a child of compute-sanitizer
            code = None
    return code, log.read_text(errors="replace"), time.monotonic() - start


def of_dispatch(output: str) -> bool:
    """Whether racecheck's hazards are all in how Triton hands warps the parts of a `warp_specialize`.

    Its warps read from shared memory which part is theirs. In the machine code a barrier of all warps (BAR.SYNC 1)
    stands between the store of that and the reads, and two between these and the next store; racecheck 2025.3 reports
    them nevertheless, in attention_hopper.py. The code is the compiler's: its lines are the kernel's signature and the
    call.
    """
    places = re.findall(r"access at (\w+)\+0x[0-9a-f]+ in (\w+\.py):(\d+)", output)
    summary = re.search(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)", output)
    if not places or summary is None or output.count("Race reported") < int(summary[1]) + int(summary[2]):
        return False
    lines = {(name, file, int(line)) for name, file, line in places}
    return all(
        re.search(rf"def {name}\(|warp_specialize\(", (KERNELS / file).read_text().splitlines()[line - 1])
        for name, file, line in lines
    )


def verdict(code: int | None, output: str) -> str:
    """What is wrong with a run, in words; "" if it is clean. Some test must have passed."""
    if code is None:
        return "took too long"
    if code == FOUND:
        if not of_dispatch(output):
            return "errors found"
        if re.search(r"\d+ failed", output):
            return "tests failed"
    elif code:
        return f"tests failed, exit code {code}"
    return "" if re.search(r"\d+ passed", output) else "no test ran"


def report(tool: str, name: str, fault: str, output: str, seconds: float, good: str = "clean") -> bool:
    """Print a line, and what is known of a fault; return whether there is none."""
    passed = re.search(r"\d+ passed", output)
    line = f"{tool:<10} {name:<22} {fault or good:<14} {passed[0] if passed else '':<12} {seconds:4.0f} s"
    print(line, flush=True)
    if fault:
        lines = output.splitlines()
        shown = [line for line in lines if line.startswith("=========") or re.match(r"FAILED|ERROR|E  ", line)]
        print("\n".join(f"    {line}" for line in (shown or lines)[:15] + lines[-3:]), flush=True)
    return not fault


def planted_is_found(tool: str, timeout: float) -> bool:
    code, *rest = sanitize(tool, "planted", [sys.executable, str(TESTS / "planted.py"), tool], timeout)
    return report(tool, "a planted fault", "" if code == FOUND else f"not found, exit code {code}", *rest, good="found")


def kernel_is_clean(tool: str, name: str, timeout: float) -> bool:
    code, output, seconds = sanitize(tool, name, pytest_command(tool, CHECKS[name]), timeout)
    return report(tool, name, verdict(code, output), output, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(CHECKS)}; all by default")
    parser.add_argument("--tool", choices=OPTIONS, help="both by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--timeout", type=float, default=480, help="seconds for each process")
    arguments = parser.parse_args()
    if unknown := set(arguments.kernels) - set(CHECKS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; give some of {', '.join(CHECKS)}")
    if shutil.which("compute-sanitizer") is None:
        parser.error("there is no compute-sanitizer; it comes with the CUDA toolkit: put its folder into PATH")
    LOGS.mkdir(parents=True, exist_ok=True)
    tools = [arguments.tool] if arguments.tool else list(OPTIONS)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        if not all(pool.map(lambda tool: planted_is_found(tool, arguments.timeout), tools)):
            return 1
        runs = [(tool, name, arguments.timeout) for name in arguments.kernels or CHECKS for tool in tools]
        clean = list(pool.map(lambda run: kernel_is_clean(*run), runs))
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
