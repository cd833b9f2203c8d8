"""Exercises: write a kernel, then let check() say whether it is right and, if not, why and on which smallest case.

check("vector_add", add)    runs `add` in a process of its own on fresh inputs
hint("vector_add")          one more hint each time
solution("vector_add")      the source of an answer that is right
exercises()                 the tasks; exercises("vector_add") one of them in full

Questions, whose answer is a number or a word, are asked and checked by the same four: check("measure.ridge", 236). So
are the faults of the capstone's step, whose answer is a step: check("capstone.needless_copy", replace(PLANTED, ...)).
And so are functions without a kernel, which return their result: check("finetune.labels", labels).
"""

import ast
import importlib.util
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fastkit.errors import FastkitError
from fastkit.lab.exercises.catalog import EXERCISES, MENDS, QUESTIONS, find
from fastkit.lab.exercises.demands import prepare, unmet
from fastkit.lab.exercises.function import Function
from fastkit.lab.exercises.mend import Mend
from fastkit.lab.exercises.process import INSIDE, Child
from fastkit.lab.exercises.question import Question, not_answered
from fastkit.lab.exercises.verdict import Verdict
from fastkit.lab.sources import Source, carry, read

__all__ = ["check", "exercises", "hint", "solution"]

CPU_SECONDS, GPU_SECONDS = 10.0, 60.0  # a GPU's kernels are compiled first
_hints_shown = Counter()


class Tasks(dict):
    """Each exercise's task by its name; a notebook shows them as a list."""

    def __str__(self) -> str:
        return "\n".join(f"{name}: {task}" for name, task in self.items())

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return "\n".join(f"* `{getattr(find(name), 'signature', name)}`: {task}" for name, task in self.items())


class Text(str):
    """Text that a notebook shows as `markdown`, if it has that."""

    markdown: str = ""

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str | None:
        return self.markdown or None


def exercises(name: str | None = None) -> Tasks | Text:
    """The exercises' one-line tasks by name; with a name, all that its answer has to do."""
    if name is None:
        return Tasks({name: exercise.task for name, exercise in (EXERCISES | QUESTIONS | MENDS).items()})
    exercise = find(name)
    if isinstance(exercise, Question | Mend):
        text = Text(f"{name}: {exercise.task}")
        text.markdown = exercise.task
        return text
    text = Text(f"{exercise.signature}: {exercise.task} {exercise.details}")
    text.markdown = f"**{exercise.task}** `{exercise.signature}`: {exercise.details}"
    return text


def check(name: str, answer, seconds: float | None = None, seed: int | None = None) -> Verdict:
    """Whether `answer` solves the exercise `name`.

    answer   a function with the exercise's signature that launches a Triton kernel; or a file, or source text, that
             defines one under the exercise's name. It writes into the outputs that it is given; or, where the exercise
             asks for no kernel, it returns its result. For a question, a number or a word; for a fault of the
             capstone, the Parts of a step. None, or a function whose body is `...`, is no answer yet
    seconds  that the answer may run, imports not counted (on a CPU 10, on a GPU 60)
    seed     of the inputs, as a verdict names it; drawn anew without

    The answer runs in a process of its own, which may crash or hang without harm, on shapes from 1 upwards. Without a
    GPU its kernels are interpreted; with one they also run compiled. Raises FastkitError for a name that is none, or a
    function whose source cannot be carried over. Changing the answer and checking again needs no restart.
    """
    exercise = find(name)
    if isinstance(exercise, Question | Mend):
        return exercise.check(answer)
    if answer is None or (callable(answer) and _is_skeleton(answer)):
        return not_answered(name)
    if os.environ.get(INSIDE):
        raise FastkitError("check() is called by the answer itself: call it outside of the file that is checked")
    plain = isinstance(exercise, Function)  # runs on the CPU, whatever there is
    if not plain and importlib.util.find_spec("triton") is None:
        raise FastkitError("exercises run Triton kernels, and Triton is not installed: pip install triton")
    source = _source(exercise.name, answer)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    children = [Child(name, source, "cpu", seconds or CPU_SECONDS, seed)]
    if _has_gpu() and not plain:
        children.append(Child(name, source, "cuda", seconds or GPU_SECONDS, seed))
    if exercise.demands:
        prepare()
    verdicts = [child.verdict() for child in children]
    verdict = next((verdict for verdict in verdicts if not verdict), verdicts[0])
    if plain:
        verdict.lane = "on the CPU"
    if verdict and len(verdicts) > 1:
        verdict.lane = " and ".join(verdict.lane for verdict in verdicts)
    return unmet(exercise, source, verdict) if verdict and exercise.demands else verdict


def hint(name: str, number: int | None = None) -> Text:
    """The next hint of the exercise, or hint `number`, counted from 1; after the last one, the last again."""
    hints = find(name).hints
    if number is None:
        number = _hints_shown[name] = min(_hints_shown[name] + 1, len(hints))
    if not 1 <= number <= len(hints):
        raise FastkitError(f"{name} has hints 1 to {len(hints)}: there is no hint {number}")
    more = "" if number < len(hints) else f'; the solution: solution("{name}")'
    return Text(f"hint {number} of {len(hints)}{more}: {hints[number - 1]}")


def solution(name: str) -> Text:
    """The source of an answer that is right, highlighted in a notebook; of a question, the way to its answer."""
    text = Text(find(name).solution)
    if name in QUESTIONS:
        return text
    text.markdown = f"```python\n{text}```"
    return text


def _source(name: str, answer) -> Source:
    if callable(answer):
        return carry(answer)
    if not isinstance(answer, str | Path):
        raise FastkitError(f"expected a function, a file or source text, got a {type(answer).__name__}")
    if isinstance(answer, Path) or "\n" not in answer:
        path = Path(answer)
        if not path.is_file():
            raise FastkitError(f"no file {path}: give a function, a file that defines {name}, or its text")
        return read(path.read_text(), name, str(path))
    return read(answer, name, "answer")


def _is_skeleton(answer: Callable) -> bool:
    """Whether a function does nothing: its body is `...` or `pass`, below a docstring perhaps."""
    try:
        definition = ast.parse(carry(answer).text).body[-1]
    except FastkitError:
        return False
    body = getattr(definition, "body", None)
    return isinstance(body, list) and all(
        isinstance(line, ast.Pass) or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in body
    )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
