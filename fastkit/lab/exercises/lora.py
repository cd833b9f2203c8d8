"""Exercise of notebook 15: merge_lora."""

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth

SCALING = 2.0


def _inputs(rng, s):
    A = torch.randn(s["r"], s["K"], generator=rng).half()
    B = torch.randn(s["N"], s["r"], generator=rng).half()
    w = torch.randn(s["N"], s["K"], generator=rng)
    cancels = torch.rand(w.shape, generator=rng) < 0.25  # a delta that was rounded before the sum leaves nothing here
    delta = SCALING * (B.double() @ A.double())
    return {"w": torch.where(cancels, -delta.float(), w).half(), "A": A, "B": B, "scaling": SCALING}


def _truth(i):
    w, A, B = (i[name].double() for name in ("w", "A", "B"))
    return {"out": Truth(w + i["scaling"] * (B @ A), w.abs() + i["scaling"] * (B.abs() @ A.abs()))}


MERGE_LORA = Exercise(
    name="merge_lora",
    task="Add a LoRA adapter to its weight in one pass.",
    signature="merge_lora(w, A, B, scaling, out)",
    details=(
        "w and out are float16 [N, K], their rows any stride apart; A is float16 [r, K] and B float16 [N, r], both "
        "contiguous; scaling is a number. Write w + scaling * B @ A: the product on the tensor cores (tl.dot), sum and "
        "scaling in float32, rounded once."
    ),
    sizes=tuple(
        {"N": N, "K": K, "r": r}
        for N, K, r in (
            (1, 1, 1), (1, 16, 3), (5, 3, 7), (16, 16, 16), (17, 16, 8), (16, 31, 4), (16, 16, 33), (32, 32, 16),
            (64, 1, 64), (33, 47, 20), (64, 64, 8), (50, 70, 65), (64, 96, 32),
        )
    ),
    largest={"N": 80, "K": 80, "r": 70},
    inputs=_inputs,
    outputs=lambda s: {"out": Output((s["N"], s["K"]), torch.float16)},
    truth=_truth,
    hints=(
        "Begin with matmul_tiled: a program makes a tile of B @ A, and r takes the place of k.",
        "r may be smaller than a tile, or no multiple of it: load 0 beyond r, from both A and B.",
        "At the end: w = tl.load(...).to(tl.float32) + scaling * delta, converted once, at the store.",
    ),
    strided=("w", "out"),
)  # fmt: skip

EXERCISES = [MERGE_LORA]
