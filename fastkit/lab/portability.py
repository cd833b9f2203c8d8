"""`fastkit compile`: what each kernel of the library needs on each architecture, whether it fits, what runs instead.

No GPU is asked. Each kernel file names the launches that matter, by `examples(dtype)`; a helper process that takes
itself for a machine of the architecture makes them, up to the compiled code. So tiles, strides and alignment are those
that the library's own code chooses there, at the sizes of a 7B model.

A kernel that cannot run on an architecture says so where it is launched, by a NotImplementedError that ends in
": use " and what takes its place. What spills, or asks for more than the hardware has, does not fit.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import fastkit.kernels
from fastkit.errors import FastkitError
from fastkit.kernels.common import TRITON_MISSING
from fastkit.lab.compiling import ARCHITECTURES, Compiled, compile_launch, compile_parcel, take_for
from fastkit.lab.device import versions
from fastkit.lab.launches import Launch, catch
from fastkit.lab.occupancy import limits, occupancy
from fastkit.lab.worker import COMPILER

FIGURES = ("num_warps", "registers", "spilled_bytes", "shared_bytes", "shared_limit", "occupancy", "limiter")
# NVIDIA's assembler puts up to this many bytes a thread on the stack in kernels with registers to spare: no misfit
STACK_BYTES = 16
KEY_INSTRUCTIONS = (
    "ld.global", "st.global", "cp.async", "TMA load", "TMA store", "HMMA", "WGMMA", "TCGEN05", "MFMA", "WMMA",
)  # fmt: skip
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def run(names: list[str], archs: list[str], as_json: bool) -> int:
    """The command: prints a table or JSON; exit code 1 if a kernel neither fits nor says what runs instead."""
    found = rows(names, archs, partial(tqdm, desc="compiling", unit="kernel", leave=False, disable=None))
    print(json.dumps({"versions": versions(), "rows": found}, indent=1) if as_json else table(found))
    return int(bool(unanswered(found)))


def rows(
    names: Iterable[str] = (), archs: Iterable[str] = (), progress: Callable[[list], Iterable] = iter
) -> list[dict]:
    """The report: a row for each launch of the kernel files `names` on each of `archs`; by default all there are.

    progress  is given the list of what is to be compiled and gives it back item by item, as tqdm does

    A row has kernel (the file), case (the example) and what `check` says. An example that refuses to launch is a row
    too, its figures None. Triton keeps compiled code in its cache: a second report takes a fraction of the time.

    Raises FastkitError for an unknown name or architecture, for a file without examples, and without Triton.
    """
    if TRITON_MISSING:
        raise FastkitError(f"kernels can be compiled only where Triton is installed ({TRITON_MISSING})")
    files = kernel_files()
    names, archs = list(dict.fromkeys(names)) or list(files), list(dict.fromkeys(archs)) or list(ARCHITECTURES)
    if unknown := [name for name in names if name not in files]:
        raise FastkitError(f"no kernel file {unknown[0]!r}: there are {', '.join(files)}")
    for arch in archs:
        limits(arch)
    newest = max(path.stat().st_mtime for path in files.values())
    work = [(name, case, arch) for name in names for case in examples(name) for arch in archs]
    found = []
    for name, case, arch in progress(work):
        try:
            made = COMPILER.ask("portability:compile_example", name, case, arch, newer_than=newest)
        except FastkitError as error:  # the example failed, or the compiler took the helper down with it
            made = [_without_figures(arch, str(error))]
        found += [{"kernel": name, "case": case} | row for row in made]
    return found


def kernel_files() -> dict[str, Path]:
    """The files that define a kernel, by names such as "rms_norm" and "ladders.matmul"."""
    found = {}
    for folder in map(Path, fastkit.kernels.__path__):
        for path in folder.rglob("*.py"):
            if re.search(r"^def \w+_kernel\(", path.read_text(encoding="utf-8"), re.MULTILINE):
                found[".".join(path.relative_to(folder).with_suffix("").parts)] = path
    return {name: found[name] for name in sorted(found, key=lambda name: ("." in name, name))}  # ladders last


def examples(name: str, arch: str = "") -> dict[str, Callable[[], object]]:
    """The launches of a kernel file that matter, by their names, in the 16-bit type that `arch` computes in."""
    module = importlib.import_module(f"fastkit.kernels.{name}")
    if not hasattr(module, "examples"):
        raise FastkitError(f"kernels/{name.replace('.', '/')}.py has no examples(dtype): name its launches there")
    return module.examples(torch.float16 if arch == "sm_75" else torch.bfloat16)


def compile_example(name: str, case: str, arch: str) -> list[dict]:
    """The helper's part of `rows`."""
    take_for(arch)
    try:
        launches = catch(examples(name, arch)[case])
    except NotImplementedError as error:
        why, _, instead = str(error).partition(": use ")
        return [_without_figures(arch, why, instead or None)]
    return [_check(_Here(**vars(launch)), arch, compile_parcel) for launch in launches]


def check(launch: Launch, arch: str) -> dict:
    """What a launch (`fastkit.lab.launches`), also of a kernel of yours, needs on `arch`, and whether it fits there.

    function          the kernel's name
    dtype             of its first tensor
    num_warps, registers, spilled_bytes, shared_bytes, instructions   as in `Compiled`
    shared_limit      bytes of shared memory that a program may take
    occupancy         resident warps, as a fraction of the most that a multiprocessor holds
    limiter           what stops there being more
    fits, why         False if it spills, asks for more than there is or cannot be compiled, and the reason
    fallback          what runs instead, as the kernel's own file says; None if it does not say

    Raises FastkitError for an architecture whose limits are unknown.
    """
    limits(arch)
    return _check(launch, arch, compile_launch)


def unanswered(found: list[dict]) -> list[dict]:
    """The rows of kernels that neither fit nor say what runs instead."""
    return [row for row in found if not row["fits"] and not row["fallback"]]


def misfit(compiled: Compiled) -> str:
    """What of `compiled` its architecture cannot hold, in words; "" if it fits."""
    limit = limits(compiled.arch)
    threads = compiled.num_warps * limit.warp_size
    reasons = []
    if compiled.spilled_bytes > STACK_BYTES:
        reasons.append(f"spills {compiled.spilled_bytes:,} bytes a thread")
    if compiled.shared_bytes > limit.shared_kib * 1024:
        reasons.append(f"takes {compiled.shared_bytes / 1024:.1f} KiB of shared memory, of {limit.shared_kib}")
    if threads > 1024:
        reasons.append(f"has {threads} threads in {compiled.num_warps} warps, of 1024")
    elif not occupancy(compiled.arch, compiled.registers, 0, compiled.num_warps)[0]:
        reasons.append(f"needs {compiled.registers} registers for each of {threads} threads")
    return ", ".join(reasons)


def table(found: list[dict]) -> str:
    """The rows as text, under a line for each example, and at the end what they come to."""
    lines = []
    for row in found:
        title = f"{row['kernel']}, {row['case']}"
        if title not in lines:
            columns = f"{'regs':>6}{'spilled':>9}{'shared KiB':>12}{'warps':>7}{'occupancy':>11}  {'limited by':15}"
            lines += ["", title, f"  {'':8}{'kernel':20}{'type':4}{columns}instructions"]
        lines.append(_line(row))
    fit, failed = sum(row["fits"] for row in found), unanswered(found)
    others = len(found) - fit - len(failed)
    lines += ["", f"{fit} of {len(found)} fit, {others} {'says' if others == 1 else 'say'} what runs instead"]
    lines += [f"{row['kernel']}, {row['case']}, {row['arch']}: {row['why']}; nothing runs instead" for row in failed]
    return "\n".join(lines[1:])


def key_instructions(counts: dict[str, int]) -> str:
    """How global memory is reached, with the bits a lane, and which matrix units work: "ld.global.128,32 HMMA"."""
    found = []
    for name in KEY_INSTRUCTIONS:
        bits = sorted({int(key.removeprefix(f"{name}.")) for key in counts if key.startswith(f"{name}.")}, reverse=True)
        if bits:
            found.append(f"{name}.{','.join(map(str, bits))}")
        elif name in counts:
            found.append(name)
    return " ".join(found)


def _line(row: dict) -> str:
    line, indent = f"  {row['arch']:8}", ""
    if row["registers"] is not None:
        shared = f"{row['shared_bytes'] / 1024:.1f}/{row['shared_limit'] // 1024}"
        line += f"{row['function']:20}{SHORT.get(row['dtype'], row['dtype']):4}{row['registers']:>6}"
        line += f"{row['spilled_bytes']:>9}{shared:>12}{row['num_warps']:>7}{row['occupancy']:>11.0%}  "
        line += f"{row['limiter']:15}{key_instructions(row['instructions'])}"
        indent = f"\n{'':10}"
    if row["fits"]:
        return line
    return f"{line}{indent}does not fit: {row['why']}; instead: {row['fallback'] or 'nothing is named'}"


class _Here(Launch):
    """A launch that need not travel: as a Parcel, but its tensors, which have no memory, stay as they are."""

    def unpack(self):
        return self.kernel, self.arguments, []


def _check(launch: Launch, arch: str, compiler: Callable[[Launch, str], Compiled]) -> dict:
    try:
        compiled = compiler(launch, arch)
    except FastkitError as error:  # the compiler refuses it
        return _without_figures(arch, str(error)) | {"function": launch.name, "dtype": _dtype(launch)}
    filled, limiter = occupancy(arch, compiled.registers, compiled.shared_bytes, compiled.num_warps)
    why = misfit(compiled)
    return {
        "arch": arch,
        "function": launch.name,
        "dtype": _dtype(launch),
        "num_warps": compiled.num_warps,
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
        "shared_bytes": compiled.shared_bytes,
        "shared_limit": limits(arch).shared_kib * 1024,
        "occupancy": filled,
        "limiter": limiter,
        "instructions": dict(compiled.instructions),
        "fits": not why,
        "why": why,
        "fallback": None,
    }


def _without_figures(arch: str, why: str, fallback: str | None = None) -> dict:
    """The row of what was not compiled."""
    row = {"arch": arch, "function": None, "dtype": None} | dict.fromkeys(FIGURES) | {"instructions": {}}
    return row | {"fits": False, "why": why, "fallback": fallback}


def _dtype(launch: Launch) -> str:
    tensors = (getattr(value, "base", value) for value in launch.arguments.values())  # .base: of a TMA descriptor
    return next((str(value.dtype).removeprefix("torch.") for value in tensors if isinstance(value, torch.Tensor)), "")
