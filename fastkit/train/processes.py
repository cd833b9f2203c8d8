"""The processes of one run that torchrun started: which is the first, what all wait for, what all hold together.

    torchrun --nproc-per-node 2 -m fastkit finetune ...

Every process runs the same program on its own GPU. The first alone writes, shows and warns; an error in any of them
ends it, and torchrun then ends the others. Without torchrun there is one process, and all of this does nothing.
"""

import atexit
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from fastkit.errors import FastkitError

T = TypeVar("T")

SECONDS_TO_SAY = 30  # others outlive a failing first by this or until torchrun ends them: it ends all once one is gone


def count() -> int:
    """How many processes this run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def number() -> int:
    """Which of them this is, from 0 on."""
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    return number() == 0


def device_of(device: str) -> str:
    """`device` as this process takes it: of several on GPUs, each has its own.

    Raises FastkitError for one numbered GPU for all.
    """
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if count() == 1 or not on_gpu:
        return device
    if ":" in device:
        raise FastkitError(f"--device {device} would put {count()} processes on one GPU: use cuda or auto")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def join(device: torch.device) -> None:
    """Connect with the other processes, through NCCL on GPUs and gloo on the CPU; silence all but the first.

    A process that is not the first loses its standard output, its warnings and its progress bars for good: they would
    say what the first says.
    """
    if count() == 1:
        return
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu")
    if not is_first():
        import datasets
        from transformers.utils import logging

        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  as long as the process lives
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        datasets.disable_progress_bars()


def leave() -> None:
    """Disconnect, where all is done, and hold no trainer and no model any more: gloo's threads end with the last owner
    of a group, such as a model under DDP."""
    if dist.is_initialized():
        gc.collect()  # models and trainers are cycles
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """Exit with `code`. One of several processes leaves the destructors of C++ out: now and then one of gloo's threads
    is left to them, and they abort a process that has done all its work (pytorch 179291, 190489), and torchrun then
    ends the others and says that all failed."""
    if count() == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait() -> None:
    """Return once every process has come here."""
    if count() > 1:
        dist.barrier()


def told_by_first(value):
    """The first process's `value`, in all of them."""
    if count() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def by_first(function: Callable[[], T]) -> T:
    """function(), which the first process alone calls, in all; if it raises there, the others end without a word."""
    if count() == 1:
        return function()
    value = done = None
    try:
        if is_first():
            value, done = function(), True
    finally:
        value, done = told_by_first((value, done))
    if not done:
        time.sleep(SECONDS_TO_SAY)
        sys.exit(2)
    return value


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over all processes."""
    if count() > 1:
        dist.all_reduce(x := x.clone())
    return x
