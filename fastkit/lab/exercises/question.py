"""Exercises whose answer is a number or a word."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastkit.lab.exercises.verdict import Verdict

SCALES = {10.0**power: f"1e{power}" for power in (-12, -9, -6, -3, 3, 6, 9, 12)}

Answer = float | str | tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """One question.

    name       "<the notebook's word>.<what is asked>", as "coalescing.sectors_of_stride_8"
    task       what is asked, in full, with the unit of the answer
    answer     a number; a word, or a tuple of words that mean the same; or a function that gives one of these
    solution   how one gets there: shown with a right answer, and by solution()
    hints      from the gentle to the plain
    mistakes   {a wrong answer: what went wrong there}, or a function of the right answer that gives such a dict
    tolerance  how far off a number may be, relatively
    unit       of a number; then answers that are 1000 or 8 times off are told so
    """

    name: str
    task: str
    answer: Answer | Callable[[], Answer]
    solution: str
    hints: tuple[str, ...]
    mistakes: Mapping | Callable[[Answer], Mapping]
    tolerance: float = 0.0
    unit: str = ""

    @property
    def right(self) -> Answer:
        """The right answer."""
        return self.answer() if callable(self.answer) else self.answer

    @property
    def wrong(self) -> dict:
        """Known wrong answers, and what to say to each."""
        return dict(self.mistakes(self.right) if callable(self.mistakes) else self.mistakes)

    def check(self, given) -> Verdict:
        """Whether `given` is right and, if not, what is wrong with it. None is no answer yet."""
        if given is None:
            return not_answered(self.name)
        right = self.right
        if self._is(given, right):
            return Verdict(self.name, True, lines=[self.solution])
        message = next((why for wrong, why in self.wrong.items() if self._is(given, wrong)), None)
        return Verdict(self.name, False, "wrong", message or self._far(given, right))

    def _is(self, given, wanted) -> bool:
        if isinstance(wanted, tuple):
            return any(self._is(given, word) for word in wanted)
        if isinstance(wanted, str):
            return isinstance(given, str) and _word(given) == _word(wanted)
        number = _number(given)
        return number is not None and math.isclose(number, wanted, rel_tol=max(self.tolerance, 1e-9), abs_tol=1e-12)

    def _far(self, given, right) -> str:
        """What can be said of an answer that nobody foresaw."""
        if isinstance(right, str | tuple):
            return f"{given!r} is not the word" if isinstance(given, str) else f"give a word, not {given!r}"
        number = _number(given)
        if number is None:
            return f"give a number, not {given!r}"
        if self.unit and right:
            for scale, words in SCALES.items():
                if self._is(number / scale, right):
                    return f"{number:g} is {words} times the answer: look at the unit, {self.unit}"
            for scale, words in ((8.0, "8 times"), (1 / 8, "an eighth of")):
                if self._is(number / scale, right):
                    return f"{number:g} is {words} the answer: a byte has 8 bits"
        return f"{number:g} is too {'high' if number > right else 'low'}"


def not_answered(name: str) -> Verdict:
    """The verdict on an exercise that has no answer yet."""
    return Verdict(name, False, message="not answered yet")


def _word(text: str) -> str:
    return " ".join(text.casefold().replace("_", " ").replace("-", " ").split())


def _number(given) -> float | None:
    """`given` as a number, also of a tensor with one; None if it is none."""
    if isinstance(given, bool):
        return None
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError):
        return None
