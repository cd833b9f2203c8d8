"""Exercise of notebook 16: adamw_flat."""

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth

LR, BETA1, BETA2, EPS, DECAY = 0.5, 0.9, 0.8, 1e-8, 0.5  # not those in use, but easy to see at work


def _inputs(rng, s):
    N = s["N"]
    p, g, m = (torch.randn(N, generator=rng) for _ in range(3))
    return {"p": p, "g": g * 1e-2, "m": m * 1e-2, "v": torch.rand(N, generator=rng) * 1e-4 + 1e-12, "step": 3}


def _truth(i):
    p, g, m, v = (i[name].double() for name in "pgmv")
    new_m, new_v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
    mean, square = new_m / (1 - BETA1 ** i["step"]), new_v / (1 - BETA2 ** i["step"])
    update = LR * mean / (square.sqrt() + EPS)
    terms = BETA1 * m.abs() + (1 - BETA1) * g.abs()
    size = p.abs() + 2 * LR * terms / (1 - BETA1 ** i["step"]) / (square.sqrt() + EPS)
    return {
        "new_p": Truth((1 - LR * DECAY) * p - update, size),
        "new_m": Truth(new_m, terms),
        "new_v": Truth(new_v, new_v),
    }


ADAMW_FLAT = Exercise(
    name="adamw_flat",
    task="One step of AdamW for all parameters at once, in one launch.",
    signature="adamw_flat(p, g, m, v, step, new_p, new_m, new_v)",
    details=(
        "All tensors are float32 [N]: parameters, gradients and both running means, all end to end, and their new "
        "values. step counts from 1. With "
        f"lr = {LR}, weight_decay = {DECAY}, beta1 = {BETA1}, beta2 = {BETA2} and eps = {EPS}: "
        "new_m = beta1 m + (1 - beta1) g; new_v = beta2 v + (1 - beta2) g²; "
        "`new_p = (1 - lr weight_decay) p - lr (new_m / (1 - beta1**step)) / (sqrt(new_v / (1 - beta2**step)) + eps)`."
    ),
    sizes=tuple({"N": N} for N in (1, 2, 3, 16, 31, 64, 65, 128, 257, 1000, 1024, 1025, 2048, 4096)),
    largest={"N": 4000},
    inputs=_inputs,
    outputs=lambda s: {name: Output((s["N"],), torch.float32) for name in ("new_p", "new_m", "new_v")},
    truth=_truth,
    hints=(
        "It is vector_add with four inputs and three outputs: a block of places, a mask, no lane needs another.",
        "1 - beta1**step and 1 - beta2**step are numbers, the same for all: let Python compute them, and pass them in.",
        "eps is added after the root, and the weights decay by themselves, not through the gradient.",
    ),
)

EXERCISES = [ADAMW_FLAT]
