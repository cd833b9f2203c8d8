"""What check() returns: whether the answer is right and, if not, which property does not hold and where."""

import html
from dataclasses import dataclass, field

SHOWN = 6  # cases in a line


@dataclass
class Verdict:
    """True if the answer is right. `property` is the one that does not hold, `case` the smallest that shows it.

    Where there is no answer yet there is no property either. `right` is empty where no cases are tried.
    """

    exercise: str
    passed: bool
    property: str = ""
    message: str = ""
    lines: list[str] = field(default_factory=list)
    case: str | None = None
    where: str = ""  # file, line and code
    right: list[str] = field(default_factory=list)  # cases
    wrong: list[str] = field(default_factory=list)
    left_out: int = 0
    printed: str = ""
    seed: int = 0
    seconds: float = 0.0
    lane: str = ""

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return "\n".join([self._head(), *(f"  {line}" for line in self._body())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        color = "#2e7d32" if self.passed else "#c62828"
        body = html.escape("\n".join(self._body()))
        return (
            f"<div style='border-left: 4px solid {color}; padding-left: 0.8em'><b>{html.escape(self._head())}</b>"
            f"<pre style='margin: 0.3em 0 0; white-space: pre-wrap'>{body}</pre></div>"
        )

    def _head(self) -> str:
        if self.passed:
            return f"{self.exercise}: right"
        return ", ".join(filter(None, (self.exercise, self.property))) + f": {self.message}"

    def _body(self) -> list[str]:
        if not self.passed and not self.property:
            return []
        if self.passed and not self.right:
            return self.lines
        if self.passed:
            left_out = f"; {self.left_out} larger ones left out for want of time" if self.left_out else ""
            return [f"{len(self.right)} cases, {self.lane}, {self.seconds:.1f} s{left_out}", *self.lines]
        body = [f"smallest failing case: {self.case}"] if self.case else []
        body += self.lines
        body += [self.where] if self.where else []
        body += [f"right: {_some(self.right)}"] if self.right else []
        body += [f"wrong: {_some(self.wrong)}"] if len(self.wrong) > 1 else []
        body += [f"printed: {line}" for line in self.printed.splitlines()[-5:]]
        again = f"; the same cases again: check(..., seed={self.seed})" if self.case else ""
        return [*body, f'try hint("{self.exercise}"){again}']


def _some(cases: list[str]) -> str:
    sizes = {}  # a size once, whatever the layouts
    for case in cases:
        sizes.setdefault(case, None)
    listed = list(sizes)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return "; ".join(listed[:SHOWN]) + more
