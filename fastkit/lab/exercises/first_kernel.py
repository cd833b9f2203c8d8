"""Exercises of notebook 02: sum_and_difference."""

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth


def _truth(i):
    x, y = i["x"].double(), i["y"].double()
    size = x.abs() + y.abs()
    return {"total": Truth(x + y, size), "difference": Truth(x - y, size)}


SUM_AND_DIFFERENCE = Exercise(
    name="sum_and_difference",
    task="The sum and the difference of two vectors.",
    signature="sum_and_difference(x, y, total, difference)",
    details="All are float32 [N], N of any size. Write x + y into total and x - y into difference.",
    sizes=tuple({"N": N} for N in (1, 2, 3, 16, 31, 64, 65, 128, 257, 1000, 1024, 1025, 2048, 4096)),
    largest={"N": 4000},
    inputs=lambda rng, s: {name: torch.randn(s["N"], generator=rng) for name in ("x", "y")},
    outputs=lambda s: {name: Output((s["N"],), torch.float32) for name in ("total", "difference")},
    truth=_truth,
    hints=(
        "Two kernels would read x and y twice. What must a program hold so that it needs to read them only once?",
        "Load a block of x and a block of y into registers, as in vector_add. Then there are two results to store.",
        "One kernel with four pointers: two loads, two stores, the same offsets and the same mask for all.",
    ),
)

EXERCISES = [SUM_AND_DIFFERENCE]
