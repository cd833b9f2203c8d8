"""What is wrong with an answer: one property that does not hold, and where that shows."""

from dataclasses import dataclass, field

# Of several things found in one run, the first of these is reported: the others may follow from it.
PROPERTIES = (
    "syntax",  # is not Python
    "signature",  # cannot be called with these arguments
    "exit",  # ended its process
    "memory",  # asked for more than there is
    "compile",  # Triton's compiler refused the kernel
    "exception",
    "out of bounds",  # read or wrote memory that is nobody's
    "dtype",  # stored numbers of another size than the tensor's
    "calls torch",  # let torch compute
    "no kernel",  # launched nothing that writes an output
    "inputs changed",
    "race",  # the result hangs on which program comes first
    "reads unwritten",  # read an output, or a tensor of its own, before anything was written there
    "returns",  # gave its result back instead of writing it, or gave back something of another kind
    "unwritten",  # left numbers of an output as they were
    "masked lanes",  # used what a masked load without `other` holds
    "values",
    "precision",  # right but for digits lost on the way
    # Seen from several runs, from outside of the process, or from compiled code:
    "strides",  # right for contiguous tensors only
    "one shape",
    "powers of two",
    "time",  # did not end
    "crash",
    "demand",  # right, but slower than need be
)


@dataclass
class Finding:
    """One property that does not hold. `place` is (file, line) of the code that did it, `finite` tells of values."""

    property: str
    message: str
    lines: list[str] = field(default_factory=list)
    place: tuple[str, int] | None = None
    finite: bool = True


class Findings(dict):
    """The first finding of each property."""

    def add(self, finding: Finding) -> None:
        self.setdefault(finding.property, finding)

    def worst(self) -> Finding | None:
        return min(self.values(), key=lambda finding: PROPERTIES.index(finding.property), default=None)
