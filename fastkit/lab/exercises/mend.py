"""Exercises in which one fault of the capstone's step is to be mended, by another function for the part that has it."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from fastkit.lab.capstone import PLANTED, Parts
from fastkit.lab.exercises.exercise import SOLUTIONS
from fastkit.lab.exercises.part_truths import wrong_numbers
from fastkit.lab.exercises.question import not_answered
from fastkit.lab.exercises.verdict import Verdict
from fastkit.lab.step_faults import Fault


@dataclass(frozen=True)
class Mend:
    """One fault. Its answer is a step's Parts with the part exchanged: replace(PLANTED, norm=yours).

    name    "capstone.<the fault>"
    task    what is to be mended, in words that do not say where it is
    find    Parts -> the Fault that is left, or None
    done    what to say of a step without it
    hints   from the gentle to the plain
    """

    name: str
    task: str
    find: Callable[[Parts], Fault | None]
    done: str
    hints: tuple[str, ...]

    @property
    def solution(self) -> str:
        """The source of a part that mends it, and of nothing else."""
        return (SOLUTIONS / f"{self.name.replace('.', '_')}.py").read_text()

    def check(self, parts: Parts | None) -> Verdict:
        """Whether the fault is gone from a step of `parts`, and all exchanged parts compute what they should.

        Faults are counted at a real size, for sm_90, without a GPU. Then numbers are compared, at odd sizes, on the
        GPU or in Triton's interpreter. None, and the planted parts as they are, are no answer yet.
        """
        if parts is None or parts == PLANTED:
            return not_answered(self.name)
        if not isinstance(parts, Parts):
            message = f"give the step's parts, replace(PLANTED, norm=yours), not a {type(parts).__name__}"
            return Verdict(self.name, False, "signature", message)
        exchanged = [
            field.name for field in fields(Parts) if getattr(parts, field.name) != getattr(PLANTED, field.name)
        ]
        for name in exchanged:
            if not callable(getattr(parts, name)):
                return Verdict(self.name, False, "signature", f"{name} is no function")
        try:
            fault = self.find(parts) or wrong_numbers(parts, exchanged)
        except Exception as error:  # whatever an answer raises is its verdict
            return Verdict(self.name, False, "exception", f"{type(error).__name__}: {str(error).splitlines()[0]}")
        if fault:
            return Verdict(self.name, False, fault.property, fault.message, list(fault.lines))
        return Verdict(self.name, True, lines=[self.done])
