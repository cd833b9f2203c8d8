"""Hold a result against its truth."""

import torch

from fastkit.lab.exercises.exercise import Truth
from fastkit.lab.exercises.finding import Finding

TOO_MUCH = 0.02  # an error of this part of the terms is a wrong result, a smaller one lost digits


def wrong_values(name: str, result: torch.Tensor, truth: Truth) -> Finding | None:
    """What is wrong with the numbers of `result`, called `name`: wrong values, or digits lost; None if nothing."""
    allowed = truth.allowed(result.dtype)
    result = result.detach().cpu().double()
    error = (result - truth.value).abs()
    wrong = ~(error <= allowed)  # nan is wrong
    if not wrong.any():
        return None
    place = int(wrong.flatten().nonzero()[0])
    at = index(name, wrong.shape, place)
    got, expected = (float(tensor.flatten()[place]) for tensor in (result, truth.value))
    lines = [
        f"{at} is {got:.9g}; expected {expected:.9g}, with an error of up to {float(allowed.flatten()[place]):.2g}",
        f"{int(wrong.sum())} of {wrong.numel()} numbers are wrong",
    ]
    if result.isfinite().all() and (error <= TOO_MUCH * truth.scale)[wrong].all():
        message = f"{name} is right only in its first digits: something was rounded or summed too coarsely"
        return Finding("precision", message, lines)
    finite = bool(result[wrong].isfinite().all())
    kind = "" if finite else ", some not finite"
    return Finding("values", f"{name} has wrong values{kind}", lines, finite=finite)


def index(name: str, shape, place: int) -> str:
    """The name of the number at `place`, in row order, of a tensor of `shape`: out[0, 3]."""
    found = []
    for size in reversed(shape):
        place, rest = divmod(place, size)
        found.insert(0, str(rest))
    return f"{name}[{', '.join(found)}]"
