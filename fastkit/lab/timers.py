"""The course's timers, the ladder of an honest clock: one signature, one idea more a rung.

stopwatch  the host's clock around each call; on a GPU a call only hands the work over, so this times the handing over
waiting    waits for the GPU before it looks at the clock, at both ends
warmed     runs once before it counts: the first run compiles, allocates, fills caches
by_events  the GPU's own clock, by events that it records around the work: the way back to the host is outside of it,
           and so is the launch, if the GPU is busy until the work arrives
cold       clears the caches before each run, as the step of a real program does; that keeps the GPU busy as well

All return microseconds, one number a run. `fastkit.lab.timing` does all this, interleaves two series to know the noise,
and keeps the GPU busy as long as the host needs to hand a run over. Without a GPU a call has done its work when it
returns, so the host's clock is the right one, and waiting costs nothing.
"""

import time
from collections.abc import Callable

import torch

HOST_CACHE_MIB = 32  # cleared twice over where there is no GPU: more than most desktop CPUs have


def stopwatch(call: Callable[[], object], runs: int = 20) -> list[float]:
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        found.append(1e6 * (time.perf_counter() - start))
    return found


def waiting(call: Callable[[], object], runs: int = 20) -> list[float]:
    found = []
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        call()
        wait()
        found.append(1e6 * (time.perf_counter() - start))
    return found


def warmed(call: Callable[[], object], runs: int = 20) -> list[float]:
    call()
    found = []
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        call()
        wait()
        found.append(1e6 * (time.perf_counter() - start))
    return found


def by_events(call: Callable[[], object], runs: int = 20) -> list[float]:
    call()
    found = []
    for _ in range(runs):
        wait()
        start = mark()
        call()
        end = mark()
        wait()
        found.append(between_us(start, end))
    return found


def cold(call: Callable[[], object], runs: int = 20) -> list[float]:
    call()
    sweep = sweeper()
    found = []
    for _ in range(runs):
        sweep()
        start = mark()
        call()
        end = mark()
        wait()
        found.append(between_us(start, end))
    return found


TIMERS = {timer.__name__: timer for timer in (stopwatch, waiting, warmed, by_events, cold)}


def wait() -> None:
    """Until the GPU has done all that it was handed; nothing without one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def mark():
    """A point in the GPU's queue of work; without a GPU, now."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_us(start, end) -> float:
    """Microseconds from one mark to another, once both have passed."""
    return 1e6 * (end - start) if isinstance(start, float) else 1e3 * start.elapsed_time(end)


def sweeper() -> Callable[[], object]:
    """A function that zeroes twice the size of the last cache, which drives out what was there."""
    if torch.cuda.is_available():
        size, device = torch.cuda.get_device_properties(None).L2_cache_size, "cuda"
    else:
        size, device = HOST_CACHE_MIB * 2**20, "cpu"
    return torch.empty(2 * size, dtype=torch.int8, device=device).zero_
