"""Exercise of notebook 12: attend_causal."""

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth

SIZES = tuple(
    {"T": T, "D": D}
    for T, D in (
        (1, 1), (1, 2), (2, 1), (3, 3), (5, 16), (16, 16), (17, 16), (31, 5), (33, 8), (64, 32), (65, 7), (100, 64),
        (128, 16), (130, 33),
    )
)  # fmt: skip


def heads(rng, s) -> dict:
    """q, k and v of one head; some queries with scores past exp's range in float32."""
    q, k, v = (torch.randn(s["T"], s["D"], generator=rng) for _ in range(3))
    q[1::3] *= 60
    return {"q": q, "k": k, "v": v}


def seen_scores(i) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64 the scores, -inf where a query does not see a key, and by how much exp of each may be off, relatively,
    in units of SLACK: by what a score and the number taken from it are off."""
    q, k = i["q"].double(), i["k"].double()
    seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    scale = q.shape[1] ** -0.5
    s = (scale * q @ k.T).masked_fill(~seen, -torch.inf)
    terms = scale * q.abs() @ k.abs().T + s.logsumexp(1, keepdim=True).abs()
    return s, (1 + terms / 4) * seen


def _truth(i):
    s, error = seen_scores(i)
    p, v, error = s.softmax(1), i["v"].double(), error.amax(1)
    return {"o": Truth(p @ v, error[:, None] * (p @ v.abs())), "lse": Truth(s.logsumexp(1), error)}


ATTEND_CAUSAL = Exercise(
    name="attend_causal",
    task="Causal attention of one head, without its scores in memory.",
    signature="attend_causal(q, k, v, o, lse)",
    details=(
        "q, k, v and o are float32 [T, D], contiguous, D up to 64; lse is float32 [T]. Query i sees the keys 0 to i. "
        "Write o = softmax(q kᵀ / sqrt(D)) v, and into lse the logarithm of the sum of exp of a query's scores, which "
        "may be 100 and more. Multiply by tl.dot with input_precision='ieee'; its sides must be 16 or more."
    ),
    sizes=SIZES,
    largest={"T": 150, "D": 40},
    inputs=heads,
    outputs=lambda s: {
        "o": Output((s["T"], s["D"]), torch.float32),
        "lse": Output((s["T"],), torch.float32),
    },
    truth=_truth,
    hints=(
        "One program keeps a block of queries and walks over blocks of keys, the first block included, which every "
        "query sees a key of. Load zeros beyond T and D: BLOCK_D = max(16, triton.next_power_of_2(D)).",
        "Carry row_max, row_sum and acc along. s is -inf where a key comes after the query, or lies beyond T. When a "
        "block brings a larger maximum, both row_sum and acc shrink by exp(row_max - new_max).",
        "acc = tl.dot(p, v, acc * decay[:, None], input_precision='ieee'); at the end o = acc / row_sum[:, None] and "
        "lse = row_max + tl.log(row_sum).",
    ),
)

EXERCISES = [ATTEND_CAUSAL]
