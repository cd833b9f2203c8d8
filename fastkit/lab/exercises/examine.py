"""Try an answer on growing cases, find the smallest that fails, and see what those that fail have in common."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fastkit.lab.exercises.case import Case, Trial
from fastkit.lab.exercises.exercise import Exercise
from fastkit.lab.exercises.finding import Finding
from fastkit.lab.exercises.function import Function, as_known_mistake, run_calls

DRAWN = 2  # sizes drawn anew in each check
FINAL = {"signature", "exit", "crash"}  # found on the first case, or the end of all
BACKWARDS = 3  # every so many cases, the programs also run from last to first
SHAPE_LIKE = {"values", "precision", "unwritten", "exception", "out of bounds", "masked lanes", "compile"}


@dataclass
class Outcome:
    """The result of all trials: the finding, None if every case was right, and the cases that led to it."""

    finding: Finding | None
    case: Case | None = None
    passed: list[Case] = field(default_factory=list)
    failed: list[Case] = field(default_factory=list)
    left_out: int = 0  # cases there was no time for


def cases(exercise: Exercise, seed: int) -> list[Case]:
    """The cases of a check, the smallest first."""
    draw = random.Random(seed)
    drawn = [{name: draw.randint(2, most) | 1 for name, most in exercise.largest.items()} for _ in range(DRAWN)]
    layouts = ["", "rows apart"] if exercise.strided else [""]
    layouts += ["transposed"] if any(name.endswith(".T") for name in exercise.strided) else []
    found = [
        Case(tuple(sizes.items()), layout)
        for number, sizes in enumerate((*exercise.sizes, *drawn))
        for layout in (layouts if number % 2 else [""])
    ]
    return sorted(dict.fromkeys(found), key=lambda case: (_volume(case), layouts.index(case.layout)))


def examine(exercise: Exercise, answer: Callable, seed: int, seconds: float, device: str = "cpu") -> Outcome:
    """Run `answer` on all cases, or on as many as `seconds` of this process's own time allow."""
    return _Examination(exercise, answer, seed, seconds, device).outcome()


class _Examination:
    def __init__(self, exercise, answer, seed, seconds, device):
        self.exercise, self.answer, self.seed, self.device = exercise, answer, seed, device
        self.seconds, self.deadline = seconds, time.process_time() + seconds
        self.passed, self.failed, self.left_out = [], {}, 0

    def run(self, case: Case, again: int = 0, reverse: bool = False) -> Trial:
        if isinstance(self.exercise, Function):
            return run_calls(self.exercise, self.answer, case, self.seed + again)
        from fastkit.lab.exercises.trial import run_trial  # with Triton, which a Function does without

        return run_trial(self.exercise, self.answer, case, self.seed + again, self.device, reverse)

    def outcome(self) -> Outcome:
        chosen = cases(self.exercise, self.seed)
        chosen = chosen if self.device == "cpu" else chosen[::3]  # on a GPU nearly each case is compiled anew
        for number, case in enumerate(chosen):
            if time.process_time() > self.deadline - (self.seconds / 3 if self.failed else 0):
                self.left_out += 1
                continue
            trial = self.run(case)
            if not trial.finding and not self.failed and trial.programs > 1 and number % BACKWARDS == 0:
                trial = self.backwards(case)
            if trial.finding is None:
                self.passed.append(case)
                continue
            self.failed[case] = trial.finding
            if trial.finding.property in FINAL:
                break
        if not self.failed:
            return Outcome(None, None, self.passed, [], self.left_out)
        case, finding = self.plainest()
        if finding.property not in FINAL:
            case, finding = self.shrink(case, finding)
            if isinstance(self.exercise, Function):
                finding = as_known_mistake(self.exercise, self.answer, self.seed, finding)
            else:
                finding = self.in_common(case, finding)
        return Outcome(finding, case, self.passed, list(self.failed), self.left_out)

    def backwards(self, case: Case) -> Trial:
        """A trial with each launch's programs from last to first, of an answer that is right from first to last."""
        trial = self.run(case, reverse=True)
        if trial.finding and trial.finding.property != "race":
            message = "the result is right only if the programs run in order; on a GPU they run in any"
            trial.finding = Finding("race", message, trial.finding.lines, trial.finding.place)
        return trial

    def plainest(self) -> tuple[Case, Finding]:
        """The smallest failing case; not one that looks like lost digits where most others show a wrong result."""
        failed = list(self.failed.items())
        if failed[0][1].property == "precision":
            wrong = [item for item in failed if item[1].property == "values"]
            if len(wrong) > len(failed) / 2:
                return next((item for item in wrong if item[1].finite), wrong[0])
        return failed[0]

    def shrink(self, case: Case, finding: Finding) -> tuple[Case, Finding]:
        """The case made smaller, a size at a time, while the same property fails."""
        tried = {case, *self.passed}
        while time.process_time() < self.deadline:
            for smaller in _smaller(case):
                if smaller in tried or time.process_time() > self.deadline:
                    continue
                tried.add(smaller)
                found = self.run(smaller).finding
                if found and found.property == finding.property:
                    case, finding = smaller, found
                    break
            else:
                break
        return case, finding

    def in_common(self, case: Case, finding: Finding) -> Finding:
        """The finding, or a plainer one that all failing cases share."""
        passed, failed = self.passed, list(self.failed)
        if finding.property == "precision" and len(passed) > len(failed):  # coarse rounding shows in most cases
            message = "the result is nearly right: something is left out, or counted twice"
            finding = Finding("values", message, finding.lines, finding.place)
        if finding.property not in SHAPE_LIKE or not passed:
            return finding
        told = [finding.message, *finding.lines]
        if all(case.layout for case in failed) and any(not case.layout for case in passed):
            layout = {"rows apart": "for rows that lie apart", "transposed": "for a transposed matrix"}[case.layout]
            return Finding("strides", f"is right for contiguous tensors only, not {layout}", told, finding.place)
        right, wrong = ({case.sizes for case in cases} for cases in (passed, failed))
        right -= wrong
        volumes = [_volume(case) for case in passed]
        smaller = any(_volume(case) < min(volumes) for case in failed)
        larger = any(_volume(case) > max(volumes) for case in failed)
        if len(right) == 1 and len(wrong) >= 4 and smaller and larger and self.always_right(right):
            return Finding("one shape", f"is right for one shape only, {passed[0]}", told, finding.place)
        if finding.property != "out of bounds" and len(right) >= 3:
            for number, (name, _) in enumerate(case.sizes):
                powers = all(_is_power_of_two(sizes[number][1]) for sizes in right)
                none_wrong = not any(_is_power_of_two(sizes[number][1]) for sizes in wrong)
                if powers and none_wrong and self.always_right(right):
                    return Finding(
                        "powers of two", f"is right only where {name} is a power of two", told, finding.place
                    )
        return finding

    def always_right(self, right: set) -> bool:
        """Whether these sizes are right with other inputs, too, and not by chance."""
        smallest = sorted(map(Case, right), key=_volume)[:3]
        return not any(self.run(case, again).finding for case in smallest for again in range(1, 7))


def _smaller(case: Case) -> list[Case]:
    found = []
    for name, size in case.sizes:
        for smaller in (1, 2, size // 2, size - size // 4, size - 1):
            if 1 <= smaller < size:
                found.append(Case(tuple((n, smaller if n == name else s) for n, s in case.sizes), case.layout))
    return found


def _volume(case: Case) -> int:
    volume = 1
    for _, size in case.sizes:
        volume *= size
    return volume


def _is_power_of_two(size: int) -> bool:
    return size & (size - 1) == 0
