"""Exercises of notebook 03: copy_wide, update_records."""

import torch

from fastkit.lab.exercises.exercise import Demand, Exercise, Output, Truth

LENGTHS = tuple({"N": N} for N in (1, 2, 3, 16, 31, 64, 65, 128, 257, 1000, 1024, 1025, 2048, 4096, 5001))
FIELDS = 8  # numbers of a record: 32 bytes, a sector

COPY_WIDE = Exercise(
    name="copy_wide",
    task="Copy with 16 bytes a lane, whatever the length.",
    signature="copy_wide(x, out)",
    details=(
        "x and out are float32 [N], contiguous, N any number. Where N is not divisible by 16, a mask keeps Triton from "
        "wide loads; all blocks but the last need none. Requests may move 1.1 bytes at most for each that they ask for."
    ),
    sizes=LENGTHS,
    largest={"N": 6000},
    inputs=lambda rng, s: {"x": torch.randn(s["N"], generator=rng)},
    outputs=lambda s: {"out": Output((s["N"],), torch.float32)},
    truth=lambda i: {"out": Truth(i["x"].double(), torch.zeros_like(i["x"]).double())},
    hints=(
        "A block ends at program_id * BLOCK + BLOCK. For which programs is that beyond N?",
        "A kernel may branch: if start + BLOCK <= N, load and store without a mask, else with one.",
        "Write both branches out, each with its own tl.load and tl.store: only the last program takes the masked one.",
    ),
    demands=(Demand("load", "bytes_moved_per_byte_asked", 1.1), Demand("store", "bytes_moved_per_byte_asked", 1.1)),
    example={"N": 2**14 + 1},
)


def _update_truth(i):
    weight, gradient = i["records"][:, 0].double(), i["records"][:, 1].double()
    return {"out": Truth(weight - i["lr"] * gradient, weight.abs() + i["lr"] * gradient.abs())}


UPDATE_RECORDS = Exercise(
    name="update_records",
    task="Update the weights of records, touching as few sectors as you can.",
    signature="update_records(records, lr, out)",
    details=(
        "records is float32 [N, 8], contiguous: number 0 of a record is its weight, number 1 its gradient. lr is a "
        "float, out float32 [N]. Write weight - lr * gradient into out, computed in float32."
    ),
    sizes=LENGTHS,
    largest={"N": 3000},
    inputs=lambda rng, s: {"records": torch.randn(s["N"], FIELDS, generator=rng), "lr": 0.125},
    outputs=lambda s: {"out": Output((s["N"],), torch.float32)},
    truth=_update_truth,
    hints=(
        "Weight and gradient are neighbours. How many requests does it take to fetch both, if a lane may take 8 bytes?",
        "A tile of pointers [BLOCK, 2] holds both numbers of each record: records_ptr + rows[:, None] * 8 + fields.",
        "tl.split takes the last axis apart: weight, gradient = tl.split(tile). Then store weight - lr * gradient.",
    ),
)

EXERCISES = [COPY_WIDE, UPDATE_RECORDS]
