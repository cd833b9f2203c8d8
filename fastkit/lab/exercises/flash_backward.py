"""Exercise of notebook 13: attention_dk_dv."""

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth
from fastkit.lab.exercises.flash_attention import SIZES, heads, seen_scores


def _inputs(rng, s):
    i = heads(rng, s)
    i["do"] = torch.randn(s["T"], s["D"], generator=rng)
    scores, _ = seen_scores(i)
    o = scores.softmax(1) @ i["v"].double()
    return i | {"lse": scores.logsumexp(1).float(), "delta": (i["do"] * o).sum(1).float()}


def _truth(i):
    q, v, do, lse, delta = (i[name].double() for name in ("q", "v", "do", "lse", "delta"))
    s, error = seen_scores(i)
    scale = q.shape[1] ** -0.5
    p = (s - lse[:, None]).exp()
    ds = p * (do @ v.T - delta[:, None])
    error = p * error + 1e-30  # a GPU may flush subnormal numbers to zero
    ds_error = error * (do.abs() @ v.abs().T + delta.abs()[:, None])
    return {
        "dk": Truth(scale * ds.T @ q, scale * ds_error.T @ q.abs()),
        "dv": Truth(p.T @ do, error.T @ do.abs()),
    }


ATTENTION_DK_DV = Exercise(
    name="attention_dk_dv",
    task="The gradients of keys and values of a causal head, from scores that nobody kept.",
    signature="attention_dk_dv(q, k, v, do, lse, delta, dk, dv)",
    details=(
        "q, k, v, do, dk and dv are float32 [T, D], contiguous, D up to 64; lse and delta are float32 [T]. Query i "
        "sees the keys 0 to i, its scores are q kᵀ / sqrt(D), and p = exp(scores - lse). A program keeps a block of "
        "keys and walks over the queries that see them. Multiply by tl.dot with input_precision='ieee'."
    ),
    sizes=SIZES,
    largest={"T": 150, "D": 40},
    inputs=_inputs,
    outputs=lambda s: {
        "dk": Output((s["T"], s["D"]), torch.float32),
        "dv": Output((s["T"], s["D"]), torch.float32),
    },
    truth=_truth,
    hints=(
        "For a block of queries: s = q kᵀ * scale, p = exp(s - lse) and 0 where a key comes after its query, "
        "dp = do vᵀ, ds = p * (dp - delta). lse and delta are one number for each query: [:, None].",
        "dv sums pᵀ do, dk sums dsᵀ q, over all blocks of queries from the block's own on; dk is scaled at the end.",
        "for m in range(tl.program_id(0) * BLOCK_N, T, BLOCK_M), with BLOCK_N a multiple of BLOCK_M; then "
        "dv = tl.dot(tl.trans(p), do, dv, input_precision='ieee').",
    ),
)

EXERCISES = [ATTENTION_DK_DV]
