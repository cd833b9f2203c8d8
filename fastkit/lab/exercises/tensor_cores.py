"""Exercise of notebook 07: matmul_int8."""

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth


def _inputs(rng, s):
    return {
        "x": torch.randn(s["M"], s["K"], generator=rng).half(),
        "w": torch.randint(-127, 128, (s["K"], s["N"]), generator=rng, dtype=torch.int8),
        "scale": torch.rand(s["N"], generator=rng) / 64 + 2**-10,
    }


def _truth(i):
    x, w, scale = (i[name].double() for name in ("x", "w", "scale"))
    return {"y": Truth(x @ w * scale, x.abs() @ w.abs() * scale)}


MATMUL_INT8 = Exercise(
    name="matmul_int8",
    task="Multiply by weights that are kept in 8 bits, on the tensor cores.",
    signature="matmul_int8(x, w, scale, y)",
    details=(
        "x is float16 [M, K], w int8 [K, N], scale float32 [N], y float32 [M, N], all contiguous. Write "
        "x @ (w * scale), each column of w having its own scale. A weight is exact in float16; a weight times its "
        "scale is not. Sum in float32."
    ),
    sizes=tuple(
        {"M": M, "N": N, "K": K}
        for M, N, K in (
            (1, 1, 1), (1, 16, 3), (5, 3, 7), (16, 16, 16), (17, 16, 16), (16, 31, 16), (16, 16, 33), (32, 32, 32),
            (64, 1, 100), (33, 47, 65), (64, 64, 64), (50, 70, 129), (64, 64, 128),
        )
    ),
    largest={"M": 80, "N": 80, "K": 150},
    inputs=_inputs,
    outputs=lambda s: {"y": Output((s["M"], s["N"]), torch.float32)},
    truth=_truth,
    hints=(
        "Begin with matmul_tiled. Both tiles of tl.dot must have one dtype, and int8 is not the one that x has.",
        "w.to(tl.float16) after the load is exact: float16 holds every whole number up to 2048.",
        "A column's scale is the same for all k: multiply the sums by it, once, after the loop, in float32.",
    ),
)  # fmt: skip

EXERCISES = [MATMUL_INT8]
