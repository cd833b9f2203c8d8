"""`python -m fastkit` is the command `fastkit`."""

import os
import sys

from fastkit.cli import main

if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # asked here: `processes` imports torch
    from fastkit.train import processes

    processes.end(main())
sys.exit(main())
