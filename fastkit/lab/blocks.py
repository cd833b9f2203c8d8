"""What Triton's programs do, in a page of Python: run a kernel one program after another, on memory that keeps watch.

    from fastkit.lab import blocks

    memory = blocks.Memory()
    x, y = memory.put("x", [1, 2, 3, 4, 5]), memory.put("y", [10, 20, 30, 40, 50])
    out = memory.room("out", 5)
    run = blocks.launch(add._grid_kernel, 2, x, y, out, 5, BLOCK=4)
    out.numbers()  # [11, 22, 33, 44, 55]

The kernel is one of Triton's, or a plain Python function written like one; inside it `tl` is this module, which has
enough of Triton's language for kernels that read, compute and write rows. A block is a numpy array, one number a lane.

Memory is one long row of fp32 numbers, in which tensors lie one behind another; a pointer is a place in it. A GPU
reads and writes wherever a pointer points. Here a lane that leaves its tensor ends the launch, and so do two programs
that meet at a number which one of them writes: programs run at once, so that nothing says which comes first. What was
never written, and what a masked lane without `other` gets, is nan.

For learning: it is slow, knows neither lanes' layouts nor atomics, and its integers never overflow. Triton's own
interpreter (TRITON_INTERPRET=1) runs the whole language; the tests hold the two against each other.
"""

import builtins
import itertools
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from types import FunctionType

import numpy as np

from fastkit.errors import FastkitError

ITEMSIZE = 4  # bytes of a number
float32, int32, int64 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int64)
constexpr = object  # what annotates constants in kernels


class Block(np.ndarray):
    """The numbers of a block, one a lane; arithmetic is numpy's."""

    def to(self, dtype) -> "Block":
        return self.astype(dtype)


class Memory:
    """Tensors, one behind another, in one row of fp32 numbers."""

    def __init__(self):
        self.cells = np.empty(0, np.float32)
        self.tensors: list[Tensor] = []

    def put(self, name: str, values) -> "Pointer":
        """A tensor that holds `values`, numbers in any shape, row after row; returns the pointer to its first."""
        numbers = np.asarray(values, np.float32).reshape(-1)
        tensor = Tensor(self, name, len(self.cells), len(numbers))
        self.cells = np.concatenate([self.cells, numbers])
        self.tensors.append(tensor)
        return Pointer(tensor, np.int64(0))

    def room(self, name: str, size: int) -> "Pointer":
        """A tensor of `size` numbers that nobody has written yet; returns the pointer to its first."""
        return self.put(name, np.full(size, np.nan))

    def at(self, address: int) -> str:
        """What lies at an address, in words."""
        for tensor in self.tensors:
            if tensor.start <= address < tensor.start + tensor.size:
                return f"{tensor.name}[{address - tensor.start}] = {self.cells[address]:g}"
        return "memory of others"


@dataclass(frozen=True)
class Tensor:
    """`size` numbers of the memory, from address `start` on."""

    memory: Memory
    name: str
    start: int
    size: int
    element_ty = float32  # as Triton calls it: x_ptr.dtype.element_ty


@dataclass(frozen=True)
class Pointer:
    """A place, or a block of places, `offsets` numbers behind the first of a tensor."""

    tensor: Tensor
    offsets: np.ndarray
    __array_ufunc__ = None  # block + pointer is not numpy's to add

    def __add__(self, offsets) -> "Pointer":
        return Pointer(self.tensor, self.offsets + offsets)

    __radd__ = __add__

    @property
    def dtype(self) -> Tensor:
        return self.tensor

    def numbers(self) -> np.ndarray:
        """A copy of all that the tensor holds."""
        start = self.tensor.start
        return self.tensor.memory.cells[start : start + self.tensor.size].copy()


@dataclass(frozen=True)
class Access:
    """One load or store of one program: the numbers of `tensor` that its lanes point to, and which lanes take part."""

    program: tuple[int, ...]
    kind: str  # "load" or "store"
    tensor: Tensor
    offsets: np.ndarray
    mask: np.ndarray

    @property
    def bytes(self) -> int:
        return ITEMSIZE * int(self.mask.sum())


@dataclass
class Run:
    """A launch: its grid, what its programs did, in order, and which programs have used each address."""

    grid: tuple[int, ...]
    accesses: list[Access] = field(default_factory=list)
    program: tuple[int, ...] = ()  # the one that runs
    readers: dict[int, set] = field(default_factory=lambda: defaultdict(set))
    writers: dict[int, set] = field(default_factory=lambda: defaultdict(set))

    def bytes_moved(self, kind: str | None = None) -> int:
        """Bytes that all lanes read ("load"), wrote ("store"), or both."""
        return builtins.sum(access.bytes for access in self.accesses if kind in (None, access.kind))


_run: Run | None = None  # the launch that is under way


def launch(kernel, grid, *args, **constants) -> Run:
    """Run `kernel` once for each program of `grid`, one after another. Raises FastkitError where one does wrong."""
    global _run
    grid = (grid,) if isinstance(grid, int) else tuple(grid)
    function = getattr(kernel, "fn", kernel)  # the Python function inside triton.jit
    names = {**function.__globals__, "tl": sys.modules[__name__]}
    function = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    _run = run = Run(grid)
    try:
        for program in itertools.product(*map(builtins.range, grid)):
            run.program = program
            function(*args, **constants)
    finally:
        _run = None
    return run


def program_id(axis: int) -> Block:
    """The number of the program that runs."""
    return np.array(_now().program[axis]).view(Block)


def num_programs(axis: int) -> Block:
    """How many programs there are."""
    return np.array(_now().grid[axis]).view(Block)


def arange(start: int, end: int) -> Block:
    """start, start + 1, ... end - 1: as many lanes. Triton's blocks have a power of two of them, and so have these."""
    if (end - start) & (end - start - 1) or end <= start:
        raise FastkitError(f"a block of {end - start} lanes: take a power of two, and mask the lanes that are too many")
    return np.arange(start, end).view(Block)


def load(pointer: Pointer, mask=True, other=np.nan) -> Block:
    """The numbers at a block of places; `other` for lanes whose mask is False, which do not look."""
    access = _access("load", pointer, mask)
    found = np.broadcast_to(np.float32(other), access.offsets.shape).copy()
    found[access.mask] = pointer.tensor.memory.cells[pointer.tensor.start + access.offsets[access.mask]]
    return found.view(Block)


def store(pointer: Pointer, value, mask=True) -> None:
    """Write a block of numbers to a block of places; lanes whose mask is False write nothing."""
    access = _access("store", pointer, mask)
    values = np.broadcast_to(np.asarray(value, np.float32), access.offsets.shape)
    pointer.tensor.memory.cells[pointer.tensor.start + access.offsets[access.mask]] = values[access.mask]


def _access(kind: str, pointer: Pointer, mask) -> Access:
    """Note an access, once nothing speaks against it."""
    run, tensor = _now(), pointer.tensor
    offsets = np.asarray(pointer.offsets)
    access = Access(run.program, kind, tensor, offsets, np.broadcast_to(np.asarray(mask, bool), offsets.shape))
    places = offsets[access.mask]
    outside = (places < 0) | (places >= tensor.size)
    if outside.any():
        place = int(places[outside][0])
        raise FastkitError(
            f"program {_named(run.program)} {kind}s {tensor.name}[{place}], but {tensor.name} has {tensor.size} "
            f"numbers: what lies there is {tensor.memory.at(tensor.start + place)}"
        )
    if kind == "store" and len(np.unique(places)) < len(places):
        twice = next(place for place in places if (places == place).sum() > 1)
        raise FastkitError(
            f"two lanes of program {_named(run.program)} store {tensor.name}[{twice}]: which of the two stays is chance"
        )
    for place in places.tolist():
        _meet(run, access, tensor.start + place, place)
    run.accesses.append(access)
    return access


def _meet(run: Run, access: Access, address: int, place: int) -> None:
    """Note who uses a number; raise if another program does too and one of the two writes it."""
    stores = access.kind == "store"
    others = run.writers[address] | run.readers[address] if stores else set(run.writers[address])
    if others := sorted(others - {run.program}):
        did = "stored" if others[0] in run.writers[address] else "loaded"
        raise FastkitError(
            f"program {_named(run.program)} {access.kind}s {access.tensor.name}[{place}], which program "
            f"{_named(others[0])} {did} in the same launch: which of the two comes first is chance"
        )
    (run.writers if stores else run.readers)[address].add(run.program)


def _now() -> Run:
    if _run is None:
        raise FastkitError("no program runs here: give the kernel to blocks.launch")
    return _run


def _named(program: tuple[int, ...]) -> str:
    return str(program[0]) if len(program) == 1 else str(program)


def range(*bounds, num_stages: int | None = None) -> builtins.range:
    """Python's range. How far loads run ahead (num_stages) changes when they are made, not which."""
    return builtins.range(*map(int, bounds))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up: how many blocks of b it takes for a."""
    return -(-a // b)


def cast(x, dtype) -> Block:
    return np.asarray(x, dtype).view(Block)


def full(shape, value, dtype=float32) -> Block:
    return np.full(shape, value, dtype).view(Block)


def zeros(shape, dtype=float32) -> Block:
    return full(shape, 0, dtype)


def exp(x) -> Block:
    return np.exp(x)


def sqrt(x) -> Block:
    return np.sqrt(x)


def rsqrt(x) -> Block:
    return np.float32(1) / np.sqrt(x)


def where(condition, x, y) -> Block:
    return np.where(condition, x, y).view(Block)


def maximum(x, y) -> Block:
    return np.maximum(x, y)


def max(x, axis: int = 0) -> Block:
    return np.max(x, axis)


def sum(x, axis: int = 0) -> Block:
    return np.sum(x, axis)
