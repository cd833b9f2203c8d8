"""One process at a time measures on a GPU: two that do so at once, as learners on one server, time each other."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def turn() -> Iterator[None]:
    """Hold the current GPU for measuring, among all processes of this machine that ask; says so if it has to wait.

    A process that ends, however it ends, lets go. It holds no one back who does not ask.
    """
    if fcntl is None or not torch.cuda.is_available():
        yield
        return
    with _lock_file(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process measures on this GPU: waiting for its turn to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _lock_file(gpu: str) -> Iterator[int]:
    path = Path(tempfile.gettempdir()) / f"fastkit-measures-{gpu}"
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)  # reading is enough, also of another user's file
    try:
        yield descriptor
    finally:
        os.close(descriptor)
