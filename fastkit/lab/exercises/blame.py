"""Whose code a place is in, and what an exception says of the answer that it came out of. Works without Triton."""

import importlib.util
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path

from fastkit.lab.exercises.finding import Finding

_SPECS = filter(None, map(importlib.util.find_spec, ("triton", "torch", "numpy")))
_FILES = (os.__file__, *(spec.origin for spec in _SPECS), __file__)  # of Python's library, theirs, and ours
GENERATED = "<frozen", "<string>"  # the latter, say, a dataclass's __init__, as the interpreter's tensors have
NOT_THEIRS = (*(str(Path(file).parent) + os.sep for file in _FILES), *GENERATED)


def theirs(file: str) -> bool:
    """Whether code in `file` is the learner's, not Python's, Triton's, torch's, numpy's or ours."""
    return not file.startswith(NOT_THEIRS)


def place_of(frame) -> tuple[str, int] | None:
    """(file, line) of the learner's code that `frame` is in, or was called from."""
    while frame is not None and not theirs(frame.f_code.co_filename):
        frame = frame.f_back
    return frame and (frame.f_code.co_filename, frame.f_lineno)


def uncallable(answer: Callable, arguments: list, signature: str) -> Finding | None:
    """The finding on an answer that does not take `arguments`, those of `signature`."""
    try:
        inspect.signature(answer).bind(*arguments)
    except TypeError:
        return Finding("signature", f"call it as {signature}: yours takes {inspect.signature(answer)}")
    return None


def raised(error: BaseException) -> Finding:
    """What an exception says of the answer that it came out of."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    if isinstance(root, SystemExit):
        return Finding("exit", f"ended the process: sys.exit({root.code!r})", [], _raised_at(root))
    text = str(root).strip().splitlines() or [""]
    if isinstance(root, SyntaxError):
        return Finding("syntax", f"is not Python: {root.msg}", [], (root.filename, root.lineno))
    if type(error).__name__ == "CompilationError":
        return Finding("compile", "Triton cannot compile the kernel", str(error).strip().splitlines()[-3:])
    if "illegal memory access" in text[0]:
        return Finding("crash", "it touched memory that is not its own, and the GPU stopped it")
    if isinstance(root, MemoryError) or "allocate memory" in text[0] or "out of memory" in text[0]:
        bytes_asked = re.search(r"allocate (\d+) bytes", text[0])
        how_much = f"{int(bytes_asked[1]):,} bytes" if bytes_asked else text[0]
        return Finding("memory", f"asks for more memory than it may have: {how_much}", [], _raised_at(root))
    if isinstance(root, RecursionError):
        text = ["it calls itself without end"]
    return Finding("exception", f"raised {type(root).__name__}: {text[0]}", [], _raised_at(root))


def _raised_at(error: BaseException) -> tuple[str, int] | None:
    place, traceback = None, error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if theirs(file):
            place = (file, traceback.tb_lineno)
        traceback = traceback.tb_next
    return place
