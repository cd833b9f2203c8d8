"""Install what a notebook's Python lacks, without replacing what it has: for Colab, Kaggle and their like.

Imported from a clone before anything is installed, so this file needs Python alone.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from fastkit.errors import FastkitError

TORCH = {"torch", "torchvision", "torchaudio", "triton", "triton-windows", "numpy"}


def install(project: Path) -> None:
    """pip install those requirements of the project in the folder `project` that are missing here.

    torch, Triton, NumPy and all that this process has imported keep their versions, whatever is asked for, so that
    nothing has to be restarted. Raises FastkitError with pip's last word where it cannot.
    """
    wanted = tomllib.loads((Path(project) / "pyproject.toml").read_text())["project"]["dependencies"]
    here = _versions()
    kept = {name for name in TORCH | _imported() if name in here}
    wanted = [requirement for requirement in wanted if _name(requirement) not in kept]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "kept.txt"
        constraints.write_text("".join(f"{name}=={here[name]}\n" for name in sorted(kept)))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*command, "-c", constraints, *wanted], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "pip said nothing").splitlines()
        raise FastkitError(f"pip could not install what fastkit needs: {said[-1]}")


def _name(requirement: str) -> str:
    return _plain(re.match(r"[\w.-]+", requirement)[0])


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _versions() -> dict[str, str]:
    """The installed distributions. Of two of one name the first is the one that Python imports."""
    found = {}
    for distribution in importlib.metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(_plain(name), distribution.version)
    return found


def _imported() -> set[str]:
    """The distributions that this process has imported something of."""
    modules = {name.partition(".")[0] for name in sys.modules}
    owners = importlib.metadata.packages_distributions()
    return {_plain(owner) for module in modules for owner in owners.get(module, ())}
