"""The kernel exercise of notebook 01: axpy, at the ceiling of memory."""

import torch

from fastkit.lab.exercises.exercise import Demand, Exercise, Output, Truth

AXPY = Exercise(
    name="axpy",
    task="Compute z = a * x + y, and move no byte that you need not.",
    signature="axpy(a, x, y, z)",
    details=(
        "x, y and z are float32 [N], a is a number. Write a * x + y into z, with one read of x, one of y and one write "
        "of z: no byte may move that was not asked for."
    ),
    sizes=tuple({"N": N} for N in (1, 2, 3, 16, 31, 64, 65, 128, 257, 1000, 1024, 1025, 2048, 4096)),
    largest={"N": 4000},
    inputs=lambda rng, s: {"a": 1.5, **{name: torch.randn(s["N"], generator=rng) for name in ("x", "y")}},
    outputs=lambda s: {"z": Output((s["N"],), torch.float32)},
    truth=lambda i: {
        "z": Truth(i["a"] * i["x"].double() + i["y"].double(), i["a"] * i["x"].double().abs() + i["y"].double().abs())
    },
    hints=(
        "The operation is free next to its bytes, so there should be one kernel that does all of it.",
        "Each program takes a block of neighbouring numbers, tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).",
        "Load x and y under mask=cols < N, store a * x + y under the same mask, and launch triton.cdiv(N, BLOCK).",
    ),
    demands=(Demand("load", "bytes_moved_per_byte_asked", 1.0), Demand("store", "bytes_moved_per_byte_asked", 1.0)),
    example={"N": 4096},
)

EXERCISES = [AXPY]
