"""Exercise of notebook 11: cross_entropy_gradient."""

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth
from fastkit.lab.exercises.rows import CROSS_ENTROPY_LOSS


def _inputs(rng, s):
    M, V = s["M"], s["V"]
    offsets = (torch.rand(M, 1, generator=rng) - 0.5) * 400
    offsets[0] = 300  # past exp's range in float32
    labels = torch.randint(0, V, (M,), generator=rng)
    labels[torch.rand(M, generator=rng) < 0.25] = -100
    labels[-1] = V - 1
    logits = (torch.randn(M, V, generator=rng) * 4 + offsets).half()
    return {"logits": logits, "labels": labels, "items": int((labels != -100).sum()) + 2}


def _truth(i):
    logits, labels, items = i["logits"].double(), i["labels"], i["items"]
    counts = (labels != -100)[:, None]
    p = logits.softmax(1)
    one_hot = torch.zeros_like(p).scatter(1, labels.clamp(min=0)[:, None], 1.0)
    # exp's relative error grows with its argument
    size = p * (2 + (logits - logits.amax(1, keepdim=True)).abs()) + one_hot + 1e-30
    value, size = (torch.where(counts, x / items, 0.0) for x in (p - one_hot, size))
    return {"dlogits": Truth(value, size)}


CROSS_ENTROPY_GRADIENT = Exercise(
    name="cross_entropy_gradient",
    task="The gradient of the mean cross-entropy with respect to the logits.",
    signature="cross_entropy_gradient(logits, labels, items, dlogits)",
    details=(
        "logits and dlogits are float16 [M, V]; their rows may lie any stride apart and be of any length. labels are "
        "int64 [M]; items is the number that the sum of losses is divided by, larger than M perhaps, as where a batch "
        "comes in several parts. Write (p - [column = label]) / items, and 0 where the label is -100. Compute in "
        "float32. logits may hold numbers such as 400."
    ),
    sizes=(*CROSS_ENTROPY_LOSS.sizes, {"M": 2, "V": 3000}),
    largest={"M": 12, "V": 2500},
    inputs=_inputs,
    outputs=lambda s: {"dlogits": Output((s["M"], s["V"]), torch.float16)},
    truth=_truth,
    hints=(
        "A row is needed twice: for its maximum and total, in one online pass, and then for each p.",
        "p = exp(logits - largest) / total. The label's column has 1 less: tl.where(cols == label, 1.0, 0.0).",
        "Only where the label is -100 is all of a row 0: multiply by tl.where(label != -100, 1.0 / items, 0.0).",
    ),
    strided=("logits", "dlogits"),
)

EXERCISES = [CROSS_ENTROPY_GRADIENT]
