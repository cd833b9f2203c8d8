"""The program `fastkit`, or `python -m fastkit`."""

import gc
import os
import sys
from typing import NoReturn

from fastkit.cli import main


def run() -> NoReturn:
    """`main` as a program, which ends with its exit code."""
    code = main()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # asked here: `processes` imports torch
        from fastkit.train import processes

        processes.end(code)
    gc.freeze()  # else the last thing is a search for garbage among all that was imported: 1.1 s
    sys.exit(code)


if __name__ == "__main__":
    run()
