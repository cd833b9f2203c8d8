"""Exercises of notebook 09: rms_norm_backward_dweight."""

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth
from fastkit.lab.exercises.rows import ROWS

TALL = ({"M": 300, "N": 3}, {"M": 129, "N": 64}, {"M": 1025, "N": 2})


def _inputs(rng, s):
    M, N = s["M"], s["N"]
    return {
        "dy": (torch.randn(M, N, generator=rng) + 0.5).half(),  # not around 0, so that sums grow
        "x": (torch.randn(M, N, generator=rng) + 0.5).half(),
        "rstd": torch.rand(M, generator=rng) + 0.5,
    }


def _truth(i):
    terms = i["dy"].double() * i["x"].double() * i["rstd"].double()[:, None]
    return {"dweight": Truth(terms.sum(0), terms.abs().sum(0))}


RMS_NORM_BACKWARD_DWEIGHT = Exercise(
    name="rms_norm_backward_dweight",
    task="The gradient of RMSNorm with respect to its weight, a sum across rows.",
    signature="rms_norm_backward_dweight(dy, x, rstd, dweight)",
    details=(
        "dy and x are float16 [M, N], contiguous, rstd float32 [M], dweight float32 [N]. dweight is the sum over all "
        "rows of dy * x * rstd. Compute in float32. Its result must not depend on the order in which programs come."
    ),
    sizes=(*ROWS, *TALL),
    largest={"M": 300, "N": 40},
    inputs=_inputs,
    outputs=lambda s: {"dweight": Output((s["N"],), torch.float32)},
    truth=_truth,
    hints=(
        "Programs do not talk: let each own some columns, and walk down all rows with them.",
        "Neighbouring lanes take neighbouring columns. Load [BLOCK_M, BLOCK_N] at a time, and tl.sum over axis=0.",
        "Rows beyond M must add 0: mask dy, x and rstd by rows < M, with other=0.0.",
    ),
)

EXERCISES = [RMS_NORM_BACKWARD_DWEIGHT]
