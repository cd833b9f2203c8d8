"""Helper processes that stay: one without Triton's interpreter, to compile for any card; one with it, to trace.

Triton decides at its import whether kernels are compiled or interpreted, so no process can do both. A helper starts
with its first task (importing torch and Triton takes seconds), answers later ones at once, and ends with this process.
"""

import atexit
import os
import pickle
import queue
import subprocess
import sys
import threading
import time

from fastkit.errors import FastkitError
from fastkit.lab.sources import child_environment

TIME_LIMIT_S = 120  # of a task


class Worker:
    """A process that runs functions of fastkit.lab by their names."""

    def __init__(self, interpret: bool):
        self.interpret = interpret
        self.process = None
        self.started = 0.0
        self.one_at_a_time = threading.Lock()

    def start(self) -> None:
        """Start the process, if it does not run; it gets ready while this one goes on."""
        if self.process and self.process.poll() is None:
            return
        # unsloth, once imported, has Triton leave out the lines that accesses are found by
        settings = {"CUDA_VISIBLE_DEVICES": "", "TRITON_DISABLE_LINE_INFO": "0"}
        environment = child_environment(TRITON_INTERPRET=str(int(self.interpret)), **settings)
        environment.setdefault("OMP_NUM_THREADS", "1")
        self.started = time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastkit.lab.worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.answers, self.errors = queue.Queue(), []
        threading.Thread(target=_read_answers, args=(self.process.stdout, self.answers), daemon=True).start()
        threading.Thread(target=_read_text, args=(self.process.stderr, self.errors), daemon=True).start()

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def ask(self, task: str, *args, newer_than: float = 0.0):
        """The result of `task` ("module:function" of fastkit.lab) on picklable `args`.

        newer_than  a process that started before this time is replaced: it may have imported a file's old text

        Raises what the task raises, and FastkitError where the process dies or takes more than TIME_LIMIT_S.
        """
        with self.one_at_a_time:
            return self._ask(task, args, newer_than)

    def _ask(self, task: str, args: tuple, newer_than: float):
        if self.process and self.started < newer_than:
            self.stop()
        self.start()
        try:
            pickle.dump((task, args), self.process.stdin)
            self.process.stdin.flush()
            answer = self.answers.get(timeout=TIME_LIMIT_S)
        except queue.Empty:
            self.stop()
            raise FastkitError(
                f"{task} took more than {TIME_LIMIT_S} s: trace fewer programs or a smaller case"
            ) from None
        except BrokenPipeError:
            answer = None
        if answer is None:
            code = self.process.wait()
            told = "".join(self.errors).strip().splitlines()
            self.stop()
            raise FastkitError(
                f"{task} ended its process (exit code {code}): {told[-1] if told else 'nothing was said'}"
            )
        right, value = answer
        if not right:
            raise value
        return value


def _read_answers(stream, answers) -> None:
    try:
        while True:
            answers.put(pickle.load(stream))
    except (EOFError, OSError, ValueError, pickle.UnpicklingError):
        answers.put(None)


def _read_text(stream, lines) -> None:
    for line in stream:
        lines.append(line.decode(errors="replace"))
        del lines[:-50]


COMPILER = Worker(interpret=False)
INTERPRETER = Worker(interpret=True)
atexit.register(COMPILER.stop)
atexit.register(INTERPRETER.stop)


def main() -> None:
    """Answer tasks from standard input until it ends. What a task prints goes to standard error."""
    import importlib

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            task, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        module, function = task.split(":")
        try:
            answer = True, getattr(importlib.import_module(f"fastkit.lab.{module}"), function)(*args)
            pickle.dumps(answer)
        except Exception as error:
            answer = False, error if isinstance(error, FastkitError) else FastkitError(told(error))
        pickle.dump(answer, answers)
        answers.flush()


def told(error: Exception) -> str:
    """The error in one line: of the wrappings that Triton's compiler puts around it, the innermost."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


if __name__ == "__main__":
    main()
