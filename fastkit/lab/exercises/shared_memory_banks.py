"""Exercises of notebook 04: transpose_coalesced."""

import torch

from fastkit.lab.exercises.exercise import Demand, Exercise, Output, Truth
from fastkit.lab.exercises.moving import MATRICES

TRANSPOSE_COALESCED = Exercise(
    name="transpose_coalesced",
    task="Transpose so that both sides are coalesced.",
    signature="transpose_coalesced(x, out)",
    details=(
        "x is float32 [M, N], out [N, M]; rows of both may lie any stride apart. Requests may move 1.1 bytes at most "
        "for each that they ask for, loads and stores."
    ),
    sizes=MATRICES,
    largest={"M": 90, "N": 90},
    inputs=lambda rng, s: {"x": torch.randn(s["M"], s["N"], generator=rng)},
    outputs=lambda s: {"out": Output((s["N"], s["M"]), torch.float32)},
    truth=lambda i: {"out": Truth(i["x"].double().T.contiguous(), torch.zeros_like(i["x"].T).double())},
    hints=(
        "A program that reads a row must write a column. What must it hold, to read rows and write rows?",
        "Let a program take a tile of x, 32 by 32, say: each of its rows is a whole line of memory, on both sides.",
        "Load with rows[:, None] * stride_xm + cols[None, :]; store tl.trans(x) at cols[:, None] and rows[None, :].",
    ),
    strided=("x", "out"),
    demands=(Demand("load", "bytes_moved_per_byte_asked", 1.1), Demand("store", "bytes_moved_per_byte_asked", 1.1)),
    example={"M": 256, "N": 256},
)

EXERCISES = [TRANSPOSE_COALESCED]
