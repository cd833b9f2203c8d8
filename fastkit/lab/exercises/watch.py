"""Watch an answer run: the torch operations that it calls, its launches and, in the interpreter, every memory access.

An access out of bounds is noted and left out, so that the run goes on. A masked load without `other` gets nan where
the interpreter would give 0 and a GPU anything.
"""

import sys
import weakref
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, _get_np_dtype
from triton.runtime.jit import JITFunction

from fastkit.lab.exercises.blame import place_of
from fastkit.lab.exercises.finding import Finding, Findings
from fastkit.lab.exercises.memory import MANY, NOBODY, Buffer, Memory

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like"}
ALLOCATIONS |= {"new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange"}
FILLS = {"fill_", "zero_"}


_made = {}  # tensors that answers made: one may be kept from one run to the next


class Watch:
    """What is found while an answer runs on `memory`."""

    def __init__(self, memory: Memory, reverse: bool = False, masked_poison: bool = True):
        self.memory = memory
        for number, reference in list(_made.items()):
            if (tensor := reference()) is not None:
                memory.adopt(tensor)
            else:
                del _made[number]
        self.reverse = reverse  # the programs of a launch run last to first
        self.masked_poison = masked_poison
        self.findings = Findings()
        self.launches = 0
        self.programs = 0  # of the largest launch
        self.masked_without_other = None  # (file, line)
        self.returned = None  # by the answer
        self.launching = False
        self.locked = False  # this launch exchanges or compares: it may hold locks, and order its programs itself
        self.hazards = []

    @contextmanager
    def on(self):
        """Watch all that runs inside."""
        with ExitStack() as stack:
            stack.enter_context(_Operations(self))
            for cls in (InterpretedFunction, JITFunction, Autotuner):
                stack.enter_context(mock.patch.object(cls, "run", self._launch(cls.run)))
            for name in ("masked_load", "masked_store", "atomic_rmw", "atomic_cas"):
                method = f"create_{name}"
                hook = getattr(self, f"_{name}")(getattr(InterpreterBuilder, method))
                stack.enter_context(mock.patch.object(InterpreterBuilder, method, hook))
            stack.enter_context(mock.patch.object(InterpreterBuilder, "set_grid_idx", self._grid_idx()))
            yield self

    def note(self, property: str, message: str, *lines: str) -> None:
        self.findings.add(Finding(property, message, list(lines), _place()))

    def _launch(self, run):
        def launch(kernel, *args, **named):
            if named.get("warmup") or self.launching:
                return run(kernel, *args, **named)
            self.launches += 1
            self.launching, self.locked, self.hazards = True, False, []
            for buffer in self.memory.buffers:
                buffer.start_launch()
            try:
                return run(kernel, *args, **named)
            finally:
                self.launching = False
                for finding in self.hazards if not self.locked else ():
                    self.findings.add(finding)

        return launch

    def _grid_idx(self):
        original = InterpreterBuilder.set_grid_idx

        def set_grid_idx(builder, x, y, z):
            _, ny, nz = builder.grid_dim
            total = int(np.prod(builder.grid_dim))
            self.programs = max(self.programs, total)
            if self.reverse:
                number = total - 1 - ((x * ny + y) * nz + z)
                x, y, z = number // (ny * nz), number // nz % ny, number % nz
            self.program = (x * ny + y) * nz + z
            self.program_id = (x, y, z)[: 3 if nz > 1 else 2 if ny > 1 else 1]
            original(builder, x, y, z)

        return set_grid_idx

    def _masked_load(self, load):
        def masked_load(builder, ptrs, mask, other, *rest, **named):
            active = np.broadcast_to(np.asarray(mask.data, dtype=bool), ptrs.data.shape)
            allowed = self._access(ptrs, active, "reads")
            if other is None and not active.all():
                self.masked_without_other = self.masked_without_other or _place()
                if self.masked_poison:
                    other = _poison(ptrs)
            mask = mask if allowed is active else _mask(allowed)
            return load(builder, ptrs, mask, other, *rest, **named)

        return masked_load

    def _masked_store(self, store):
        def masked_store(builder, ptrs, value, mask, *rest, **named):
            active = np.broadcast_to(np.asarray(mask.data, dtype=bool), ptrs.data.shape)
            allowed = self._access(ptrs, active, "writes", np.broadcast_to(value.data, ptrs.data.shape))
            mask = mask if allowed is active else _mask(allowed)
            return store(builder, ptrs, value, mask, *rest, **named)

        return masked_store

    def _atomic_rmw(self, rmw):
        def atomic_rmw(builder, op, ptrs, value, mask, *rest):
            self.locked |= getattr(op, "name", "") == "XCHG"
            active = np.broadcast_to(np.asarray(mask.data, dtype=bool), ptrs.data.shape)
            allowed = self._access(ptrs, active, "adds to")
            mask = mask if allowed is active else _mask(allowed)
            return rmw(builder, op, ptrs, value, mask, *rest)

        return atomic_rmw

    def _atomic_cas(self, cas):
        def atomic_cas(builder, ptrs, cmp, value, *rest):
            self.locked = True
            allowed = self._access(ptrs, np.ones(ptrs.data.shape, dtype=bool), "adds to")
            if not allowed.all():  # no mask to leave lanes out with
                raise IndexError("tl.atomic_cas out of bounds")
            return cas(builder, ptrs, cmp, value, *rest)

        return atomic_cas

    def _access(self, ptrs, active, verb: str, values=None) -> np.ndarray:
        """Note what is wrong with an access; returns the lanes that may make it, `active` itself if all may."""
        lanes = np.flatnonzero(active)
        if not len(lanes):
            return active
        addresses = ptrs.data.reshape(-1)[lanes].astype(np.int64)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        allowed = np.ones(len(lanes), dtype=bool)
        owners = np.searchsorted(self.memory.starts, addresses, side="right") - 1
        for number in np.unique(owners):
            group = np.flatnonzero(owners == number)
            first = int(addresses[group[0]])
            buffer = self.memory.owner(first) or self.memory.nearest(first)
            theirs = None if values is None else values.reshape(-1)[lanes[group]]
            allowed[group] = self._access_buffer(buffer, addresses[group], size, verb, theirs)
        if allowed.all():
            return active
        result = np.zeros(active.size, dtype=bool)
        result[lanes[allowed]] = True
        return result.reshape(active.shape)

    def _access_buffer(self, buffer: Buffer, addresses, size, verb, values) -> np.ndarray:
        itemsize = buffer.tensor.dtype.itemsize
        width = max(1, size // itemsize)  # elements an access: more than one where bytes are read as words
        elements = (addresses - buffer.start) // itemsize
        elements = elements[:, None] + np.arange(width)
        inside = (elements >= 0) & (elements < buffer.span)
        inside[inside] = buffer.places[elements[inside]] >= 0
        allowed = inside.all(axis=1)
        if not allowed.all():
            self._note_outside(buffer, elements[~inside], verb)
        elements = elements[allowed]
        if not len(elements):
            return allowed
        if verb == "reads":
            self._read(buffer, elements.reshape(-1))
        elif buffer.role == "input":
            self.note("inputs changed", f"program {self._program()} {verb} {buffer.labels(elements)}, an input")
        elif size != itemsize:
            message = f"{verb} {buffer.name} in numbers of {size} bytes; it holds {buffer.tensor.dtype}"
            self.note("dtype", message.replace("torch.", ""))
        elif verb == "writes":
            self._write(buffer, elements[:, 0], values[allowed])
        else:
            self._read(buffer, elements[:, 0], "adds to")
            buffer.written[elements[:, 0]] = buffer.stored[elements[:, 0]] = True
        return allowed

    def _note_outside(self, buffer: Buffer, elements, verb) -> None:
        if elements.max() >= buffer.span:
            elements, where = elements[elements >= buffer.span], "past the end"
        elif elements.min() < 0:
            elements, where = elements[elements < 0], "before the start"
        else:
            where = "between the rows"
        shape = list(buffer.tensor.shape)
        self.note(
            "out of bounds",
            f"{verb} memory {where} of {buffer.name}",
            f"program {self._program()} {verb} {buffer.labels(elements)}; {buffer.name} is {shape}",
        )

    def _read(self, buffer: Buffer, elements, verb: str = "reads") -> None:
        unwritten = ~buffer.written[elements]
        if unwritten.any():
            self.note(
                "reads unwritten",
                f"{verb} {buffer.name} before anything was written there",
                f"program {self._program()} {verb} {buffer.labels(elements[unwritten])}",
            )
        if verb == "reads":
            self._hazard(buffer, elements, buffer.writer, "reads", "wrote")
            reader = buffer.reader[elements]
            buffer.reader[elements] = np.where((reader == NOBODY) | (reader == self.program), self.program, MANY)

    def _write(self, buffer: Buffer, elements, values) -> None:
        bits = np.ascontiguousarray(values).view(buffer.words().dtype)
        differ = buffer.words()[elements] != bits
        self._hazard(buffer, elements[differ], buffer.writer, "writes", "wrote another number to")
        self._hazard(buffer, elements[differ], buffer.reader, "writes", "read")
        unique, first = np.unique(elements, return_index=True)
        if len(unique) < len(elements):
            same = bits[first][np.searchsorted(unique, elements)] == bits
            if not same.all():
                what = buffer.labels(elements[~same])
                message = f"two lanes of one store write different numbers to {buffer.name}"
                self.hazards.append(Finding("race", message, [f"program {self._program()}: {what}"], _place()))
        buffer.writer[elements] = self.program
        buffer.written[elements] = buffer.stored[elements] = True

    def _hazard(self, buffer: Buffer, elements, users, does: str, did: str) -> None:
        others = (users[elements] != NOBODY) & (users[elements] != self.program)
        if others.any() and buffer.role != "input":
            what = buffer.labels(elements[others])
            message = f"two programs use the same place of {buffer.name}, and which comes first is chance"
            line = f"program {self._program()} {does} {what}, which another program {did} in the same launch"
            self.hazards.append(Finding("race", message, [line], _place()))

    def _program(self) -> str:
        return f"({', '.join(map(str, self.program_id))}{',' if len(self.program_id) == 1 else ''})"


class _Operations(TorchDispatchMode):
    """Notes torch's operations, other than views, allocations and fills, while no kernel runs."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if self.watch.launching:
            return result
        name = operation.overloadpacket.__name__
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                if "empty" in name and tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                self.watch.memory.adopt(tensor)
                _made[id(tensor)] = weakref.ref(tensor)
        if name in FILLS:
            self.watch.memory.fill(args[0])
        elif not (operation.is_view or name in ALLOCATIONS):
            self.watch.note("calls torch", f"calls torch's {name.strip('_')}: the kernel is to do the work")
        return result


def _mask(lanes: np.ndarray) -> TensorHandle:
    return TensorHandle(np.ascontiguousarray(lanes), triton.language.int1)


def _poison(ptrs) -> TensorHandle:
    dtype = _get_np_dtype(ptrs.get_element_ty())
    data = np.full(ptrs.data.size * dtype.itemsize, 0xFF, dtype=np.uint8).view(dtype).reshape(ptrs.data.shape)
    return TensorHandle(data, ptrs.get_element_ty())


def _place() -> tuple[str, int] | None:
    return place_of(sys._getframe(1))
