"""Which kernels Triton compiles: for a warm-up to report, and for a test to say that there was none.

with compilations() as found:
    train_step()
assert not found.compiled
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastkit.lab.device import has_triton


@dataclass(frozen=True)
class Compilation:
    """One kernel, compiled for one set of constants and specialisations."""

    kernel: str
    seconds: float


@dataclass
class Compilations:
    """compiled: by the compiler, each a stall. cached: names of kernels that were read from Triton's cache on disk.

    A kernel that this process holds already is in neither.
    """

    compiled: list[Compilation] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)


@contextmanager
def compilations() -> Iterator[Compilations]:
    """Yield what Triton compiles and reads within, in this process, growing as it goes; whoever listened before still
    does. Without Triton, and in its interpreter, nothing is compiled."""
    found = Compilations()
    if not has_triton():
        yield found
        return
    import triton

    before = triton.knobs.compilation.listener

    def listen(*, src, metadata, metadata_group, times, cache_hit):
        if cache_hit:
            found.cached.append(metadata["name"])
        else:
            found.compiled.append(Compilation(metadata["name"], times.total / 1e6))  # microseconds
        if before is not None:
            before(src=src, metadata=metadata, metadata_group=metadata_group, times=times, cache_hit=cache_hit)

    triton.knobs.compilation.listener = listen
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = before
