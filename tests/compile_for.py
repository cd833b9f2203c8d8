"""Compile what a launch would launch, for cards that are not there, and report what the machine code uses.

Triton asks its driver for the target when a kernel is launched. In a subprocess of its own, without the interpreter, a
stand-in driver names the target and launches stop after compilation. So the kernel is compiled with the very tiling and
specialisation (types, divisibility by 16) of a real launch, by the library's own code.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SHARED_KIB = {"sm_75": 64, "sm_80": 163, "sm_89": 99, "sm_90": 227, "gfx942": 64}  # what one program may use


@dataclass
class Report:
    """One kernel compiled for one target. `loads` counts the loads from global memory by their bits a thread."""

    launch: str
    target: str
    kernel: str = ""
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    loads: dict[int, int] | None = None
    error: str = ""  # why the target could not be compiled for

    def problems(self, narrow_loads: int) -> list[str]:
        """What is wrong, in words: spills, too much shared memory, more than `narrow_loads` of under 128 bits."""
        narrow = sum(count for bits, count in self.loads.items() if bits < 128)
        found = {
            f"{self.spilled_bytes} bytes spilled": self.spilled_bytes > 0,
            f"{self.shared_bytes} bytes of shared memory": self.shared_bytes > SHARED_KIB[self.target] * 1024,
            f"{narrow} loads narrower than 128 bits": narrow > narrow_loads,
            "no 128-bit load": not self.loads.get(128),
        }
        return [f"{self.launch}, {self.kernel} on {self.target}: {what}" for what, is_so in found.items() if is_so]


def compile_for(launches: dict[str, dict[str, str]]) -> list[Report]:
    """Compile `launches`: for each target, named pieces of Python code that launch kernels on CPU tensors."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), env.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, __file__], input=json.dumps(launches), env=env, capture_output=True, text=True
    )
    if child.returncode:
        raise RuntimeError(f"compile_for failed:\n{child.stderr}")
    reports = [Report(**fields) for fields in json.loads(child.stdout.splitlines()[-1])]
    for report in reports:  # JSON made strings of the keys
        report.loads = {int(bits): count for bits, count in (report.loads or {}).items()}
    return reports


def _inspect_cuda(compiled) -> dict:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [cuobjdump, "--dump-resource-usage", file.name]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads = re.findall(r"ld\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[bsuf](\d+) ", compiled.asm["ptx"])
    return {
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "loads": Counter(int(vector or 1) * int(bits) for vector, bits in loads),
    }


def _inspect_hip(compiled) -> dict:
    code = compiled.asm["amdgcn"]
    used = {key: int(value) for key, value in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s*(\d+)", code)}
    bits = {"ubyte": 8, "ushort": 16, "short_d16": 16, "short_d16_hi": 16, "dword": 32, "dwordx2": 64, "dwordx4": 128}
    return {
        "registers": used["vgpr_count"],
        "spilled_bytes": used["private_segment_fixed_size"],
        "loads": Counter(bits[width] for width in re.findall(r"(?:global|buffer)_load_(\w+)", code)),
    }


def _child(launches: dict[str, dict[str, str]]) -> list[Report]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import KernelInterface

    class NoDevice:
        """What a launch asks of its driver before it has compiled; the device is a key of the kernel's cache."""

        def __init__(self, target):
            hip = target.startswith("gfx")
            self.target = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target[3:]), 32)

        def get_current_target(self):
            return self.target

        def get_current_device(self):
            return str(self.target)

        def get_current_stream(self, device):
            return 0

    compiled = []
    KernelInterface.__getitem__ = lambda kernel, grid: (
        lambda *args, **kwargs: compiled.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))
    )
    reports = []
    for target, codes in launches.items():
        triton.runtime.driver.set_active(NoDevice(target))
        for name, code in codes.items():
            compiled.clear()
            try:
                exec(code, {})
            except Exception as error:
                reports.append(Report(name, target, error=f"{type(error).__name__}: {error}"))
                continue
            for kernel in compiled:
                inspect = _inspect_hip if target.startswith("gfx") else _inspect_cuda
                shared = kernel.metadata.shared
                reports.append(Report(name, target, kernel.metadata.name, shared_bytes=shared, **inspect(kernel)))
    return reports


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = _child(json.load(sys.stdin))
    print(json.dumps([vars(report) for report in answer]))
