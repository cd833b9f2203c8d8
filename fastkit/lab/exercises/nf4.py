"""Exercise of notebook 14: matvec_nf4."""

import torch

from fastkit.kernels.nf4 import CODE
from fastkit.lab.exercises.exercise import Exercise, Output, Truth


def _inputs(rng, s):
    N, B = s["N"], s["B"]
    return {
        "packed": torch.randint(0, 256, (N, 32 * B), generator=rng, dtype=torch.uint8),
        "absmax": torch.rand(N, B, generator=rng) + 0.5,
        "code": torch.tensor(CODE),
        "x": torch.randn(64 * B, generator=rng).half(),
    }


def _truth(i):
    indices = torch.stack([i["packed"] >> 4, i["packed"] & 15], -1).flatten(1).long()
    w = i["code"].double()[indices] * i["absmax"].double().repeat_interleave(64, 1)
    x = i["x"].double()
    return {"y": Truth(w @ x, w.abs() @ x.abs())}


MATVEC_NF4 = Exercise(
    name="matvec_nf4",
    task="Multiply a vector by a weight straight from its 4 bits.",
    signature="matvec_nf4(packed, absmax, code, x, y)",
    details=(
        "The weight has N rows of K = 64 * B numbers. packed is uint8 [N, K / 2], two indices in a byte, the first in "
        "the high half; absmax is float32 [N, B], one for each 64 neighbours of a row; code float32 [16]; x float16 "
        "[K]; y float32 [N]. A weight is code[index] * absmax, and y[n] the sum over k of weight[n, k] * x[k]. Compute "
        "in float32, and write no weight to memory."
    ),
    sizes=tuple(
        {"N": N, "B": B}
        for N, B in (
            (1, 1), (2, 1), (1, 2), (1, 3), (3, 2), (5, 4), (16, 1), (7, 5), (16, 8), (33, 4), (3, 16), (4, 33), (64, 3)
        )
    ),
    largest={"N": 20, "B": 30},
    inputs=_inputs,
    outputs=lambda s: {"y": Output((s["N"],), torch.float32)},
    truth=_truth,
    hints=(
        "One program a row: it walks along the row's bytes and keeps a sum in each lane until the row is done.",
        "A byte serves x[2 * byte] by its high half and x[2 * byte + 1] by its low one; both share absmax[byte // 32].",
        "tl.load(code_ptr + (packed >> 4)) looks a level up. Convert packed by .to(tl.int32) and x by .to(tl.float32), "
        "and let masked lanes add 0.",
    ),
)  # fmt: skip

EXERCISES = [MATVEC_NF4]
