"""What a step does, counted without a GPU: kernels launched, passes of torch, and places where the host waits.

account = account_of(lambda: step(parts, batch))        # on meta tensors, at the real size
account.launches, account.passes, account.waits
"""

import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastkit.errors import FastkitError
from fastkit.lab.launches import Launch, catch
from fastkit.lab.plots.passes import Pass, passes

TORCH = Path(torch.__file__).parent
READS = {"_local_scalar_dense": "reads a number", "equal": "compares and reads the answer"}
SIZES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")  # a result's shape hangs on values


@dataclass(frozen=True)
class Wait:
    """A place where the host waits until the GPU has done all that it was given.

    why           "reads a number", "copies to the host", "needs a result's size", "synchronises"
    file, line    where the code has it; `source` is that line
    """

    why: str
    file: str
    line: int
    source: str


@dataclass(frozen=True)
class Account:
    """What a function did: launches of Triton's kernels, passes of torch's operations, waits of the host."""

    launches: list[Launch]
    passes: list[Pass]
    waits: list[Wait]


def account_of(function: Callable[[], object]) -> Account:
    """What `function()` does with meta tensors, or any others. Its Triton kernels are noted and not run.

    A number that is read off a meta tensor is 1, so of an `if` on numbers the branch for 1 is seen. Not seen are waits
    that go round torch: those of another library, of a stream or an event.
    """
    launches, waits = [], []

    def run():
        with _Waits(waits):
            launches.extend(_launches(function))

    with mock.patch.object(torch.cuda, "synchronize", lambda device=None: waits.append(_wait("synchronises"))):
        done = passes(run)
    return Account(launches, done, waits)


def _launches(function) -> list[Launch]:
    """`catch`, for a function that may launch nothing."""
    ended = []
    try:
        return catch(lambda: ended.append(function()))
    except FastkitError:
        if not ended:
            raise
        return []


class _Waits(TorchDispatchMode):
    """Notes what makes the host wait, and answers it for meta tensors, which hold no numbers."""

    def __init__(self, found: list[Wait]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name in READS:
            self.found.append(_wait(READS[name]))
            if first.device.type == "meta":
                return 1.0 if first.dtype.is_floating_point else 1
        if name in SIZES or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(_wait("needs a result's size"))
            if first.device.type == "meta":
                return first.new_empty(1, first.dim()).long() if name == "nonzero" else first.new_empty(1)
        if name == "_to_copy" and _leaves(first.device, kwargs.get("device")):
            self.found.append(_wait("copies to the host"))
            return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        if name == "copy_" and _leaves(args[1].device, first.device):
            self.found.append(_wait("copies to the host"))
            return first.fill_(1)
        return func(*args, **kwargs)


def _leaves(source: torch.device, target: torch.device | None) -> bool:
    return target is not None and source.type != "cpu" and torch.device(target).type == "cpu"


def _wait(why: str) -> Wait:
    """A Wait at the innermost place that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame.f_back and (TORCH in Path(frame.f_code.co_filename).parents or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    return Wait(why, file, line, linecache.getline(file, line).strip())
