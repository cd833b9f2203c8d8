"""Catch kernel launches instead of making them, and carry them to another process.

`catch(function)` runs a function whose launches only note the kernel, its grid and its arguments: so the library's own
code chooses tiles and strides, and what is compiled or traced elsewhere is what would have run. Outputs stay unwritten.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch

from fastkit.errors import FastkitError
from fastkit.kernels.common import TRITON_MISSING
from fastkit.lab.sources import Source, carry

try:
    from triton.runtime.jit import KernelInterface
except ImportError:
    KernelInterface = None

CARRIED_BYTES = 64 * 2**20  # of floating-point data in one launch; integers, which addresses hang on, always travel
ALIGNMENT = 512  # of an allocation, as torch's allocator on a GPU gives it


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, its arguments by name (constants too), its options (num_warps, num_stages)."""

    kernel: object
    grid: tuple[int, int, int]
    arguments: dict
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def gluon(self) -> bool:
        return type(self.kernel).__name__ == "GluonJITFunction"


def launch(kernel, grid, args=(), **named) -> Launch:
    """The Launch of `kernel[grid](*args, **named)`. `args` may be a dict of all arguments by name.

    Raises FastkitError for what is no kernel, an autotuned kernel, or arguments that do not fit the kernel.
    """
    _need_triton()
    if hasattr(kernel, "configs"):
        raise FastkitError(f"{kernel.fn.__name__} is autotuned: give the kernel inside (.fn) and one configuration")
    if not isinstance(kernel, KernelInterface) or not callable(getattr(kernel, "fn", None)):
        raise FastkitError(f"expected a kernel made by triton.jit, got a {type(kernel).__name__}: decorate it")
    if isinstance(args, dict):
        args, named = (), args | named
    signature = inspect.signature(kernel.fn)
    options = {name: value for name, value in named.items() if name not in signature.parameters}
    try:
        bound = signature.bind(*args, **{name: named[name] for name in named if name not in options})
    except TypeError as error:
        raise FastkitError(
            f"{kernel.fn.__name__}: {error}; its arguments are {', '.join(signature.parameters)}"
        ) from error
    bound.apply_defaults()
    grid = grid(dict(bound.arguments)) if callable(grid) else grid
    grid = tuple(int(size) for size in ((grid,) if isinstance(grid, int) else grid))
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise FastkitError(f"{kernel.fn.__name__}: the grid is {grid}; give 1 to 3 sizes of at least 1")
    return Launch(kernel, grid + (1,) * (3 - len(grid)), dict(bound.arguments), options)


def catch(function: Callable[[], object]) -> list[Launch]:
    """The launches that `function()` makes, none of which runs."""
    _need_triton()
    caught = []

    def caught_launch(kernel, grid):
        return lambda *args, **named: caught.append(launch(kernel, grid, args, **named))

    with mock.patch.object(KernelInterface, "__getitem__", caught_launch):
        function()
    if not caught:
        raise FastkitError("no Triton kernel was launched: on a CPU set TRITON_INTERPRET=1 before Triton is imported")
    return caught


def _need_triton() -> None:
    if KernelInterface is None:
        raise FastkitError(f"kernels can be traced only where Triton is installed ({TRITON_MISSING})")


@dataclass(frozen=True)
class _Storage:
    """An allocation: its size, and its bytes if they travel."""

    size: int
    data: bytes | None


@dataclass(frozen=True)
class _Tensor:
    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Descriptor:
    base: _Tensor
    rest: dict


@dataclass
class Parcel:
    """A launch without its objects: the kernel as source, tensors as sizes, with data where addresses may need it."""

    source: Source
    filename: str  # that the source will have there
    file: str  # that holds the kernel here
    grid: tuple[int, int, int]
    arguments: dict
    options: dict
    storages: list[_Storage] = field(default_factory=list)
    without_data: list[str] = field(default_factory=list)  # names of the tensors whose data stayed behind

    @classmethod
    def of(cls, launch: Launch) -> "Parcel":
        parcel = cls(
            carry(launch.kernel), "<carried>", launch.kernel.fn.__code__.co_filename, launch.grid, {}, launch.options
        )
        storages, budget = {}, CARRIED_BYTES

        def pack(name, value):
            nonlocal budget
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key = storage._cdata  # the same for every view; a meta tensor's has no address
                if key not in storages:
                    whole = not value.is_floating_point() or storage.nbytes() <= budget
                    budget -= storage.nbytes() if value.is_floating_point() and whole else 0
                    data = _bytes(storage) if whole and value.device.type != "meta" else None
                    storages[key] = len(parcel.storages)
                    parcel.storages.append(_Storage(storage.nbytes(), data))
                if parcel.storages[storages[key]].data is None:
                    parcel.without_data.append(name)
                return _Tensor(storages[key], value.dtype, tuple(value.shape), value.stride(), value.storage_offset())
            if type(value).__name__ == "TensorDescriptor":
                rest = {key: item for key, item in vars(value).items() if key != "base"}
                return _Descriptor(pack(name, value.base), rest)
            if isinstance(value, tuple):
                return tuple(pack(name, item) for item in value)
            if isinstance(value, KernelInterface):
                raise FastkitError(
                    f"{launch.name}: argument {name} is a kernel: name it in the kernel's source instead"
                )
            return value

        parcel.arguments = {name: pack(name, value) for name, value in launch.arguments.items()}
        return parcel

    def unpack(self) -> tuple[object, dict, list[tuple[int, int]]]:
        """(kernel, arguments, the allocations' address ranges), in the process that the parcel has come to."""
        kernel = self.source.load(self.filename)
        buffers = [_allocate(storage) for storage in self.storages]

        def open_up(value):
            if isinstance(value, _Tensor):
                storage, start, _ = buffers[value.storage]
                offset = value.offset + start // value.dtype.itemsize
                return torch.empty(0, dtype=value.dtype).set_(storage, offset, value.size, value.stride)
            if isinstance(value, _Descriptor):
                if "layout" in value.rest:
                    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
                else:
                    from triton.tools.tensor_descriptor import TensorDescriptor

                return TensorDescriptor(base=open_up(value.base), **value.rest)
            if isinstance(value, tuple):
                return tuple(map(open_up, value))
            return value

        arguments = {name: open_up(value) for name, value in self.arguments.items()}
        ranges = [(storage.data_ptr() + start, storage.data_ptr() + start + size) for storage, start, size in buffers]
        return kernel, arguments, ranges

    def owners(self) -> dict[int, str]:
        """The name of the first argument in each allocation."""
        found = {}
        for name, value in self.arguments.items():
            value = value.base if isinstance(value, _Descriptor) else value
            if isinstance(value, _Tensor):
                found.setdefault(value.storage, name)
        return found


def _bytes(storage: torch.UntypedStorage) -> bytes:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu().numpy().tobytes()


def _allocate(storage: _Storage) -> tuple[torch.UntypedStorage, int, int]:
    """(memory, start, size): zeros where no data came, which takes no memory until it is written."""
    memory = torch.from_numpy(np.zeros(storage.size + 2 * ALIGNMENT, dtype=np.uint8))  # torch.zeros writes its zeros
    start = -memory.data_ptr() % ALIGNMENT
    if storage.data is not None:
        memory[start : start + storage.size] = torch.frombuffer(bytearray(storage.data), dtype=torch.uint8)
    return memory.untyped_storage(), start, storage.size


def modified(launch: Launch) -> float:
    """When the file that holds the kernel was last written; 0 for a notebook's cell."""
    try:
        return os.path.getmtime(launch.kernel.fn.__code__.co_filename)
    except OSError:
        return 0.0
