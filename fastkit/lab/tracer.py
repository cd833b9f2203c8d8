"""See what a Triton kernel does to memory, on any machine, for any NVIDIA GPU.

`trace(kernel, grid, args, arch="sm_89")` compiles the launch for that architecture, without the GPU, to learn which
lane holds which element and how wide an instruction moves them; runs it in Triton's interpreter to learn the elements'
addresses; and counts what each load and store costs: requests, sectors, lines, bytes. The counts are Nsight Compute's
(`l1tex__average_t_sectors_per_request...`); `data/results/tracer_*.json` holds both, side by side.

What cannot be told is None, with the reason beside it, never a number.
"""

import linecache
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastkit.errors import FastkitError
from fastkit.lab.bank_conflicts import SharedAccess, shared_accesses
from fastkit.lab.compiling import Compiled, compile_elsewhere
from fastkit.lab.gluon_interpreter import Uninterpretable
from fastkit.lab.interpreting import Found, Plan
from fastkit.lab.launches import Launch, Parcel, catch, launch, modified
from fastkit.lab.layouts import SECTOR, LinearLayout, Requests
from fastkit.lab.machine_code import Instruction
from fastkit.lab.occupancy import occupancy
from fastkit.lab.worker import INTERPRETER

PROGRAMS = 32  # of a launch that are traced


@dataclass(frozen=True)
class Access:
    """A load or store of global memory in the source, and what it costs in the whole launch.

    Where not all programs were traced, counts are those of the traced ones scaled to all.

    kind            "load" or "store"
    argument        the kernel's argument whose memory it reaches; "" if no lane is ever active
    file, line      where the source has it; `source` is that line
    bits            of an element
    shape           of the tile
    layout          how the tile is spread over lanes, as Triton prints it
    spread          the same as a linear layout, whatever its kind; None where no lane moves it (TMA)
    instruction     "ld.global", "cp.async", "TMA load", "st.global", "TMA store"; "" if the compiler left it out
    vector_bits     bits that one lane moves with one instruction
    requests        instructions of a warp that had an active lane (none for TMA: its engine asks, no lane does)
    sectors, lines  of 32 and 128 bytes, touched by each request, summed; for a TMA load those of each row of the box,
                    whole, since an H100's counters count what lies beyond the tensor and arrives as zeros
    bytes_asked     bytes that the requests want, counted once a request
    lanes           int64 [32]: the byte offset in the argument that each lane asks for first, -1 if inactive
    tile            int64, as the tile: byte offsets of its elements in the first execution, -1 where masked
    walk            (program, byte offset) of its first executions
    unknown         why the counts are None
    """

    kind: str
    argument: str
    file: str
    line: int
    source: str
    bits: int
    shape: tuple[int, ...]
    layout: str
    instruction: str
    vector_bits: int | None
    masked: bool
    requests: float | None = None
    sectors: float | None = None
    lines: float | None = None
    bytes_asked: float | None = None
    lanes: np.ndarray | None = field(default=None, repr=False)
    tile: np.ndarray | None = field(default=None, repr=False)
    walk: tuple[tuple[tuple[int, int, int], int], ...] = field(default=(), repr=False)
    unknown: str = ""
    spread: LinearLayout | None = field(default=None, repr=False)

    @property
    def sectors_per_request(self) -> float | None:
        return self.sectors / self.requests if self.requests else None

    @property
    def lines_per_request(self) -> float | None:
        return self.lines / self.requests if self.requests else None

    @property
    def bytes_moved(self) -> float | None:
        return None if self.sectors is None else SECTOR * self.sectors

    @property
    def efficiency(self) -> float | None:
        """Bytes asked for, by the bytes moved: 1 where access is coalesced and every byte of a sector is wanted."""
        return self.bytes_asked / self.bytes_moved if self.bytes_moved else None


@dataclass(frozen=True)
class Trace:
    """What one launch does to memory.

    programs     (traced, of the launch)
    least_bytes  {"load": ..., "store": ...}: what must move if nothing moves twice; None unless all programs ran
    notes        what a reader of the numbers should know
    """

    kernel: str
    arch: str
    grid: tuple[int, int, int]
    programs: tuple[int, int]
    accesses: tuple[Access, ...]
    shared: tuple[SharedAccess, ...]
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    occupancy: float | None
    occupancy_limit: str
    instructions: Counter
    least_bytes: dict[str, int] | None
    notes: tuple[str, ...] = field(default=())

    def rows(self) -> list[dict]:
        """A row for each access, to be shown as a table (fastkit.lab.notebook.table); what is unknown says so."""
        return [
            {
                "line": access.line,
                "source": access.source,
                "access": f"{access.kind} {access.argument}".strip(),
                "instruction": f"{access.instruction}.{access.vector_bits}"
                if access.vector_bits
                else access.instruction,
                "requests": _shown(access.requests, access),
                "sectors a request": _shown(access.sectors_per_request, access),
                "KiB asked": _shown(access.bytes_asked, access, 1024),
                "KiB moved": _shown(access.bytes_moved, access, 1024),
                "efficiency": "unknown" if access.efficiency is None else f"{access.efficiency:.0%}",
            }
            for access in self.accesses
        ]

    def __str__(self) -> str:
        """What it says in a terminal: an access a line, then the kernel."""
        lines = [f"{self.kernel} for {self.arch}, {self.programs[1]:,} programs"]
        for row in self.rows():
            lines.append(
                f"  line {row['line']:>4}  {row['access']:<22} {row['instruction']:<14} {row['sectors a request']} "
                f"sectors a request, {row['KiB moved']} KiB moved for {row['KiB asked']} asked ({row['efficiency']})"
            )
        for a in self.shared:
            told = "unknown" if a.conflicts is None else f"{a.conflicts} bank conflicts"
            lines.append(f"  line {a.line:>4}  {a.kind + ', shared memory':<22} {a.instruction:<14} {told}")
        spilled = f", {self.spilled_bytes} bytes spilled" if self.spilled_bytes else ""
        occupancy = "unknown" if self.occupancy is None else f"{self.occupancy:.0%}, by {self.occupancy_limit}"
        lines.append(
            f"  {self.num_warps} warps, {self.registers} registers{spilled}, {self.shared_bytes:,} bytes of shared "
            f"memory, occupancy {occupancy}"
        )
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def of(self, kind: str, tma: bool | None = None) -> list[Access]:
        """The accesses of a kind, "load" or "store"; those that TMA makes, or those that lanes make, if `tma` says."""
        return [a for a in self.accesses if a.kind == kind and tma in (None, a.instruction.startswith("TMA"))]

    def requests(self, kind: str) -> float | None:
        """Requests of all loads, or all stores, that lanes make; None if one is unknown."""
        return _sum(access.requests for access in self.of(kind, tma=False))

    def sectors_per_request(self, kind: str) -> float | None:
        """Sectors by requests over all loads, or all stores, that lanes make; None if one is unknown."""
        requests, sectors = self.requests(kind), _sum(access.sectors for access in self.of(kind, tma=False))
        return sectors / requests if requests else None

    def bytes_moved(self, kind: str, tma: bool | None = None) -> float | None:
        """Bytes of all sectors that loads, or stores, touch, of `of`; None if one is unknown."""
        return _sum(access.bytes_moved for access in self.of(kind, tma))

    def conflict_degree(self, kind: str) -> float | None:
        """Turns of the banks for each that would do, over all loads, or stores, of shared memory; None if unknown."""
        accesses = [access for access in self.shared if access.kind == kind]
        least = _sum(access.least for access in accesses)
        return _sum(access.wavefronts for access in accesses) / least if least else None

    @property
    def conflicts(self) -> int | None:
        """Bank conflicts of one execution of every access to shared memory in one program; None if one is unknown."""
        return _sum(access.conflicts for access in self.shared)


def _shown(value: float | None, access: Access, unit: int = 1) -> str:
    if value is None:
        return "none" if access.instruction.startswith("TMA") else "unknown"
    return f"{value / unit:,.2f}".rstrip("0").rstrip(".")


def _sum(values) -> float | None:
    values = list(values)
    return None if None in values else sum(values)


def trace(kernel, grid, args, arch: str = "sm_90", programs: int | None = PROGRAMS, seed: int = 0, **named) -> Trace:
    """Trace `kernel[grid](*args, **named)`, which is not run; tensors stay as they are.

    kernel    a function decorated with triton.jit or gluon.jit
    grid      as for a launch: sizes, or a function of the arguments
    args      the arguments in order, or a dict of them by name; tensors on any device, "meta" included
    arch      "sm_75" to "sm_120"
    programs  trace at most so many (fewer of long ones), drawn evenly over the grid with `seed`; the rest are taken to
              be like them. None: all of them, whatever that takes
    named     constants and options: BLOCK=1024, num_warps=8

    Raises FastkitError for what cannot be launched or compiled, or reaches outside its tensors.
    """
    return _trace(launch(kernel, grid, args, **named), arch, programs, seed)


def trace_launches(
    function: Callable[[], object], arch: str = "sm_90", programs: int | None = PROGRAMS, seed: int = 0
) -> list[Trace]:
    """Trace the launches that `function()` makes, in order; none of them runs. Everything else is as in `trace`."""
    return [_trace(one, arch, programs, seed) for one in catch(function)]


def _trace(one: Launch, arch: str, limit: int | None, seed: int) -> Trace:
    if not arch.startswith("sm_"):
        raise FastkitError(f"cannot trace for {arch}: sectors and banks are those of NVIDIA GPUs, such as sm_89")
    INTERPRETER.start()
    parcel, since = Parcel.of(one), modified(one)
    compiled = compile_elsewhere(parcel, arch, since)
    plans, rest = _plans(compiled)
    notes, traced = [], None
    found = [None] * len(plans)
    try:
        known = [plan for plan, _ in plans]
        traced = INTERPRETER.ask("interpreting:trace_parcel", parcel, known, limit, seed, newer_than=since)
        found = traced.found
    except Uninterpretable as error:
        notes.append(f"addresses are unknown: {error}")
    if parcel.without_data:
        notes.append(f"traced as zeros, having no data or too much: {', '.join(parcel.without_data)}")
    total = int(np.prod(one.grid))
    scale = total / len(traced.programs) if traced else 1
    if traced and len(traced.programs) < total:
        notes.append(f"{len(traced.programs)} of {total} programs were traced; counts are scaled to all")
    owners = parcel.owners()
    accesses = [_access(parcel, plan, how, f, scale, owners) for (plan, how), f in zip(plans, found, strict=True)]
    accesses += [_unknown(parcel, site, why) for site, why in rest]
    accesses += [_left_out(parcel, kind, chain) for kind, chain in (traced.unplanned if traced else ())]
    fraction, limiter = occupancy(arch, compiled.registers, compiled.shared_bytes, compiled.num_warps)
    return Trace(
        kernel=compiled.kernel,
        arch=arch,
        grid=one.grid,
        programs=(len(traced.programs) if traced else 0, total),
        accesses=tuple(sorted(accesses, key=lambda access: (access.file, access.line))),
        shared=tuple(shared_accesses(compiled, lambda place: _line(parcel, place)[1:])),
        num_warps=compiled.num_warps,
        registers=compiled.registers,
        spilled_bytes=compiled.spilled_bytes,
        shared_bytes=compiled.shared_bytes,
        occupancy=fraction,
        occupancy_limit=limiter,
        instructions=compiled.instructions,
        least_bytes=_least(traced),
        notes=tuple(notes),
    )


def _plans(compiled: Compiled):
    """([(plan, how it is made)], [(site, why it is unknown)]) for the global accesses; copies of one access are one."""
    names = {"load": ("ld.global", "cp.async", "TMA load"), "store": ("st.global", "TMA store")}
    by_place = {}
    for site in compiled.global_sites:
        by_place.setdefault((site.kind, site.place), []).append(site)
    plans, rest = [], []
    for (kind, place), sites in by_place.items():
        site = sites[0]
        made = [i for i in compiled.memory_instructions if i.place == place and i.name in names.get(kind, ())]
        kinds = {(i.name, i.bits) for i in made}
        if kind == "atomic":
            rest.append((site, "an atomic operation"))
        elif any((s.shape, s.layout) != (site.shape, site.layout) for s in sites):
            rest.append((site, "compiled several times, with different layouts"))
        elif len(kinds) != 1:
            rest.append((site, "no instruction, or several kinds, stand at its place in the machine code"))
        elif site.layout is None and not made[0].name.startswith("TMA"):
            rest.append((site, "its layout is spread over a cluster"))
        else:
            ((name, bits),) = kinds
            once = kind == "store" or name == "cp.async"
            vector = max(1, bits // site.bits)
            past_l1 = name == "cp.async" and bits == 128
            executions = _unlooped(made, site.layout, vector, once)
            plan = Plan(kind, place, site.shape, site.bits, site.layout, vector, once, past_l1, executions)
            plans.append((plan, (site, name, bits or None)))
    return plans, rest


def _unlooped(made: list[Instruction], layout: LinearLayout | None, vector: int, once: bool) -> int | None:
    """How often a program makes an access at most, if its instructions all stand outside of loops; else None."""
    if layout is None or any(instruction.looped for instruction in made):
        return None
    warps = Requests.of(layout, vector, once).warp
    a_warp = len(warps) // len(set(warps.tolist()))  # instructions for one execution
    return len(made) // a_warp if len(made) % a_warp == 0 else None


def _access(parcel, plan: Plan, how, found: Found | None, scale, owners) -> Access:
    site, name, bits = how
    file, line, source = _line(parcel, plan.place)
    known = {}
    if found is None or found.unknown:
        why = found.unknown if found else "no traced program came here, or its line has other accesses too"
        known = {"unknown": why}
    else:
        moved = found.traffic
        known = {
            "requests": None if plan.layout is None else moved.requests * scale,
            "sectors": moved.sectors * scale,
            "lines": moved.lines * scale,
            "bytes_asked": moved.bytes_asked * scale,
            "lanes": None if plan.layout is None else found.lanes,
            "tile": found.tile,
            "walk": tuple(found.walk),
        }
    argument = owners.get(found.argument, "") if found else ""
    return Access(
        plan.kind,
        argument,
        file,
        line,
        source,
        plan.bits,
        plan.shape,
        site.layout_text,
        name,
        bits,
        site.masked,
        spread=plan.layout,
        **known,
    )


def _unknown(parcel, site, why: str) -> Access:
    file, line, source = _line(parcel, site.place)
    return Access(
        site.kind, "", file, line, source, site.bits, site.shape, site.layout_text, "", None, site.masked, unknown=why
    )


def _left_out(parcel, kind, chain) -> Access:
    file, line, source = _line(parcel, tuple((file, line, 0) for file, line in chain))
    why = "the compiled kernel does not make it: another access gives the same, or nothing needs it"
    return Access(kind, "", file, line, source, 0, (), "", "", None, False, unknown=why)


def _line(parcel: Parcel, place) -> tuple[str, int, str]:
    """(file, line, text) of a place, in the author's words where the source was carried."""
    if not place:
        return "", 0, ""
    file, line, _ = place[0]
    if file == parcel.filename:
        origin = parcel.source.origin(line) or ("", line)
        text = parcel.source.text.splitlines()[line - 1] if line <= parcel.source.text.count("\n") else ""
        return origin[0], origin[1], text.strip()
    paths = [parcel.file, *(getattr(module, "__file__", None) for module in list(sys.modules.values()))]
    path = next((path for path in paths if path and Path(path).name == file), file)
    return path, line, linecache.getline(path, line).strip()


def _least(traced) -> dict[str, int] | None:
    if traced is None or traced.touched is None:
        return None
    loads, stores = zip(*traced.touched.values(), strict=True) if traced.touched else ((0,), (0,))
    return {"load": sum(loads), "store": sum(stores)}
