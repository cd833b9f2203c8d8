"""What torch does for a function, launch by launch: the bytes that each moves, and those that autograd keeps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkit.errors import FastkitError
from fastkit.lab.plots.paper import BAD, GOOD, INK, Picture, box, key, picture, plural, sheet


@dataclass(frozen=True)
class Pass:
    """One launch: its operation, and the bytes that it reads and writes, each once."""

    name: str
    read: int
    written: int

    @property
    def moved(self) -> int:
        return self.read + self.written


class _Watch(TorchDispatchMode):
    """Notes each operation of torch that moves numbers. Views move none."""

    def __init__(self):
        super().__init__()
        self.passes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").strip("_")
        read = {_place(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        written = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        view = {_storage(x) for x in written} & {_storage(x) for x in read.values()} and not func._schema.is_mutable
        if not view and not name.startswith("empty"):
            self.passes.append(Pass(name, sum(map(_bytes, read.values())), sum(map(_bytes, written))))
        return out


def passes(function: Callable[[], object]) -> list[Pass]:
    """The launches that torch's operations make in `function()`, its backward included, on any device: meta will do.

    An operation counts as one launch that reads its inputs and writes its outputs once, whatever a cache saves; of an
    expanded tensor it reads what is in memory. Triton's kernels are not seen.
    """
    with _Watch() as watch:
        function()
    return watch.passes


def kept(function: Callable[[], object], *inputs: torch.Tensor) -> tuple[int, int]:
    """The bytes that autograd keeps in `function()` for its backward: (of `inputs`, of all other tensors)."""
    own, found = {_storage(x) for x in inputs}, {}

    def keep(x):
        found[_storage(x)] = max(found.get(_storage(x), 0), _bytes(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = function()  # held: its graph holds what was kept
    sizes = [sum(size for storage, size in found.items() if (storage in own) is mine) for mine in (True, False)]
    del result
    return tuple(sizes)


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata  # a meta tensor's has no address


def _place(x: torch.Tensor) -> tuple:
    return _storage(x), x.storage_offset(), x.shape, x.stride(), x.dtype


def _bytes(x: torch.Tensor) -> int:
    """Of the numbers in memory: those of an expanded dimension are one."""
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()


@picture
def waterfall(ways: Mapping[str, Sequence[Pass]], numbers: int) -> Picture:
    """The launches of each way to do the same, one below another: each begins where the bytes of the last one end.

    numbers  of the tensor that the bytes are given for: "bytes a number". Launches that move less than a hundredth of
             that, such as those on one number a row, are drawn as a line

    Raises FastkitError for ways without a launch.
    """
    if not ways or not all(ways.values()):
        raise FastkitError("a way without a launch cannot be drawn: give {name: a list of Pass} with something in each")
    totals = {name: sum(one.moved for one in launches) / numbers for name, launches in ways.items()}
    words = [
        f"{name}: {plural(len(ways[name]), 'launch')}, {total:.3g} bytes a number" for name, total in totals.items()
    ]
    count = sum(map(len, ways.values()))
    figure, axes = sheet("; ".join(words), 0.9 + 0.27 * count + 0.15 * len(ways))
    y, names, reach = 0.0, {}, max(totals.values())
    for name, launches in ways.items():
        x = 0.0
        for one in launches:
            names[y] = one.name
            for part, what, look in ((one.read, "read", GOOD), (one.written, "written", BAD)):
                if part >= 0.01 * numbers:
                    box(axes, x, y - 0.35, part / numbers, 0.7, what, **look)
                x += part / numbers
            if one.moved < 0.01 * numbers:
                axes.plot([x, x], [y - 0.35, y + 0.35], color=INK, linewidth=1.0, gid="small")
            y += 1
        axes.text(x + 0.01 * reach, y - 1, f"{name}: {totals[name]:.3g}", va="center", gid="total")
        y += 0.5
    axes.set(xlim=(0, 1.22 * reach), ylim=(y - 1, -0.6), xlabel="bytes moved so far, for each number of the tensor")
    axes.set_yticks(list(names), list(names.values()))
    axes.tick_params(axis="y", length=0)
    key(figure, {"read from memory": GOOD, "written to memory": BAD})
    return figure
