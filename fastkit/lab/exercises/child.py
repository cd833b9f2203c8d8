"""The process that an answer runs in: reads request.json in its folder, writes outcome.json.

A crash is seen from outside, by the exit code and the traceback that faulthandler leaves.
"""

import dataclasses
import faulthandler
import gc
import json
import os
import sys
import threading
from pathlib import Path

MEMORY = 4 * 2**30  # bytes that an answer may take on a CPU, over what torch and Triton take
PRINTED = 16 * 2**20  # bytes that it may print
TRIALS = 0.3  # of the time limit; what has not ended by the limit hangs


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    faulthandler.enable()
    import torch

    from fastkit.lab.exercises.blame import raised
    from fastkit.lab.exercises.catalog import find
    from fastkit.lab.exercises.examine import Outcome, examine
    from fastkit.lab.exercises.exercise import ANSWER
    from fastkit.lab.exercises.function import Function
    from fastkit.lab.sources import read

    exercise = find(request["exercise"])
    if not isinstance(exercise, Function):
        import fastkit.lab.exercises.trial  # noqa: F401  Triton, which is not the answer's to import
    gc.enable()
    torch.set_num_threads(1)
    if request["device"] == "cpu":
        _limit()
    done = _limit_time(request["seconds"], folder)
    try:
        answer = read(request["text"], request["entry_name"]).load(ANSWER)
    except BaseException as error:
        outcome = Outcome(raised(error))
        outcome.finding.lines.append("this was when the answer was defined, not when it ran")
    else:
        outcome = examine(exercise, answer, request["seed"], TRIALS * request["seconds"], request["device"])
    done.set()
    _write(outcome, folder)


def _write(outcome, folder: Path) -> None:
    result = {
        "finding": outcome.finding and dataclasses.asdict(outcome.finding),
        "case": outcome.case and str(outcome.case),
        "passed": list(map(str, outcome.passed)),
        "failed": list(map(str, outcome.failed)),
        "left_out": outcome.left_out,
    }
    (folder / "outcome.json").write_text(json.dumps(result))


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    pages = Path("/proc/self/statm")
    if pages.is_file():
        taken = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (PRINTED, PRINTED))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: float, folder: Path) -> threading.Event:
    """End the process after `seconds`, saying where it was, unless the event is set before."""
    from fastkit.lab.exercises.blame import place_of
    from fastkit.lab.exercises.examine import Outcome
    from fastkit.lab.exercises.finding import Finding

    done, main_thread = threading.Event(), threading.get_ident()

    def wait():
        if done.wait(seconds):
            return
        message = f"has not ended after {seconds:g} s: a loop without end, or far too slow"
        _write(Outcome(Finding("time", message, [], place_of(sys._current_frames()[main_thread]))), folder)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    faulthandler.dump_traceback_later(seconds + 2, exit=True)  # where no other thread gets a turn
    return done


def run() -> None:
    """The process, which begins without Python's search for garbage: see `process.START`."""
    folder = Path(sys.argv[1])
    try:
        main(folder)
    except Exception:
        (folder / "failed").touch()  # it is the checker that failed, not the answer
        raise
    finally:
        gc.freeze()
