"""The tracer's part that runs in Triton's interpreter: the addresses of every access, and what they cost.

Compiled code says which lane holds which element of a tile; the interpreter, which knows no lanes, says at what address
each element lies. The two are joined by the place in the source that both speak of.
"""

import hashlib
import inspect
import itertools
import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np

from fastkit.errors import FastkitError
from fastkit.kernels.common import with_scalar_index
from fastkit.lab.gluon_interpreter import interpreted
from fastkit.lab.launches import Parcel
from fastkit.lab.layouts import LINE, SECTOR, LinearLayout, Requests, Traffic, traffic
from fastkit.lab.machine_code import Place

EXAMPLE_ELEMENTS = 2**16  # of a tile whose addresses are kept for pictures
WALK = 256  # executions whose places in memory are kept for pictures
BUDGET = 64  # accesses that a program may execute on average; where they are more, fewer programs are traced
FEWEST = 4  # programs that are traced whatever they cost


@dataclass(frozen=True)
class Plan:
    """How compiled code makes one access. `layout` is None for a tile that the copy engine (TMA) moves."""

    kind: str  # load or store
    place: Place
    shape: tuple[int, ...]
    bits: int
    layout: LinearLayout | None
    vector: int  # elements a lane moves with one instruction
    once: bool  # no element twice: a store, or a copy into shared memory
    past_l1: bool = False  # see layouts.traffic
    executions: int | None = None  # by a program at most, where the code makes it outside of all loops


@dataclass
class Found:
    """What an access did in the programs that were traced. Offsets are bytes from the argument's first."""

    argument: int = -1  # number of the allocation; -1 if no lane was ever active
    traffic: Traffic = field(default_factory=Traffic)
    executions: int = 0
    unknown: str = ""  # why the traffic is not to be told
    lanes: np.ndarray | None = None  # int64 [lanes]: offsets in the first request; -1 for a lane that takes no part
    tile: np.ndarray | None = None  # int64, shaped as the tile: offsets in the first execution; -1 where masked
    walk: list[tuple[tuple[int, int, int], int]] = field(default_factory=list)  # (program, first byte) of executions


@dataclass
class Traced:
    """The answer to a trace. `found` has an entry for each plan, None where interpreter and compiler do not meet."""

    found: list[Found | None]
    programs: list[tuple[int, int, int]]
    touched: dict[int, tuple[int, int]] | None  # (bytes loaded, stored) at least once of each allocation, if all ran
    unplanned: list[tuple[str, Place]]  # accesses that compiled code does not make


def trace_parcel(parcel: Parcel, plans: list[Plan], limit: int | None, seed: int) -> Traced:
    """Run up to `limit` programs of the parcel's launch, or all, in the interpreter; count what `plans` make of it."""
    kernel, arguments, ranges = parcel.unpack()
    if type(kernel).__name__ == "GluonJITFunction":
        kernel = interpreted(kernel)
    total = int(np.prod(parcel.grid))
    recorder = _Recorder(plans, ranges, limit is None or total <= limit)
    programs = sample(parcel.grid, total if limit is None else limit, seed)
    ran = _run(kernel, arguments, parcel.grid, programs, recorder, math.inf if limit is None else BUDGET)
    return recorder.traced(sorted(ran, key=lambda program: program[::-1]), len(ran) == total)


def sample(grid: tuple[int, int, int], limit: int, seed: int) -> list[tuple[int, int, int]]:
    """Programs of `grid`: all of them or, in random order, one of each of `limit` equal parts (first axis fastest)."""
    total = int(np.prod(grid))
    if total <= limit:
        numbers = list(range(total))
    else:
        draw = random.Random(seed)
        edges = [part * total // limit for part in range(limit + 1)]
        numbers = [draw.randrange(low, high) for low, high in itertools.pairwise(edges)]
        draw.shuffle(numbers)  # so that the first of them are a sample too
    return [(n % grid[0], n // grid[0] % grid[1], n // (grid[0] * grid[1])) for n in numbers]


def _run(kernel, arguments, grid, programs, recorder, budget: float) -> list[tuple[int, int, int]]:
    """What Triton's GridExecutor does, for some programs, recording their accesses; returns the programs that ran."""
    from triton.runtime import interpreter

    builder, cls = interpreter.interpreter_builder, interpreter.InterpreterBuilder
    load, store = cls.create_masked_load, cls.create_masked_store

    def recorded_load(self, ptrs, mask, *rest, **named):
        recorder.record("load", ptrs, mask, sys._getframe(1))
        return load(self, ptrs, mask, *rest, **named)

    def recorded_store(self, ptrs, value, mask, *rest, **named):
        recorder.record("store", ptrs, mask, sys._getframe(1))
        return store(self, ptrs, value, mask, *rest, **named)

    def no_dot(self, a, b, d, *rest, **named):  # addresses do not hang on products, which take most of the time
        return d.clone()

    patch_tensor = with_scalar_index(interpreter._patch_lang_tensor)
    fn = kernel.rewrite()
    constants = {name for name, kind in inspect.get_annotations(fn).items() if "constexpr" in str(kind)}
    patches = {"create_masked_load": recorded_load, "create_masked_store": recorded_store, "create_dot": no_dot}
    with mock.patch.multiple(cls, **patches), mock.patch.object(interpreter, "_patch_lang_tensor", patch_tensor):
        scope = interpreter._patch_lang(fn)
        try:
            bound = inspect.getcallargs(fn, **arguments)
            bound = {
                name: value if name in constants else interpreter._implicit_cvt(value) for name, value in bound.items()
            }
            builder.set_grid_dim(*grid)
            for done, program in enumerate(programs):
                if done >= FEWEST and recorder.executions > budget * len(programs):
                    return programs[:done]
                builder.set_grid_idx(*program)
                recorder.program = program
                fn(**bound)
                recorder.end_program()
            return programs
        finally:
            scope.restore()


class _Recorder:
    def __init__(self, plans, ranges, whole):
        self.plans = plans
        self.requests = [plan.layout and Requests.of(plan.layout, plan.vector, plan.once) for plan in plans]
        self.found = [None] * len(plans)
        self.starts = np.array([start for start, _ in ranges], dtype=np.int64)
        self.ends = np.array([end for _, end in ranges], dtype=np.int64)
        self.groups = {}  # (kind, lines from the innermost call outwards) -> plans there, by column
        for number, plan in enumerate(plans):
            chain = tuple((file, line) for file, line, _ in plan.place)
            self.groups.setdefault((plan.kind, chain), []).append(number)
        for members in self.groups.values():
            members.sort(key=lambda number: plans[number].place)
        self.pending = {}  # (kind, chain) -> {columns: executions not yet counted}
        self.settled = {}  # (kind, chain) -> {columns: plan}
        self.unplanned = {}
        self.known = {}  # (plan, digest of offsets) -> what `requested` gives
        self.unlooped = {}  # (plan, program) -> {its executions' addresses: [how many, the traffic of one]}
        self.touched = None
        if whole:
            self.touched = {
                number: np.zeros((2, -(-(end - start) // SECTOR)), dtype=bool)
                for number, (start, end) in enumerate(ranges)
            }
        self.program = (0, 0, 0)
        self.executions = 0
        self.places = {}
        self.triton = Path(sys.modules["triton"].__file__).parent

    def record(self, kind, ptrs, mask, frame) -> None:
        self.executions += 1
        addresses = np.asarray(ptrs.data).astype(np.int64)
        active = np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        levels = self.levels(frame)
        owner = self.owner(kind, addresses, active, size, levels)
        if self.touched is not None and owner >= 0:
            self.touch(kind, owner, addresses[active], size)
        group, columns = self.group(kind, levels)
        if group not in self.groups:
            self.unplanned[group] = True
            return
        execution = (addresses, active, size, owner, self.program)
        plan = self.settled.get(group, {}).get(columns)
        if plan is None:
            self.pending.setdefault(group, {}).setdefault(columns, []).append(execution)
        else:
            self.count(plan, *execution)

    def levels(self, frame) -> list[tuple[str, int, int, int]]:
        """(file, first line, last line, column) of each call that led here, from the innermost outwards."""
        found = []
        while frame is not None and frame.f_code is not _run.__code__:
            key = frame.f_code, frame.f_lasti
            if key not in self.places:
                path = Path(frame.f_code.co_filename)
                line, last, column, _ = list(frame.f_code.co_positions())[frame.f_lasti // 2]
                self.places[key] = None if self.triton in path.parents else (path.name, line, last, column)
            if self.places[key]:
                found.append(self.places[key])
            frame = frame.f_back
        return found

    def group(self, kind, levels):
        """The group of plans at these lines; a call over several lines may have any of them in compiled code."""
        chain = tuple((file, line) for file, line, _, _ in levels)
        columns = tuple((line, column) for _, line, _, column in levels)
        if (kind, chain) in self.groups:
            return (kind, chain), columns
        for other_kind, other in self.groups:
            fits = other_kind == kind and len(other) == len(levels)
            if fits and all(
                f == file and a <= line <= b for (f, line), (file, a, b, _) in zip(other, levels, strict=True)
            ):
                return (kind, other), columns
        return (kind, chain), columns

    def owner(self, kind, addresses, active, size, levels) -> int:
        """The allocation that all active addresses lie in; -1 if none is active."""
        if not active.any():
            return -1
        low, high = addresses[active].min(), addresses[active].max() + size
        inside = np.flatnonzero((self.starts <= low) & (high <= self.ends))
        if not len(inside):
            file, line = levels[0][:2] if levels else ("?", 0)
            nearest = int(np.argmin(np.minimum(abs(self.starts - low), abs(self.ends - high))))
            beyond = (
                f"{high - self.ends[nearest]} bytes beyond the end" if high > self.ends[nearest] else "before the start"
            )
            raise FastkitError(
                f"{file} line {line}: program {self.program} has a {kind} {beyond} of an argument's memory: mask it"
            )
        return int(inside[0])

    def touch(self, kind, owner, addresses, size) -> None:
        marks = self.touched[owner][int(kind == "store")]
        marks[(addresses - self.starts[owner]) // SECTOR] = True
        marks[(addresses + size - 1 - self.starts[owner]) // SECTOR] = True

    def end_program(self) -> None:
        for group in list(self.pending):
            if len(self.pending[group]) == len(self.groups[group]):
                self.settle(group, dict(zip(sorted(self.pending[group]), self.groups[group], strict=True)))

    def settle(self, group, plan_of) -> None:
        self.settled[group] = plan_of
        for columns, executions in self.pending.pop(group).items():
            for execution in executions if columns in plan_of else ():
                self.count(plan_of[columns], *execution)

    def count(self, number, addresses, active, size, owner, program) -> None:
        found = self.found[number] = self.found[number] or Found()
        found.executions += 1
        if owner < 0:
            return
        whole = self.plans[number].layout is None and self.plans[number].kind == "load"  # TMA's box, with zeros beyond
        low = int(addresses[active].min())
        base = low - low % LINE
        pattern = np.where(active | whole, addresses - base, -1)
        key = number, hashlib.blake2b(pattern.tobytes() + active.tobytes(), digest_size=16).digest()
        if key not in self.known:  # where a line begins is all that matters of the base, so most tiles cost the same
            self.known[key] = self.requested(number, pattern.reshape(-1), active.reshape(-1), size)
        moved, first = self.known[key]
        if self.plans[number].executions is None:
            found.traffic += moved
        else:
            self.unlooped.setdefault((number, program), {}).setdefault((key, base), [0, moved])[0] += 1
        start = int(self.starts[owner])
        if found.argument < 0:
            found.argument = owner
            found.lanes = np.where(first < 0, -1, first + base - start)
            if addresses.size <= EXAMPLE_ELEMENTS:
                found.tile = np.where(active, addresses - start, -1)
        if len(found.walk) < WALK:
            found.walk.append((program, low - start))

    def add_unlooped(self) -> None:
        """Add the traffic of what stands in no loop. Where the source has it in one, but always the same, the compiler
        took it out, and made each execution that differs once."""
        for (number, _), executions in self.unlooped.items():
            found, most = self.found[number], self.plans[number].executions
            hoisted = sum(times for times, _ in executions.values()) > most
            if hoisted and len(executions) != most:
                found.unknown = "the compiler took it out of a loop, in part"
            for times, moved in executions.values():
                for _ in range(1 if hoisted else times):
                    found.traffic += moved

    def requested(self, number, offsets, active, size) -> tuple[Traffic, np.ndarray]:
        """The traffic of one execution, and the first request's offsets by lane; -1 in both for what takes no part."""
        plan, requests = self.plans[number], self.requests[number]
        if requests is None:  # row by row, as TMA copies
            lanes, width = offsets.reshape(-1, plan.shape[-1]), size
            taken = lanes >= 0
        else:
            lanes, width = offsets[requests.elements], size * plan.vector
            taken = (lanes >= 0) & requests.active
        first = int(np.argmax(taken.any(axis=1)))
        moved = traffic(lanes, width, taken, plan.past_l1)
        if requests is None:
            moved.bytes_asked = size * int(active.sum())
        return moved, np.where(taken[first], lanes[first], -1)

    def traced(self, programs, whole) -> Traced:
        for group in list(self.pending):  # other numbers of accesses on a line: only an unmistakable shape settles it
            plan_of = {}
            for columns, executions in self.pending[group].items():
                key = executions[0][0].shape, executions[0][2] * 8
                fits = [n for n in self.groups[group] if (self.plans[n].shape, self.plans[n].bits) == key]
                alike = [c for c, e in self.pending[group].items() if (e[0][0].shape, e[0][2] * 8) == key]
                if len(fits) == len(alike) == 1:
                    plan_of[columns] = fits[0]
            self.settle(group, plan_of)
        self.add_unlooped()
        touched = None
        if whole and self.touched is not None:
            touched = {
                number: tuple(SECTOR * int(row.sum()) for row in marks) for number, marks in self.touched.items()
            }
        return Traced(self.found, programs, touched, list(self.unplanned))
