"""Run an answer in a process of its own, with limits, and say how that ended."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastkit.errors import FastkitError
from fastkit.lab.exercises.exercise import ANSWER
from fastkit.lab.exercises.verdict import Verdict
from fastkit.lab.sources import Source, child_environment

IMPORTS_S = 60  # what torch and Triton may take to be imported, before the answer's own time begins
INSIDE = "FASTKIT_INSIDE_CHECK"
DIED = {
    "SIGSEGV": "it touched memory that is not its own (segmentation fault)",
    "SIGKILL": "it was killed, most likely because the machine ran out of memory",
    "SIGABRT": "it aborted",
}

# Of 3.3 s that it takes to import and end, 1.2 are a search for garbage, of which there is none.
START = "import gc; gc.disable(); from fastkit.lab.exercises.child import run; run()"


class Child:
    """An answer running: on the CPU in Triton's interpreter, or compiled on the GPU."""

    def __init__(self, exercise: str, source: Source, device: str, seconds: float, seed: int):
        self.exercise, self.source, self.device, self.seconds, self.seed = exercise, source, device, seconds, seed
        self.folder = tempfile.TemporaryDirectory(prefix="fastkit-check-")
        request = {
            "exercise": exercise,
            "text": source.text,
            "entry_name": source.entry_name,
            "device": device,
            "seconds": seconds,
            "seed": seed,
        }
        self.path("request.json").write_text(json.dumps(request))
        settings = {"TRITON_INTERPRET": "0", INSIDE: "1"}
        if device == "cpu":
            settings |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.began, self.ended = time.monotonic(), False
        with self.path("printed").open("wb") as printed, self.path("errors").open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, self.folder.name],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=errors,
                env=child_environment(**settings),
                start_new_session=True,
            )

    def path(self, name: str) -> Path:
        return Path(self.folder.name, name)

    def text(self, name: str) -> str:
        return self.path(name).read_text(errors="replace")

    def verdict(self) -> Verdict:
        """Wait for the end and judge. The process and all that it started are gone afterwards."""
        try:
            self.process.wait(self.seconds + IMPORTS_S)
            self.end()
            return self.judge()
        except subprocess.TimeoutExpired:
            raise FastkitError(
                f"the answer's process was not ready after {IMPORTS_S} s: the machine is busy, check again"
            ) from None
        finally:
            self.end()
            self.folder.cleanup()

    def end(self) -> None:
        if self.ended:  # its number may belong to another process by now
            return
        self.ended = True
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # the answer may have started processes of its own
        except (AttributeError, ProcessLookupError, PermissionError):
            self.process.kill()
        self.process.wait()

    def judge(self) -> Verdict:
        lane = "compiled for the GPU" if self.device == "cuda" else "interpreted on the CPU"
        verdict = Verdict(self.exercise, False, seed=self.seed, lane=lane, printed=self.text("printed")[-2000:])
        verdict.seconds = time.monotonic() - self.began
        if self.path("outcome.json").is_file():
            outcome = json.loads(self.text("outcome.json"))
            verdict.case, verdict.left_out = outcome["case"], outcome["left_out"]
            verdict.right, verdict.wrong = outcome["passed"], outcome["failed"]
            if outcome["finding"] is None:
                verdict.passed = True
                return verdict
            finding = outcome["finding"]
            verdict.property, verdict.message = finding["property"], finding["message"]
            verdict.lines = finding["lines"]
            if finding["place"]:
                verdict.where = self.where(*finding["place"])
            return verdict
        errors, code = self.text("errors"), self.process.returncode
        if "Timeout (" in errors:
            verdict.property = "time"
            verdict.message = f"has not ended after {self.seconds:g} s: a loop without end, or far too slow"
        elif self.path("failed").exists():
            raise RuntimeError(f"the checker itself failed:\n{errors}")
        elif code < 0:
            verdict.property = "crash"
            name = signal.Signals(-code).name
            verdict.message = f"{DIED.get(name, 'it was killed')} [{name}]"
        else:
            verdict.property, verdict.message = "exit", f"ended the process, with exit code {code}"
        frames = re.findall(rf'File "{re.escape(ANSWER)}", line (\d+)', errors)
        if frames:
            verdict.where = self.where(ANSWER, int(frames[0]))
        return verdict

    def where(self, file: str, line: int) -> str:
        if file == ANSWER:
            return self.source.where(line)
        import linecache

        return f"{Path(file).name} line {line}: {linecache.getline(file, line).strip()}"
