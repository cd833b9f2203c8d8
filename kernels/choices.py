"""Choices that were timed, kept on disk: one JSON file for each card and set of versions, {kind of input: choice}.

What ships with fastkit (`fastkit/data/choices`) is read first, then the user's own file, in the cache folder. A file of
the one sort can be copied to the other as it is. A newer torch or driver library has another file: a choice that was
right for one is not taken for the next.
"""

import functools
import json
import os
import re
import tempfile
import warnings
from pathlib import Path

import torch

from fastkit.kernels.common import TRITON_MISSING, triton

SHIPPED = Path(__file__).parent.parent / "data" / "choices"


def cache_dir() -> Path:
    """The user's cache folder for fastkit; `FASTKIT_CACHE` names another."""
    if named := os.environ.get("FASTKIT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastkit"


def folder() -> Path:
    """Where the user's files lie."""
    return cache_dir() / "choices"


def file_name(what: str, card: str) -> str:
    """Of the choices of `what` ("attention") on a card of that name, under the versions that are installed."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    versions = f"torch{torch.__version__}-triton{'none' if TRITON_MISSING else triton.__version__}-cudnn{cudnn}"
    return re.sub(r"[^\w.+-]+", "_", f"{what}-{card}-{versions}") + ".json"


def stored(name: str, kind: str) -> str | None:
    """The choice for `kind` in the file `name`, the shipped one or the user's; None if there is none."""
    shipped = _read(SHIPPED / name)
    return shipped[kind] if kind in shipped else _read(folder() / name).get(kind)


def store(name: str, kind: str, choice: str) -> None:
    """Write a choice to the user's file, in one rename, beside those that are there.

    Of two processes that write at once, the later one's file stays: what the other found is found again when it is
    wanted. A folder that cannot be written is warned of, and nothing is stored.
    """
    path, staging = folder() / name, None
    _read.cache_clear()  # another process may have written
    choices = _read(path) | {kind: choice}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".json", delete=False) as file:
            staging = file.name
            json.dump(choices, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    except OSError as error:
        if staging is not None:
            Path(staging).unlink(missing_ok=True)
        warnings.warn(
            f"what was timed is not kept for the next run: {error}; FASTKIT_CACHE names another folder", stacklevel=2
        )
    _read.cache_clear()


@functools.cache
def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
        if not (isinstance(found, dict) and all(isinstance(choice, str) for choice in found.values())):
            raise ValueError("no choices in it")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} cannot be read ({error}): what it held is timed anew", stacklevel=3)
        return {}
    return found
