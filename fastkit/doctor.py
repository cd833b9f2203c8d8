"""What this machine can do with fastkit, what is missing, and the command that mends it."""

import importlib.metadata
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch

from fastkit import __version__
from fastkit.lab.device import card, has_triton, lane, versions
from fastkit.models import smollm2

LANES = {
    "gpu": "everything for real: Triton kernels on the card, 4-bit training in {dtype}",
    "cpu": "kernels run as their torch references (in Triton's interpreter where a notebook says so), models train for "
    "real in fp32, and numbers that need a GPU are shown as recorded",
}
NO_CARD = "or none: the cpu lane needs nothing"
MIN_DISK_GB = 2.0


def report() -> dict:
    """Card, versions, lane and checks; each check is {"name", "ok", "says", "mend"}, mend None where all is well."""
    dtype = None
    if torch.cuda.is_available():
        dtype = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return {
        "fastkit": __version__,
        "lane": lane(),
        "lane_means": LANES[lane()].format(dtype=dtype),
        "card": card() | ({"driver": _driver()} if dtype else {}),
        "versions": versions(),
        "checks": [check for check in _checks() if check],
    }


def show(found: dict, as_json: bool = False) -> None:
    """Print a report."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(f"fastkit {found['fastkit']}")
    print("card      " + ", ".join(f"{key} {value}" for key, value in found["card"].items()))
    print("versions  " + ", ".join(f"{key} {value}" for key, value in found["versions"].items()))
    print(f"lane      {found['lane']}: {found['lane_means']}")
    for check in found["checks"]:
        print(f"{'ok      ' if check['ok'] else 'MISSING '}  {check['name']}: {check['says']}")
        if check["mend"]:
            print(f"            mend: {check['mend']}")


def _check(name: str, ok: bool, says: str, mend: str | None = None) -> dict:
    return {"name": name, "ok": ok, "says": says, "mend": None if ok else mend}


def _checks():
    yield _gpu()
    yield _triton()
    yield _bitsandbytes()
    yield _numpy()
    cached = (smollm2.cache_dir() / smollm2.NAME / "config.json").is_file()
    says = f"in {_short(smollm2.cache_dir())}" if cached else "downloads 93 MB at first use"
    yield _check("smollm2", True, says)
    where = next(p for p in (smollm2.cache_dir(), *smollm2.cache_dir().parents) if p.exists())
    free = shutil.disk_usage(where).free / 1e9
    yield _check(
        "disk",
        free > MIN_DISK_GB,
        f"{free:.1f} GB free in {_short(where)}",
        f"free {MIN_DISK_GB:.0f} GB, or set FASTKIT_CACHE to a folder on another disk",
    )
    missing = [p for p in ("jupyterlab", "papermill", "ipywidgets") if importlib.util.find_spec(p) is None]
    yield _check(
        "notebooks",
        not missing,
        "ready" if not missing else "lacks " + ", ".join(missing),
        "pip install fastkit[notebooks]",
    )


def _gpu() -> dict:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < (8, 0):
            return _check(
                "gpu", True, f"sm_{major}{minor} has no bf16 and no Triton tensor cores: fp16, matmuls by cuBLAS"
            )
        return _check("gpu", True, f"{torch.cuda.device_count()} visible to torch")
    if torch.version.cuda is None:
        return _check(
            "gpu",
            False,
            f"torch {torch.__version__} is a build without CUDA",
            f"pip install --force-reinstall torch, {NO_CARD}",
        )
    return _check(
        "gpu",
        False,
        "torch has CUDA, but no card or driver answers",
        f"install NVIDIA's driver (nvidia-smi must work), {NO_CARD}",
    )


def _triton() -> dict:
    if has_triton():
        return _check("triton", True, "imports")
    if sys.platform == "darwin":
        return _check(
            "triton", False, "has no macOS build: kernels run as their torch references", "use Linux or Colab"
        )
    name = "triton-windows" if sys.platform == "win32" else "triton"
    return _check("triton", False, "does not import: kernels run as their torch references", f"pip install {name}")


def _bitsandbytes() -> dict:
    try:
        from fastkit.models.bnb import bnb

        return _check("bitsandbytes", True, f"{bnb.__version__} imports")
    except Exception as error:  # a broken native library raises what it likes
        return _check("bitsandbytes", False, f"does not import ({error})", "pip install --force-reinstall bitsandbytes")


def _numpy() -> dict | None:
    if not has_triton() or torch.cuda.is_available():  # the interpreter is for machines without a GPU
        return None
    import numpy
    import triton

    too_new = _version(triton.__version__) < (3, 7) and _version(numpy.__version__) >= (2, 4)
    return _check(
        "interpreter",
        not too_new,
        f"triton {triton.__version__} with numpy {numpy.__version__}",
        "pip install 'numpy<2.4' (triton 3.6's interpreter needs it)",
    )


def _short(path: Path) -> str:
    """`path` with the user's home as ~."""
    return str("~" / path.relative_to(Path.home())) if path.is_relative_to(Path.home()) else str(path)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # not every machine with a GPU lets NVML in
        return "unknown"
