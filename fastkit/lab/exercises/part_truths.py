"""What the parts of the capstone's step should give: each exchanged part against float64, at odd sizes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from fastkit.errors import FastkitError
from fastkit.kernels.common import INTERPRETED
from fastkit.lab.accounts import account_of
from fastkit.lab.capstone import EPS, MOST, Parts
from fastkit.lab.exercises.exercise import Truth
from fastkit.lab.gluon_interpreter import gluon_on_cpu
from fastkit.lab.step_faults import ARCH, Fault
from fastkit.lab.tracer import trace

SIZES = ((3, 33, 20), (70, 200, 72), (2, 1500, 40))  # M, K, I


def wrong_numbers(parts: Parts, names: list[str]) -> Fault | None:
    """What is wrong with the first of the parts `names` that does not give its truth; None if all do.

    Raises FastkitError where kernels can neither run nor be interpreted.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not INTERPRETED:
        raise FastkitError(
            "kernels need a GPU or Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
        )
    for name in names:
        for sizes in SIZES:
            for arguments, truth in _cases(name, *sizes, device):
                _reach_inside(getattr(parts, name), arguments)
                if fault := _wrong(name, getattr(parts, name), arguments, truth, sizes):
                    return fault
    return None


@contextmanager
def _poisoned():
    """torch.empty gives nan, so that what a part leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _cases(name: str, M: int, K: int, I: int, device: str) -> Iterator[tuple[list, Truth]]:
    """(arguments, the truth of what the part returns, or of its first argument)."""
    generator = torch.Generator(device)
    generator.seed()
    draw = partial(torch.randn, dtype=torch.float16, device=device, generator=generator)
    if name == "norm":
        x, weight = 3 * draw(M, K), draw(K)
        value = x.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + EPS) * weight.double()
        yield [x, weight], Truth(value, value.abs())
    elif name == "multiply":
        for a in (draw(M, K), draw(K, M).T):
            b = draw(K, I)
            yield [a, b], Truth(a.double() @ b.double(), a.double().abs() @ b.double().abs())
    elif name == "gate":
        hidden = 4 * draw(M, 2 * I)
        gate, up = hidden.double().chunk(2, dim=1)
        value = gate * torch.sigmoid(gate) * up
        yield [hidden], Truth(value, value.abs() * (2 + gate.abs()))
    elif name == "combine":
        for factor in (1.0, -1.0, 0.3):
            x, y = draw(M, K), draw(M, K)
            yield [x, y, factor], Truth(x.double() + factor * y.double(), x.double().abs() + y.double().abs())
    elif name == "turn":
        x = draw(M, I)
        yield [x], Truth(x.double().T, torch.zeros(I, M, dtype=torch.float64, device=device))
    elif name == "clip":
        for size in (1.0, 1e-3 / (I * K) ** 0.5, 0.0):
            dw = draw(I, K) * size
            value = dw.double() * min(1.0, MOST / max(dw.double().norm().item(), 1e-30))
            yield [dw], Truth(value, 2**10 * value.abs())  # a factor in float16 may round once more
    else:
        w, dw = draw(I, K), draw(I, K)
        yield [w, dw, 0.3], Truth(w.double() - 0.3 * dw.double(), w.double().abs() + dw.double().abs())


def _reach_inside(part, arguments: list) -> None:
    """Raises FastkitError, as the tracer does, where one of the part's kernels reaches outside of a tensor."""
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    for launch in account_of(lambda: part(*copies)).launches:
        trace(launch.kernel, launch.grid, launch.arguments, arch=ARCH, programs=None, **launch.options)


def _wrong(name: str, part, arguments: list, truth: Truth, sizes: tuple[int, int, int]) -> Fault | None:
    where = f"{name}, with " + ", ".join(f"{label}={size}" for label, size in zip("MKI", sizes, strict=True))
    with _poisoned(), nullcontext() if arguments[0].is_cuda else gluon_on_cpu():
        result = part(*arguments)
    result = arguments[0] if name == "update" else result
    if not isinstance(result, torch.Tensor) or result.shape != truth.value.shape:
        got = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        return Fault("values", f"{where}: gives {got}, where {list(truth.value.shape)} is wanted")
    if result.dtype != torch.float16:
        return Fault("dtype", f"{where}: gives {result.dtype}, where float16 is wanted")
    error = (result.double() - truth.value).abs()
    wrong = ~(error <= truth.allowed(torch.float16))
    if not wrong.any():
        return None
    first = tuple(wrong.nonzero()[0].tolist())
    message = f"{where}: {int(wrong.sum())} of {wrong.numel()} numbers are wrong"
    return Fault("values", message, (f"{list(first)} is {result[first]:.6g} and should be {truth.value[first]:.6g}",))
