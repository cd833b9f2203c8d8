"""Exercises that reduce rows: row_sum, softmax_rows, rms_norm_backward_dx, cross_entropy_loss."""

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth

LONG = ((1, 1), (1, 2), (2, 3), (17, 5), (3, 16), (5, 31), (4, 64), (3, 100), (2, 257), (4, 1024), (3, 1025))
ROWS = tuple({"M": M, "N": N} for M, N in (*LONG, (2, 2048)))


def _row_sum_truth(i):
    x = i["x"].double()
    return {"out": Truth(x.sum(1), x.abs().sum(1))}


ROW_SUM = Exercise(
    name="row_sum",
    task="Sum each row of a float16 matrix without losing digits.",
    signature="row_sum(x, out)",
    details="x is float16 [M, N], out float32 [M]. The sums pass 65,504, where float16 ends.",
    sizes=(*ROWS, {"M": 2, "N": 3000}),
    largest={"M": 8, "N": 3000},
    inputs=lambda rng, s: {"x": (torch.randn(s["M"], s["N"], generator=rng) + 40).half()},
    outputs=lambda s: {"out": Output((s["M"],), torch.float32)},
    truth=_row_sum_truth,
    hints=(
        "One program a row: it walks along the row and holds the sum in registers.",
        "Lanes beyond the row must add nothing: other=0.0 says what a masked lane loads.",
        "Convert each block by .to(tl.float32) before it is added: tl.sum of float16 is computed in float16.",
    ),
)


def _softmax_inputs(rng, s):
    offsets = (torch.rand(s["M"], 1, generator=rng) - 0.5) * 2000  # far past exp's range in float32
    offsets[0] = -300  # of a row below zero, a zero would be the maximum
    return {"x": torch.randn(s["M"], s["N"], generator=rng) * 5 + offsets}


def _softmax_truth(i):
    x = i["x"].double()
    value = x.softmax(1)
    # exp's relative error grows with its argument; a GPU may flush subnormal numbers to zero
    return {"out": Truth(value, value * (2 + (x - x.amax(1, keepdim=True)).abs()) + 1e-30)}


SOFTMAX_ROWS = Exercise(
    name="softmax_rows",
    task="Softmax of each row, for numbers of any size.",
    signature="softmax_rows(x, out)",
    details="x and out are float32 [M, N]; their rows may lie any stride apart. x may hold numbers such as 1000.",
    sizes=ROWS,
    largest={"M": 6, "N": 1200},
    inputs=_softmax_inputs,
    outputs=lambda s: {"out": Output((s["M"], s["N"]), torch.float32)},
    truth=_softmax_truth,
    hints=(
        "exp(1000) is infinite. Softmax stays the same when a number is subtracted from all of a row: which one helps?",
        "Subtract the row's maximum. A masked lane must not win the maximum, nor count in the sum: load -inf there.",
        "One program a row, BLOCK_N = triton.next_power_of_2(N), rows found by x.stride(0) and out.stride(0).",
    ),
    strided=("x", "out"),
)


def _rms_inputs(rng, s):
    M, N = s["M"], s["N"]
    x = (torch.randn(M, N, generator=rng) * 3).half()
    return {
        "dy": torch.randn(M, N, generator=rng).half(),
        "x": x,
        "weight": (torch.randn(N, generator=rng) * 0.2 + 1).half(),
        "rstd": torch.rsqrt(x.float().square().mean(1) + 1e-6),
    }


def _rms_truth(i):
    dy, x, weight, rstd = (i[name].double() for name in ("dy", "x", "weight", "rstd"))
    wdy, x_hat = weight * dy, x * rstd[:, None]
    c = (x_hat * wdy).mean(1, keepdim=True)
    size = wdy.abs() + x_hat.abs() * (x_hat * wdy).abs().mean(1, keepdim=True)
    return {"dx": Truth(rstd[:, None] * (wdy - x_hat * c), 2 * rstd[:, None] * size)}


RMS_NORM_BACKWARD_DX = Exercise(
    name="rms_norm_backward_dx",
    task="The gradient of RMSNorm with respect to its input.",
    signature="rms_norm_backward_dx(dy, x, weight, rstd, dx)",
    details=(
        "dy, x and dx are float16 [M, N], weight float16 [N], rstd float32 [M]. With wdy = weight * dy, "
        "x_hat = x * rstd and c = mean(x_hat * wdy) of each row, dx = rstd * (wdy - x_hat * c). Compute in float32."
    ),
    sizes=ROWS,
    largest={"M": 6, "N": 1200},
    inputs=_rms_inputs,
    outputs=lambda s: {"dx": Output((s["M"], s["N"]), torch.float16)},
    truth=_rms_truth,
    hints=(
        "One program a row: it needs the whole row to know c, and the row again to write dx. Hold it in registers.",
        "c is tl.sum(x_hat * wdy) / N, not / BLOCK_N. Masked lanes must add 0 to the sum.",
        "Convert all that is loaded to float32 first; convert dx to dx_ptr.dtype.element_ty when it is stored.",
    ),
)


def _loss_inputs(rng, s):
    M, V = s["M"], s["V"]
    offsets = (torch.rand(M, 1, generator=rng) - 0.5) * 400
    offsets[0] = 300  # past exp's range in float32
    labels = torch.randint(0, V, (M,), generator=rng)
    labels[torch.rand(M, generator=rng) < 0.25] = -100
    labels[-1] = V - 1
    return {"logits": torch.randn(M, V, generator=rng) * 4 + offsets, "labels": labels}


def _loss_truth(i):
    logits, labels = i["logits"].double(), i["labels"]
    counts = labels != -100
    target = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    value = torch.where(counts, logits.logsumexp(1) - target, 0.0)
    return {"loss": Truth(value, torch.where(counts, logits.abs().amax(1) + target.abs() + 10, 0.0))}


CROSS_ENTROPY_LOSS = Exercise(
    name="cross_entropy_loss",
    task="The cross-entropy of each row's label.",
    signature="cross_entropy_loss(logits, labels, loss)",
    details=(
        "logits are float32 [M, V], labels int64 [M], loss float32 [M]. A row's loss is logsumexp(logits) - "
        "logits[label]; it is 0 where the label is -100."
    ),
    sizes=tuple({"M": size["M"], "V": size["N"]} for size in ROWS),
    largest={"M": 20, "V": 1500},
    inputs=_loss_inputs,
    outputs=lambda s: {"loss": Output((s["M"],), torch.float32)},
    truth=_loss_truth,
    hints=(
        "logsumexp is largest + log(sum(exp(logits - largest))): the subtraction keeps exp in its range.",
        "The label's own logit is one more load, at row * V + label.",
        "-100 is no place in the row: mask that load, and let tl.where write 0 for such a row.",
    ),
)
