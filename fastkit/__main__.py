"""`python -m fastkit` is the command `fastkit`."""

import sys

from fastkit.cli import main

sys.exit(main())
