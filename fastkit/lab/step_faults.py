"""The five faults of the capstone's step: each function counts one in a step's parts, at a real size, without a GPU.

All count for sm_90 and give the first Fault that is left, or None.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fastkit.lab import capstone
from fastkit.lab.accounts import Account, account_of
from fastkit.lab.capstone import Parts
from fastkit.lab.compiling import compile_launch
from fastkit.lab.launches import Launch
from fastkit.lab.matrix_units import multiplies
from fastkit.lab.tracer import Trace, trace

ARCH = "sm_90"
MOVED_PER_ASKED = 1.1  # bytes; what a first or last sector adds is no fault
COPIES = ("to_copy", "copy", "clone")  # torch's operations that compute nothing
SMALL = 2**12  # numbers: a norm, a scale for each row
PROGRAMS = 4  # of a launch that are traced


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step: a property, as a Verdict has it, a sentence, and lines that say more."""

    property: str
    message: str
    lines: tuple[str, ...] = ()


def _batch() -> capstone.Batch:
    """Rows as long as the real layer's, fewer of them."""
    return capstone.batch(256, capstone.HIDDEN, 1024)


def _accounts(parts: Parts) -> Iterator[tuple[str, Account, object]]:
    """(name, account, result) of each call of the step."""
    for name, call in capstone.calls(parts, _batch()).items():
        results = []
        yield name, account_of(lambda call=call, results=results: results.append(call())), results[0]


def _trace(launch: Launch) -> Trace:
    return trace(launch.kernel, launch.grid, launch.arguments, arch=ARCH, programs=PROGRAMS, **launch.options)


def strided(parts: Parts) -> Fault | None:
    """A load or store whose requests move more bytes than they ask for. One that the tracer cannot tell is none."""
    for name, account, _ in _accounts(parts):
        accesses = [access for launch in account.launches for access in _trace(launch).accesses]
        wasteful = [one for one in accesses if one.bytes_asked and one.bytes_moved > MOVED_PER_ASKED * one.bytes_asked]
        if wasteful:
            worst = max(wasteful, key=lambda one: one.bytes_moved / one.bytes_asked)
            times = worst.bytes_moved / worst.bytes_asked
            return Fault(
                "strided",
                f"{name}: a {worst.kind} of {worst.argument} moves {times:.3g} bytes for each that it asks for",
                (
                    f"{worst.sectors_per_request:.3g} sectors a request, as the tracer predicts it for {ARCH}",
                    f"line {worst.line}: {worst.source}",
                ),
            )
    return None


def conflicts(parts: Parts) -> Fault | None:
    """A bank conflict where the step lays out shared memory itself; and, in `turn`, a layout that cannot be counted."""
    for name, account, _ in _accounts(parts):
        if name == "turn" and not account.launches and account.passes:
            return Fault(
                "conflicts", f"turn leaves it to torch ({account.passes[0].name}), which writes column by column"
            )
        for launch in account.launches:
            if not launch.gluon and name != "turn":
                continue  # Triton's own exchanges are the compiler's
            traced = _trace(launch)
            if traced.conflicts is None:
                why = next(one.unknown for one in traced.shared if one.unknown)
                return Fault("conflicts", f"{name}: conflicts cannot be counted, for {why}: choose a layout in Gluon")
            if traced.conflicts:
                worst = max(traced.shared, key=lambda one: one.conflicts)
                return Fault(
                    "conflicts",
                    f"{name}: a program has {traced.conflicts} bank conflicts",
                    (
                        f"a {worst.kind} takes {worst.degree:.3g} turns for each that would do",
                        f"line {worst.line}: {worst.source}",
                    ),
                )
    return None


def off_tensor_cores(parts: Parts) -> Fault | None:
    """A product that is not WGMMA in fp16 with sums in fp32."""
    for name, account, _ in _accounts(parts):
        if not name.startswith("multiply"):
            continue
        if not account.launches:
            return Fault(
                "tensor cores", f"{name}: launches no Triton kernel; mend the kernel, do not leave it to torch"
            )
        kinds = [kind for launch in account.launches for kind in multiplies(compile_launch(launch, ARCH))]
        if not kinds:
            return Fault("tensor cores", f"{name}: nothing multiplies in its code for {ARCH}")
        for kind in kinds:
            if wrong := _lacking(kind):
                shape = "x".join(map(str, kind.shape))
                told = f"{kind.count} {kind.name} {shape} {kind.dtype}, sums {kind.sums}, in the code for {ARCH}"
                return Fault("tensor cores", f"{name}: {wrong}", (told,))
    return None


def _lacking(kind) -> str:
    if not kind.tensor_cores:
        return "no tensor core takes part, plain FMAs do it"
    if kind.dtype != "f16":
        return f"its factors are {kind.dtype}, where f16 runs at twice the rate and loses no digit of theirs"
    if kind.sums != "f32":
        return f"its sums are {kind.sums}: they lose digits at every turn of the loop"
    if kind.name != "WGMMA":
        return f"{kind.name} is not all that {ARCH} has: WGMMA wants four warps, and 64 rows between them"
    return ""


def copied(parts: Parts) -> Fault | None:
    """A pass of torch that only copies, or a large tensor in fp32."""
    for name, account, result in _accounts(parts):
        for one in account.passes:
            if one.name in COPIES and one.moved > SMALL:
                message = f"{name}: a pass of torch only copies ({one.name}): {_mib(one.read)} read"
                return Fault("copies", message, (f"{_mib(one.written)} written",))
        for launch in account.launches:
            for argument, value in launch.arguments.items():
                if _is_wide(value):
                    return Fault("copies", f"{name}: {argument} of {launch.name} is float32 {list(value.shape)}")
        if _is_wide(result):
            return Fault("copies", f"{name}: gives float32 {list(result.shape)}, where float16 is wanted")
    return None


def _is_wide(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and math.prod(value.shape) > SMALL


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"


def waits(parts: Parts) -> Fault | None:
    """A place where the host waits for the GPU."""
    for name, account, _ in _accounts(parts):
        for one in account.waits:
            return Fault("waits", f"{name}: the host waits: it {one.why}", (f"line {one.line}: {one.source}",))
    return None


FAULTS: dict[str, Callable[[Parts], Fault | None]] = {
    "strided_access": strided,
    "bank_conflicts": conflicts,
    "lost_tensor_cores": off_tensor_cores,
    "needless_copy": copied,
    "synchronisation": waits,
}
