"""Exercises of notebook 05: logsumexp_rows."""

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth
from fastkit.lab.exercises.rows import ROWS


def _inputs(rng, s):
    offsets = (torch.rand(s["M"], 1, generator=rng) - 0.5) * 2000  # far past exp's range in float32
    offsets[0] = -300  # of a row below zero, a zero would be the maximum
    x = torch.randn(s["M"], s["N"], generator=rng) * 5 + offsets
    return {"x": x.sort(1).values if s["N"] % 2 else x}  # the largest last: what came before must be scaled


def _truth(i):
    x = i["x"].double()
    return {"out": Truth(x.logsumexp(1), x.abs().amax(1) + 10)}


LOGSUMEXP_ROWS = Exercise(
    name="logsumexp_rows",
    task="The logarithm of the sum of exponentials of each row, in one pass.",
    signature="logsumexp_rows(x, out)",
    details=(
        "x is float32 [M, N], out float32 [M]; rows of x may lie any stride apart and be of any length. Read each "
        "number once, a block of a row at a time. x may hold numbers such as 1000."
    ),
    sizes=(*ROWS, {"M": 2, "N": 3000}),
    largest={"M": 6, "N": 3000},
    inputs=_inputs,
    outputs=lambda s: {"out": Output((s["M"],), torch.float32)},
    truth=_truth,
    hints=(
        "Carry two numbers along the row: the largest so far, and the sum of exp(x - largest so far).",
        "When a block brings a larger maximum, the sum was taken against the old one: scale it by exp(old - new).",
        "After the last block the answer is largest + log(sum). Lanes beyond the row load -inf: exp(-inf) adds 0.",
    ),
    strided=("x",),
)

EXERCISES = [LOGSUMEXP_ROWS]
