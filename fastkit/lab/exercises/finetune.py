"""Exercises of notebook 17: labels, merged, stop."""

from itertools import pairwise, product

import numpy as np
import torch

from fastkit.lab.exercises.exercise import Truth
from fastkit.lab.exercises.finding import Finding
from fastkit.lab.exercises.function import Function, another_kind, said
from fastkit.lab.exercises.values import wrong_values

IGNORE = -100
ALPHA = 12.0  # no rank of those that are tried


def _draw(rng, low: int, high: int, count: int) -> list[int]:
    return torch.randint(low, high, (count,), generator=rng).tolist()


# --- labels


def _conversations(rng, s):
    N = s["tokens"]
    ids = _draw(rng, 1, 1000, N)
    some = []
    for _ in range(3):
        turns = 1 + _draw(rng, 0, (N + 1) // 2, 1)[0]
        cuts = sorted(torch.randperm(N + 1, generator=rng)[: 2 * turns].tolist())
        some.append(list(zip(cuts[::2], cuts[1::2], strict=True)))
    return [{"ids": ids, "spans": spans} for spans in ([], [(0, N)], *some)]


def _labels(ids, spans, first=0, last=0, ignore=IGNORE):
    """The labels; or wrong ones, of turns that begin and end elsewhere."""
    trained = {place for start, end in spans for place in range(start + first, end + last)}
    return [token if place in trained else ignore for place, token in enumerate(ids)]


def _reaching_too_far(ids, spans):
    result = [IGNORE] * len(ids)
    for start, end in spans:
        for place in range(start, end + 1):
            result[place] = ids[place]
    return result


def _judge_labels(arguments, result):
    ids, wanted = arguments["ids"], _labels(**arguments)
    if not isinstance(result, list):
        return another_kind(result, "a list")
    if strange := [label for label in result if not isinstance(label, int | np.integer)]:
        return Finding("returns", f"returns a list that holds a {type(strange[0]).__name__}, where ints are wanted")
    if len(result) != len(ids):
        return Finding("values", f"returns a list of {len(result)}; ids is one of {len(ids)}")
    places = [place for place, label in enumerate(wanted) if result[place] != label]
    if not places:
        return None
    place, of_a_turn = places[0], wanted[places[0]] != IGNORE
    message = "leaves out a token of the assistant's" if of_a_turn else "trains more than the assistant's tokens"
    if not of_a_turn and result[place] != ids[place]:
        message = f"gives a token that is not trained another label than {IGNORE}"
    line = f"labels[{place}] is {result[place]}; expected {wanted[place]}"
    return Finding("values", message, [f"returned {said(result)}, expected {said(wanted)}", line])


LABELS = Function(
    name="labels",
    notebook="finetune",
    task="Write the labels of a conversation: the assistant's tokens, and -100 for all others.",
    signature="labels(ids, spans)",
    details=(
        "ids are its token ids, a list. spans lists the assistant's turns, in order, each as (start, end): the "
        "place of its first token, and the place after its last, as in a slice; there may be none. Return a new list, "
        "as long as ids: for a token of a turn its own id, for every other -100. A label stands in the place of its "
        "token: the model itself shifts them by one."
    ),
    sizes=tuple({"tokens": N} for N in (1, 2, 3, 4, 5, 6, 8, 11, 16, 23, 32, 64, 101)),
    largest={"tokens": 60},
    calls=_conversations,
    judge=_judge_labels,
    mistakes={
        "each label stands a place too early: the model itself shifts them": (
            lambda ids, spans: [*_labels(ids, spans)[1:], IGNORE]
        ),
        "each label stands a place too late: a token's own id is its label": (
            lambda ids, spans: [IGNORE, *_labels(ids, spans)[:-1]]
        ),
        "trains the token after each turn, too: end is the place after the last, as in a slice": (
            lambda ids, spans: _labels(ids, spans, last=1)
        ),
        "reaches for the token at end: a turn's last is at end - 1": _reaching_too_far,
        "leaves out the last token of each turn: its place is end - 1": lambda ids, spans: _labels(ids, spans, last=-1),
        "leaves out the first token of each turn: its place is start": lambda ids, spans: _labels(ids, spans, first=1),
        "trains everything: the model would learn to ask, too": lambda ids, spans: list(ids),
        "what is not trained is labelled 0, which is a token: the loss leaves out -100 alone": (
            lambda ids, spans: _labels(ids, spans, ignore=0)
        ),
        "trains the last turn alone: every turn of the assistant's counts": (
            lambda ids, spans: _labels(ids, spans[-1:])
        ),
        "trains the first turn alone: every turn of the assistant's counts": lambda ids, spans: _labels(ids, spans[:1]),
    },
    hints=(
        "Begin with a list of -100, as long as ids. What is left to do for each turn?",
        "start and end are a slice's: ids[start:end] are the tokens of the turn.",
        "result[start:end] = ids[start:end], for each of spans.",
    ),
)


# --- merged


def _weights(rng, s):
    A = torch.randn(s["r"], s["K"], generator=rng)
    B = torch.randn(s["N"], s["r"], generator=rng)
    found = []
    for dtype in (torch.float16, torch.bfloat16):
        W = torch.randn(s["N"], s["K"], generator=rng)
        cancels = -ALPHA / s["r"] * (B @ A)  # the delta's last digits alone are left: they must not have been rounded
        found += [{"W": w.to(dtype), "A": A, "B": B, "alpha": ALPHA} for w in (W, cancels)]
    return found


def _merged(W, A, B, factor):
    return (W.float() + factor * (B @ A)).to(W.dtype)


def _judge_merged(arguments, result):
    W, A, B = (arguments[name] for name in "WAB")
    if not isinstance(result, torch.Tensor):
        return another_kind(result, "a tensor")
    if result.shape != W.shape:
        shapes = f"returned {list(result.shape)}, expected {list(W.shape)}"
        return Finding("values", "returns a tensor of another shape than W's", [shapes])
    if result.dtype != W.dtype:
        return Finding("returns", f"returns a tensor of {result.dtype}; W is in {W.dtype}".replace("torch.", ""))
    W, A, B, factor = W.double(), A.double(), B.double(), arguments["alpha"] / len(A)
    return wrong_values("merged", result, Truth(W + factor * (B @ A), W.abs() + factor * (B.abs() @ A.abs())))


def _nearly(one, other):
    if not isinstance(one, torch.Tensor) or one.shape != other.shape:
        return False
    return bool((one.double() - other.double()).abs().max() <= 0.01 * other.double().abs().max())


MERGED = Function(
    name="merged",
    notebook="finetune",
    task="Add a LoRA adapter to its weight.",
    signature="merged(W, A, B, alpha)",
    details=(
        "W is [N, K], in float16 or bfloat16; A is float32 [r, K] and B float32 [N, r]; alpha is a number. Return "
        "W + alpha / r * B @ A as a new tensor in W's dtype: all of it computed in float32, and rounded once, at the "
        "end. W stays as it is. All tensors are on the CPU, and torch computes: no kernel is needed."
    ),
    sizes=tuple(
        {"N": N, "K": K, "r": r}
        for N, K, r in (
            (1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 3, 1), (2, 2, 2), (3, 2, 1), (1, 1, 8), (3, 5, 2), (4, 4, 4),
            (7, 3, 4), (8, 16, 3), (16, 16, 16), (5, 33, 8), (33, 20, 16), (48, 64, 33), (64, 96, 64),
        )
    ),
    largest={"N": 60, "K": 60, "r": 40},
    calls=_weights,
    judge=_judge_merged,
    mistakes={
        "alpha is not divided by r": lambda W, A, B, alpha: _merged(W, A, B, alpha),
        "alpha is divided by the root of r, as rsLoRA does; here it is divided by r": (
            lambda W, A, B, alpha: _merged(W, A, B, alpha / len(A) ** 0.5)
        ),
        "alpha / r is left out": lambda W, A, B, alpha: _merged(W, A, B, 1.0),
        "alpha is divided by K: r is A's other size": lambda W, A, B, alpha: _merged(W, A, B, alpha / A.shape[1]),
        "A and B are exchanged: B @ A is [N, K], as W is": lambda W, A, B, alpha: _merged(W, B, A, alpha / len(A)),
        "B @ A is transposed: it is [N, K] already, as W is": (
            lambda W, A, B, alpha: _merged(W, B.T, A.T, alpha / len(A))
        ),
        "W is multiplied by alpha / r, too": (
            lambda W, A, B, alpha: (alpha / len(A) * (W.float() + B @ A)).to(W.dtype)
        ),
    },
    alike=_nearly,
    hints=(
        "r is in the shapes: A has r rows. What has W's shape, A @ B or B @ A?",
        "The sum of a float16 and a float32 tensor is float32. So round neither the product nor its factors before it.",
        "(W.float() + alpha / r * (B @ A)).to(W.dtype)",
    ),
)  # fmt: skip


# --- stop


def _validations(rng, s):
    n = s["validations"]
    if n <= 4:
        curves = list(product(range(min(n, 3)), repeat=n))
    else:
        curves = [_draw(rng, 0, 1 + n // (1 + turn % 3), n) for turn in range(40)]
    patiences = range(n + 2) if n <= 4 else range(6)
    return [{"losses": [2 + c / 4 for c in curve], "patience": p} for curve in curves for p in patiences]


def _since_lowest(losses):
    return len(losses) - 1 - losses.index(min(losses))


def _stop(losses, patience):
    return 0 < patience <= _since_lowest(losses)


def _from_the_first_rise(losses, patience):
    rises = [n for n in range(1, len(losses)) if losses[n] > losses[n - 1]]
    return bool(rises) and 0 < patience <= len(losses) - rises[0]


def _all_without_a_new_lowest(losses, patience):
    return 0 < patience <= sum(losses[n] >= min(losses[:n]) for n in range(1, len(losses)))


def _each_after_the_last(losses, patience, worse):
    steps = list(pairwise(losses))[-patience:]
    return 0 < patience < len(losses) and all(worse(after, before) for before, after in steps)


def _judge_stop(arguments, result):
    if not isinstance(result, bool | int | np.bool_):
        return another_kind(result, "True or False")
    losses, wanted = arguments["losses"], _stop(**arguments)
    if bool(result) == wanted:
        return None
    message = "goes on where it should stop" if wanted else "stops where it should go on"
    since, place = _since_lowest(losses), losses.index(min(losses)) + 1
    line = f"returned {result}, expected {wanted}: the last new lowest is number {place}, and {since} came since"
    return Finding("values", message, [line])


STOP = Function(
    name="stop",
    notebook="finetune",
    task="Say whether to stop after these validation losses.",
    signature="stop(losses, patience)",
    details=(
        "losses is a list: the losses of all validations so far, one at least, the oldest first. Return True if the "
        "last `patience` of them brought no new lowest, else False. A new lowest is below all losses before it: a loss "
        "that equals the lowest is none. The first is always one. With patience 0 the answer is always False."
    ),
    sizes=tuple({"validations": n} for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 25, 32)),
    largest={"validations": 40},
    calls=_validations,
    judge=_judge_stop,
    mistakes={
        "patience 0 means never, and here it stops": lambda losses, patience: patience <= _since_lowest(losses),
        "stops a validation too late": lambda losses, patience: 0 < patience < _since_lowest(losses),
        "stops a validation too early": lambda losses, patience: 0 < patience <= _since_lowest(losses) + 1,
        "takes a loss that equals the lowest for a new lowest": (
            lambda losses, patience: 0 < patience <= losses[::-1].index(min(losses))
        ),
        "compares each loss with the one before it: a new lowest is below all before it": (
            lambda losses, patience: _each_after_the_last(losses, patience, lambda after, before: after >= before)
        ),
        "compares each loss with the one before it, and goes on where they are equal": (
            lambda losses, patience: _each_after_the_last(losses, patience, lambda after, before: after > before)
        ),
        "counts from the first rise on: a new lowest begins the count anew": _from_the_first_rise,
        "counts all validations without a new lowest: a new lowest begins the count anew": _all_without_a_new_lowest,
        "stops at the first loss that is no new lowest, whatever the patience": (
            lambda losses, patience: patience > 0 and _since_lowest(losses) > 0
        ),
        "stops for what came before the last new lowest: the last validations alone count": (
            lambda losses, patience: any(_stop(losses[: n + 1], patience) for n in range(len(losses)))
        ),
    },
    hints=(
        "Where in the list is the lowest loss? If it is there more than once, which of them was a new lowest?",
        "losses.index(min(losses)) is the place of the first of equals. How many validations came after it?",
        "len(losses) - 1 - losses.index(min(losses)) of them. Compare that with patience, unless it is 0.",
    ),
)

EXERCISES = [LABELS, MERGED, STOP]
