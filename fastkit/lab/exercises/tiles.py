"""Exercises on blocks of numbers: swiglu_forward, matmul_tiled."""

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth

SHAPES = ((1, 1), (1, 2), (2, 3), (3, 16), (7, 5), (4, 64), (3, 100), (16, 33), (2, 512), (2, 1024), (3, 1025))


def _swiglu_inputs(rng, s):
    gate = torch.randn(s["M"], s["N"], generator=rng) * 4
    far = torch.rand(gate.shape, generator=rng)
    gate = torch.where(far < 0.02, -20000.0, torch.where(far > 0.98, 20000.0, gate))
    return {"gate": gate.half(), "up": torch.randn(gate.shape, generator=rng).clamp(-3, 3).half()}


def _swiglu_truth(i):
    gate, up = i["gate"].double(), i["up"].double()
    value = gate * torch.sigmoid(gate) * up
    return {"out": Truth(value, value.abs() * (2 + gate.abs().clamp(max=20)))}  # exp's error grows with its argument


SWIGLU_FORWARD = Exercise(
    name="swiglu_forward",
    task="silu(gate) * up in one pass over memory.",
    signature="swiglu_forward(gate, up, out)",
    details=(
        "gate, up and out are float16 [M, N], contiguous; gate may hold numbers such as -20000. Write "
        "gate * sigmoid(gate) * up, computed in float32 and rounded once."
    ),
    sizes=tuple({"M": M, "N": N} for M, N in SHAPES),
    largest={"M": 12, "N": 300},
    inputs=_swiglu_inputs,
    outputs=lambda s: {"out": Output((s["M"], s["N"]), torch.float16)},
    truth=_swiglu_truth,
    hints=(
        "Every number stands alone, so rows do not matter: treat the matrices as M * N numbers in a line.",
        "Convert gate and up by .to(tl.float32) right after the load; tl.sigmoid needs it.",
        "Multiply in float32 and convert once, at the store: .to(out_ptr.dtype.element_ty).",
    ),
)


def _matmul_truth(i):
    a, b = i["a"].double(), i["b"].double()
    return {"c": Truth(a @ b, a.abs() @ b.abs())}


MATMUL_TILED = Exercise(
    name="matmul_tiled",
    task="Multiply two matrices, tile by tile, with tl.dot.",
    signature="matmul_tiled(a, b, c)",
    details=(
        "a is float16 [M, K], b float16 [K, N], c float32 [M, N]. Each may have any strides; b may be the transpose of "
        "a contiguous matrix. Accumulate in float32."
    ),
    sizes=tuple(
        {"M": M, "N": N, "K": K}
        for M, N, K in (
            (1, 1, 1), (1, 16, 3), (5, 3, 7), (16, 16, 16), (17, 16, 16), (16, 31, 16), (16, 16, 33), (32, 32, 32),
            (64, 1, 100), (33, 47, 65), (64, 64, 64), (50, 70, 129), (64, 64, 128),
        )
    ),
    largest={"M": 80, "N": 80, "K": 150},
    inputs=lambda rng, s: {
        "a": torch.randn(s["M"], s["K"], generator=rng).half(),
        "b": torch.randn(s["K"], s["N"], generator=rng).half(),
    },
    outputs=lambda s: {"c": Output((s["M"], s["N"]), torch.float32)},
    truth=_matmul_truth,
    hints=(
        "One program makes one tile of c. It walks along K and adds the product of a tile of a and one of b each time.",
        "The last step along K may pass K: load 0 there, from both a and b. 0 * garbage may still be nan.",
        "total = tl.dot(a, b, total), total in tl.float32; address by both strides of each matrix.",
    ),
    strided=("a", "b.T", "c"),
)  # fmt: skip
