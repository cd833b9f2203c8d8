"""What every ladder shares: a rung, when it can run, which to take.

A ladder is one operation written several times, each time with one idea more. All rungs of a ladder take the same
tensors and write the same result, so what a rung is worth is a difference of two times, and how it is done is a diff of
two neighbours.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastkit.kernels.common import INTERPRETED, TRITON_MISSING, architecture, device_of, tl, triton

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
except ImportError:
    gluon, gl = triton, tl  # enough to define a kernel; a Gluon rung cannot be launched where this happens
    GLUON_MISSING = TRITON_MISSING or f"triton {triton.__version__} has no Gluon"
else:
    GLUON_MISSING = "Triton's interpreter cannot run Gluon" if INTERPRETED else ""
barrier = getattr(gl, "barrier", None) or getattr(gl, "thread_barrier", None)  # Triton 3.8 and 3.6


@dataclass(frozen=True)
class Rung:
    """One way to compute a ladder's operation.

    name      how it is asked for
    idea      the one idea that it adds to the rung before it, and why that pays
    launcher  writes the last of the tensors that it is given, on the current device, without asking whether it can;
              keywords override its tiling
    needs     of NVIDIA's architectures the least, such as "sm_80"; "" where any that Triton knows will do
    instead   which rungs to take where this one cannot run
    nvidia    for NVIDIA's GPUs alone
    gluon     written in Gluon, which leaves every layout to the author and has no interpreter
    refuses   why these tensors are not for this rung, in words; "" if they are
    """

    name: str
    idea: str
    launcher: Callable[..., None]
    needs: str = ""
    instead: str = ""
    nvidia: bool = False
    gluon: bool = False
    refuses: Callable[..., str] = lambda *tensors: ""

    def launch(self, *tensors: torch.Tensor, **tiling) -> None:
        """Write the last of `tensors` from the others. `tiling` overrides the rung's own choice of BLOCK_M and so on.

        Raises NotImplementedError where the device lacks what the rung needs, ValueError for tensors that it refuses.
        """
        name = f"{self.launcher.__module__.rpartition('.')[2]}: rung {self.name!r}"
        if lacking := self.lacking(tensors[0].device):
            raise NotImplementedError(f"{name} {lacking}: use {self.instead}")
        if refusal := self.refuses(*tensors):
            raise ValueError(f"{name} {refusal}")
        if tensors[-1].numel():
            with device_of(tensors[0]):
                self.launcher(*tensors, **tiling)

    def lacking(self, device: torch.device) -> str:
        """What `device` lacks for this rung, in words; "" if nothing. The interpreter lacks nothing but Gluon."""
        if self.gluon and GLUON_MISSING:
            return f"is written in Gluon, and {GLUON_MISSING}"
        if INTERPRETED or not (self.needs or self.nvidia):
            return ""
        found = architecture(device)
        if found.startswith("sm_"):
            return f"needs {self.needs} and this is {found}" if int(found[3:]) < int(self.needs[3:] or 0) else ""
        return f"needs an NVIDIA GPU and this is {found}" if self.nvidia else ""


def examples(rungs: tuple[Rung, ...], size: str, *tensors: torch.Tensor) -> dict[str, Callable[[], None]]:
    """A ladder's launches, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    return {f"{rung.name} {size}": functools.partial(rung.launch, *tensors) for rung in rungs}


def find(op: str, rungs: tuple[Rung, ...], name: str | None) -> Rung | None:
    """The rung called `name`; None for None. Raises ValueError that lists what there is for any other name."""
    found = {None: None} | {rung.name: rung for rung in rungs}
    if name not in found:
        raise ValueError(f"{op}: there is no rung {name!r}; take one of {', '.join(rung.name for rung in rungs)}")
    return found[name]


def best(rungs: tuple[Rung, ...], *tensors: torch.Tensor) -> Rung:
    """The last rung that can run on these tensors and their device."""
    return next(r for r in reversed(rungs) if not r.lacking(tensors[0].device) and not r.refuses(*tensors))
