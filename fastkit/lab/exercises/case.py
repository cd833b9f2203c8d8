"""A case to try an answer on, and what a run of the answer on it showed."""

from dataclasses import dataclass

from fastkit.lab.exercises.finding import Finding


@dataclass(frozen=True)
class Case:
    """Sizes, and how matrices lie in memory: "" contiguous, "rows apart", "transposed"."""

    sizes: tuple[tuple[str, int], ...]
    layout: str = ""

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes)
        return f"{sizes}, {self.layout}" if self.layout else sizes


@dataclass
class Trial:
    """What a run found, None if nothing, and the programs of its largest launch."""

    finding: Finding | None
    programs: int = 0
