"""Exercises without a kernel: their answer is a function that returns its result."""

import operator
import zlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch

from fastkit.lab.exercises.blame import raised, uncallable
from fastkit.lab.exercises.case import Case, Trial
from fastkit.lab.exercises.exercise import Exercise, Output, Sizes, Truth
from fastkit.lab.exercises.finding import Finding

LONGEST = 100  # characters of a value in a message


@dataclass(frozen=True, kw_only=True)
class Function(Exercise):
    """One exercise. Its answer takes a call's arguments, in the order of `signature`, and returns its result.

    notebook  the word of the notebook: the exercise is also known as "<notebook>.<name>"
    calls     (generator, sizes) -> the calls of a case, the plainest first: each its arguments by name
    judge     (arguments, result) -> what is wrong with a result, None if nothing
    mistakes  {what to say of it: a wrong answer}, for what is often mistaken
    alike     whether two results are the same, to tell one mistake from another
    """

    notebook: str
    calls: Callable[[torch.Generator, Sizes], list[dict]]
    judge: Callable[[dict, object], Finding | None]
    mistakes: dict[str, Callable]
    alike: Callable[[object, object], bool] = operator.eq
    inputs: Callable[[torch.Generator, Sizes], dict] = lambda rng, sizes: {}
    outputs: Callable[[Sizes], dict[str, Output]] = lambda sizes: {}
    truth: Callable[[dict], dict[str, Truth]] = lambda inputs: {}


def run_calls(exercise: Function, answer: Callable, case: Case, seed: int) -> Trial:
    """Call `answer` with all arguments of `case`, or up to the first that it has wrong. A seed gives the same calls."""
    rng = torch.Generator().manual_seed(seed ^ zlib.crc32(str(case).encode()))
    for arguments in exercise.calls(rng, dict(case.sizes)):
        if finding := _wrong(exercise, answer, arguments):
            return Trial(finding)
    return Trial(None)


def as_known_mistake(exercise: Function, answer: Callable, seed: int, finding: Finding) -> Finding:
    """The finding, in the words for the first known mistake that does with every call just what `answer` does.

    The words name what is wrong with the result, so the property is "values" even where a call raised.
    """
    if finding.property not in ("values", "exception"):
        return finding
    rng = torch.Generator().manual_seed(seed)
    calls = [arguments for sizes in exercise.sizes for arguments in exercise.calls(rng, sizes)]
    results = [_result(answer, arguments) for arguments in calls]
    for message, mistake in exercise.mistakes.items():
        theirs = (_result(mistake, arguments) for arguments in calls)
        if all(_alike(exercise, *pair) for pair in zip(results, theirs, strict=True)):
            told = [finding.message] if finding.property == "exception" else []
            return Finding("values", message, [*told, *finding.lines], finding.place)
    return finding


def said(value) -> str:
    """A value in few words: of a tensor its dtype and shape."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]} ... {text[-15:]}"


def another_kind(result, wanted: str) -> Finding:
    """The finding on a result that is no `wanted`."""
    kind = "nothing" if result is None else f"a {type(result).__name__}"
    return Finding("returns", f"returns {kind}, where {wanted} is wanted")


def _wrong(exercise: Function, answer: Callable, arguments: dict) -> Finding | None:
    given = deepcopy(arguments)
    called = f"called as {exercise.name}({', '.join(f'{name}={said(value)}' for name, value in arguments.items())})"
    if finding := uncallable(answer, list(given.values()), exercise.signature):
        return finding
    try:
        result = answer(*given.values())
    except BaseException as error:
        finding = raised(error)
    else:
        changed = [name for name, value in arguments.items() if not _same(given[name], value)]
        if changed:
            finding = Finding("inputs changed", f"{changed[0]}, an input, was changed")
        else:
            finding = exercise.judge(arguments, result)
    if finding:
        finding.lines.insert(0, called)
    return finding


def _result(function: Callable, arguments: dict):
    """What the function returns, or the class of what it raises."""
    try:
        return function(*deepcopy(arguments).values())
    except Exception as error:
        return type(error)


def _alike(exercise: Function, one, other) -> bool:
    if isinstance(one, type) or isinstance(other, type):
        return one is other
    return exercise.alike(one, other)


def _same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other
