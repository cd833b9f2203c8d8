"""The device that this process will use: its card, its lane, the versions, the memory taken."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

import torch

from fastkit.lab.occupancy import LIMITS

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


def lane() -> str:
    """The lane: "gpu" where Triton kernels run on a card, else "cpu" (torch references, the interpreter if asked)."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def card(device: torch.device | str | None = None) -> dict:
    """A GPU's name, architecture, SMs, memory, L2 cache and the shared memory that a block may take; or the CPU's name,
    cores and memory. Of the first GPU, or of `device`.
    """
    device = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        arch = architecture(properties)
        return {
            "name": properties.name,
            "arch": arch,
            "sms": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20 or None,
            "shared_kib": LIMITS[arch].shared_kib if arch in LIMITS else None,
        }
    return {
        "name": _cpu_name(),
        "arch": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _host_memory_gib(),
    }


def architecture(properties) -> str:
    """The architecture in torch's device properties as Triton names it: "sm_89", "gfx942"."""
    amd = getattr(properties, "gcnArchName", "")
    return amd.partition(":")[0] if amd.startswith("gfx") else f"sm_{properties.major}{properties.minor}"


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide speed and arithmetic; "missing" for one not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            windows_name = "triton-windows" if package == "triton" and sys.platform == "win32" else None
            try:
                found[package] = importlib.metadata.version(windows_name or package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = "missing"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def has_triton() -> bool:
    """Whether `import triton` works here."""
    try:
        return importlib.util.find_spec("triton") is not None and bool(__import__("triton"))
    except ImportError:
        return False


def reset_peak(device: torch.device) -> None:
    """Start a new peak on a GPU; a process's peak on the CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated by torch on a GPU, resident in the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _host_memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
