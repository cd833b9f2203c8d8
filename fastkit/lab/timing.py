"""Time a kernel on the GPU."""

import torch

from fastkit.errors import FastkitError


def median_ms(function, warmup_ms: int = 25, repeat_ms: int = 100) -> float:
    """Median milliseconds of `function` by device events, the L2 cache flushed before each run.

    Raises FastkitError without a GPU: a CPU's time says nothing of a kernel.
    """
    if not torch.cuda.is_available():
        raise FastkitError("timing a kernel needs a GPU: show the recorded result instead (fastkit.lab.results)")
    from triton.testing import do_bench

    return do_bench(function, warmup=warmup_ms, rep=repeat_ms, return_mode="median")
