"""Exercises of notebook 10: swiglu_backward."""

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth
from fastkit.lab.exercises.tiles import SHAPES


def _inputs(rng, s):
    shape = s["M"], s["N"]
    gate, far = torch.randn(shape, generator=rng) * 4, torch.rand(shape, generator=rng)
    gate = torch.where(far < 0.02, -20000.0, torch.where(far > 0.98, 20000.0, gate))
    dy, up = (torch.randn(shape, generator=rng).clamp(-3, 3) for _ in range(2))
    return {"dy": dy.half(), "gate": gate.half(), "up": up.half()}


def _truth(i):
    dy, gate, up = (i[name].double() for name in ("dy", "gate", "up"))
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    terms = sigmoid * (1 + (gate * (1 - sigmoid)).abs())
    grows = 2 + gate.abs().clamp(max=20)  # exp's error grows with its argument
    return {
        "dgate": Truth(dy * up * slope, (dy * up).abs() * terms * grows),
        "dup": Truth(dy * gate * sigmoid, (dy * gate * sigmoid).abs() * grows),
    }


SWIGLU_BACKWARD = Exercise(
    name="swiglu_backward",
    task="The gradients of silu(gate) * up in one pass.",
    signature="swiglu_backward(dy, gate, up, dgate, dup)",
    details=(
        "All are float16 [M, N]; the numbers of a row are neighbours, the rows of gate and of up may lie any stride "
        "apart; gate may hold numbers such as -20000. dup = dy * silu and dgate = dy * up * dsilu, with silu = gate * "
        "sigmoid(gate) and dsilu its derivative. Compute in float32 and round once."
    ),
    sizes=tuple({"M": M, "N": N} for M, N in SHAPES),
    largest={"M": 12, "N": 300},
    inputs=_inputs,
    outputs=lambda s: {name: Output((s["M"], s["N"]), torch.float16) for name in ("dgate", "dup")},
    truth=_truth,
    hints=(
        "dsilu = sigmoid * (1 + gate * (1 - sigmoid)). tl.sigmoid takes float32 and numbers of any size.",
        "Three loads, two stores, at row * stride + cols: each tensor with its own x.stride(0).",
        "Convert each load by .to(tl.float32), and each result by .to(dgate_ptr.dtype.element_ty) at its store.",
    ),
    strided=("gate", "up"),
)

EXERCISES = [SWIGLU_BACKWARD]
