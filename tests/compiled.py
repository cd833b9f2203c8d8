"""What is wrong with the code that launches compile to: for tests of kernels' structure, on any machine."""

import pytest
import torch

from fastkit.lab.compiling import Compiled, compile_launch
from fastkit.lab.gluon_interpreter import with_constexprs
from fastkit.lab.launches import catch
from fastkit.lab.portability import misfit


def compile_all(function, arch: str) -> list[Compiled]:
    """The launches that `function` makes, none of which runs, compiled for `arch`."""
    return [compile_launch(launch, arch) for launch in catch(function)]


def faults(compiled: Compiled, narrow: int = 0) -> list[str]:
    """What `compiled` should not have, in words: anything spilled, more than the card has, no 128-bit loads, or more
    than `narrow` instructions that move less than 128 bits a lane between global memory and registers."""
    bits = {"load": [], "store": []}
    for name, count in compiled.instructions.items():
        kind, _, width = name.rpartition(".")
        if kind in ("ld.global", "cp.async", "st.global"):
            bits["store" if kind == "st.global" else "load"] += [int(width)] * count
    narrower = [width for width in bits["load"] + bits["store"] if width < 128]
    found = {
        misfit(compiled): True,
        f"spills {compiled.spilled_bytes} bytes": compiled.spilled_bytes > 0,
        f"{len(narrower)} accesses narrower than 128 bits": len(narrower) > narrow,
        "no 128-bit load": 128 not in bits["load"],
        "no 128-bit store": 128 not in bits["store"],
    }
    return [f"{compiled.kernel} on {compiled.arch}: {what}" for what, is_so in found.items() if what and is_so]


def pretended(monkeypatch, gluon, *others):
    """A function after which kernel files act as if there were a GPU of the architecture that it is called with, and
    SMs: `gluon`, which is in Gluon, and `others`, which hand work to it."""

    def pretend(arch, sms=132):
        monkeypatch.setattr(gluon, "GLUON_MISSING", "")
        for kernels in (gluon, *others):
            monkeypatch.setattr(kernels, "architecture", lambda device: arch)
            if hasattr(kernels, "sm_count"):
                monkeypatch.setattr(kernels, "sm_count", lambda device: sms)

    return pretend


def needs_hopper():
    """Skip a GPU's test on another card than sm_90's."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")


def interpret(monkeypatch, kernels):
    """Have the Gluon functions in the namespace of `kernels`, a module, be run by Triton's interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    for name, value in list(vars(kernels).items()):
        if type(value).__name__ == "GluonJITFunction":
            monkeypatch.setattr(kernels, name, with_constexprs(InterpretedFunction(value.fn)))
