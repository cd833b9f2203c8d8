"""Where tests' random inputs come from."""

import os
import random


def drawn() -> int:
    """A seed drawn anew, or the one that FASTKIT_TEST_SEED brings back."""
    return int(os.environ.get("FASTKIT_TEST_SEED", random.SystemRandom().randrange(2**31)))
