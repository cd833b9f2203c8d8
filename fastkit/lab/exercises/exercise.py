"""What an exercise is: a task, how its inputs are drawn, its truth, what else is demanded of an answer, its hints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ANSWER = "<answer>"  # the file name under which an answer's source is known where it runs
SOLUTIONS = Path(__file__).parent / "solutions"
SLACK = 8 * torch.finfo(torch.float32).eps  # another order of additions, a GPU's approximations of exp and rsqrt

Sizes = dict[str, int]


@dataclass(frozen=True)
class Output:
    """An output that the answer has to fill."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Truth:
    """An output's true value in float64, and the size of the terms that make it up: its error may grow with those."""

    value: torch.Tensor
    scale: torch.Tensor

    def allowed(self, dtype: torch.dtype) -> torch.Tensor:
        """The error that each number may have in `dtype`: SLACK of its terms, and one rounding at the end."""
        if dtype == torch.float32:
            return SLACK * self.scale
        limits = torch.finfo(dtype)
        rounding = limits.eps / 2 * self.value.abs().clamp(min=limits.smallest_normal)
        return SLACK * self.scale + rounding


@dataclass(frozen=True)
class Demand:
    """A property of the compiled kernel, as the tracer predicts it for sm_80.

    measure   "bytes_moved_per_byte_asked", "sectors_per_request" or "conflicts" of the accesses of `kind`
    """

    kind: str  # "load" or "store"
    measure: str
    at_most: float

    def __str__(self) -> str:
        return f"{self.measure.replace('_', ' ')} of every {self.kind}: at most {self.at_most:g}"


@dataclass(frozen=True)
class Exercise:
    """One exercise. Its answer is a function of the inputs, then the outputs, in the order of `signature`.

    sizes     the sizes to try, the smallest first: with 1, odd ones, powers of two; a last few are drawn anew each time
    inputs    (generator, sizes) -> the inputs by name: CPU tensors and numbers
    outputs   sizes -> the outputs by name
    truth     inputs -> the outputs' Truth by name
    strided   the inputs and outputs whose rows lie apart in half of the cases; "name.T" also lies transposed
    example   the sizes at which demands are traced
    """

    name: str
    task: str
    signature: str
    details: str
    sizes: tuple[Sizes, ...]
    inputs: Callable[[torch.Generator, Sizes], dict]
    outputs: Callable[[Sizes], dict[str, Output]]
    truth: Callable[[dict], dict[str, Truth]]
    hints: tuple[str, ...]
    largest: Sizes
    strided: tuple[str, ...] = ()
    demands: tuple[Demand, ...] = ()
    example: Sizes | None = None

    @property
    def solution(self) -> str:
        """The solution's source."""
        return (SOLUTIONS / f"{self.name}.py").read_text()
