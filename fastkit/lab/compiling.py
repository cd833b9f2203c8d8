"""Compile a launch for any GPU, present or not, and report what its machine code uses.

In a helper process Triton's driver is replaced by one that only names the target, so that the launch itself, with its
tiling and specialisation (types, sizes of 1, divisibility by 16), decides what is compiled.
"""

import re
from collections import Counter
from dataclasses import dataclass

from fastkit.errors import FastkitError
from fastkit.lab.ir_sites import GlobalSite, SharedSite, sites
from fastkit.lab.launches import Launch, Parcel, modified
from fastkit.lab.machine_code import (
    Instruction,
    amd_instructions,
    amd_resources,
    nvidia_resources,
    ptx_instructions,
)
from fastkit.lab.worker import COMPILER, told

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one architecture.

    registers      of a thread (vector registers on AMD)
    spilled_bytes  of a thread, kept in memory for want of registers
    shared_bytes   of a program
    instructions   how often each memory, matrix, shuffle and barrier instruction stands in the code, with the bits that
                   a lane moves: "ld.global.128", "HMMA", "shfl"; not how often it runs
    """

    kernel: str
    arch: str
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: Counter
    global_sites: tuple[GlobalSite, ...]
    shared_sites: tuple[SharedSite, ...]
    memory_instructions: tuple[Instruction, ...]
    ttgir: str
    code: str  # PTX, or AMD assembly


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile `launch` for `arch`. Raises FastkitError for an unknown architecture or what the compiler refuses."""
    if not re.fullmatch(r"sm_\d{2,3}|gfx[0-9a-f]{3,4}", arch):
        raise FastkitError(f"no architecture {arch!r}: use one such as {', '.join(ARCHITECTURES)}")
    return compile_elsewhere(Parcel.of(launch), arch, modified(launch))


def compile_elsewhere(parcel: Parcel, arch: str, newer_than: float) -> Compiled:
    """`compile_launch` of a launch that is packed already."""
    return COMPILER.ask("compiling:compile_parcel", parcel, arch, newer_than=newer_than)


def compile_parcel(parcel: Parcel, arch: str) -> Compiled:
    """The helper's part of `compile_launch`."""
    target = take_for(arch)
    kernel, arguments, _ = parcel.unpack()
    try:
        compiled = kernel.run(*arguments.values(), grid=parcel.grid, warmup=True, **parcel.options)
    except Exception as error:
        raise FastkitError(f"{kernel.fn.__name__} cannot be compiled for {arch}: {told(error)}") from error
    ttgir = compiled.asm["ttgir"]
    if target.backend == "hip":
        code, instructions = compiled.asm["amdgcn"], ()
        counts = amd_instructions(code)
        registers, spilled = amd_resources(code)
    else:
        code = compiled.asm["ptx"]
        counts, instructions = ptx_instructions(code)
        registers, spilled = nvidia_resources(compiled.asm["cubin"])
    global_sites, shared_sites = sites(ttgir, target) if target.backend == "cuda" else ((), ())
    return Compiled(
        kernel=compiled.metadata.name,
        arch=arch,
        num_warps=compiled.metadata.num_warps,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        instructions=counts,
        global_sites=tuple(global_sites),
        shared_sites=tuple(shared_sites),
        memory_instructions=tuple(instructions),
        ttgir=ttgir,
        code=code,
    )


def take_for(arch: str):
    """Make Triton take this process for one with a GPU of `arch`; returns the GPUTarget. For helper processes alone."""
    import triton
    from triton.backends.compiler import GPUTarget

    wave = 64 if arch.startswith("gfx9") else 32
    target = GPUTarget("hip", arch, wave) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    triton.runtime.driver.set_active(_NoDevice(target))
    return target


class _NoDevice:
    """What a launch asks of its driver before it has compiled; the device is a key of the kernel's cache."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)

    def get_current_stream(self, device):
        return 0
