"""Time functions on the GPU: device events around each run, a cold L2 cache, two identical series to know the noise."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastkit.errors import FastkitError

EVENT_RESOLUTION_MS = 0.0005  # CUDA's documentation of cudaEventElapsedTime
AMD_CACHE_MIB = 256  # MI300X's Infinity Cache, behind the L2 that the driver reports
MAX_RUNS = 500  # of one series
HEAD_START = 2.0  # times the host's part of a run that the GPU is kept busy before it
MOST_PASSES = 50  # over the cache; more of a head start is a wait: the host gets no more than 1,024 launches ahead
LONGEST_HEAD_START_US = 1e5  # of a function that waits for the GPU itself, none is long enough

Functions = Callable | Sequence[Callable]


@dataclass(frozen=True)
class Timing:
    """What timing one function gave.

    median_ms, p20_ms, p80_ms  of all runs, by device events around the function alone
    runs                       in two interleaved series
    noise_ms                   difference of the medians of the two series, which ran the very same
    launch_us                  the host's time for one call, GPU not waited for: what a call costs where no GPU work
                               hides it
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    runs: int
    noise_ms: float
    launch_us: float


def time_ms(functions: Functions, warmup_ms: float = 25, repeat_ms: float = 100, graphed: bool = False) -> Timing:
    """Time a function, or several in turn that do the same on other inputs (rotation), on the current device.

    Before each run a buffer of twice the L2 cache is zeroed, as often as the host needs to get ahead of the GPU (which,
    if that is long, waits besides), so that inputs come from memory and no launch is waited for. `graphed` replays a
    CUDA graph of many copies and divides: for kernels of a few microseconds; caches are then warm.

    Raises FastkitError without a GPU: a CPU's time says nothing of a kernel.
    """
    return _series({"it": functions}, warmup_ms, repeat_ms, graphed)["it"]


def median_ms(functions: Functions, warmup_ms: float = 25, repeat_ms: float = 100) -> float:
    """The median of `time_ms`."""
    return time_ms(functions, warmup_ms, repeat_ms).median_ms


def compare(
    contenders: dict[str, Functions], warmup_ms: float = 25, repeat_ms: float = 100, graphed: bool = False
) -> list[dict]:
    """Time contenders that do the same, in turn, so that they share the card's drift; a row each, as in `judge`."""
    if not contenders:
        raise FastkitError("compare got no contenders: give a dict such as {'ours': function, 'torch': function}")
    return judge(_series(contenders, warmup_ms, repeat_ms, graphed))


def judge(timings: dict[str, Timing]) -> list[dict]:
    """Rows of {who, the fields of Timing, times_fastest, verdict}.

    A difference from the fastest that is no greater than what identical series differ by, of either, or than the
    resolution of events, is called noise.
    """
    fastest = min(timings.values(), key=lambda timing: timing.median_ms)
    rows = []
    for who, timing in timings.items():
        ratio = timing.median_ms / fastest.median_ms if fastest.median_ms else math.inf
        if timing is fastest:
            verdict = "fastest"
        elif timing.median_ms - fastest.median_ms <= max(timing.noise_ms, fastest.noise_ms, EVENT_RESOLUTION_MS):
            verdict = "as fast, within noise"
        else:
            verdict = f"{ratio:.2f} times the fastest"
        rows.append({"who": who, **vars(timing), "times_fastest": ratio, "verdict": verdict})
    return rows


def empty_launch() -> Callable[[], None]:
    """A function that launches an empty Triton kernel, compiled already. Raises FastkitError without GPU or Triton."""
    _need_gpu()
    try:
        import triton  # not before it is needed: notebooks choose the interpreter first
    except ImportError as error:
        raise FastkitError(f"launching needs Triton, which cannot be imported ({error}): pip install triton") from error

    @triton.jit
    def empty(x_ptr):
        pass

    x = torch.empty(1, device="cuda")

    def launch():
        empty[(1,)](x)

    launch()
    torch.cuda.synchronize()
    return launch


def launch_overhead_us(launches: int = 500) -> float:
    """The host's microseconds for one launch of an empty Triton kernel, launched back to back."""
    launch = empty_launch()
    return min(_host_us(launch, launches) for _ in range(3))  # anything above the least is the machine's other work


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise FastkitError("timing a kernel needs a GPU: show the recorded result instead (fastkit.lab.results)")


def _series(contenders: dict[str, Functions], warmup_ms, repeat_ms, graphed) -> dict[str, Timing]:
    """Two series of runs of each contender, all interleaved."""
    _need_gpu()
    cold = _ColdCache()
    prepared = {who: _Contender(functions, cold, graphed) for who, functions in contenders.items()}
    for contender in prepared.values():
        contender.warm_up(warmup_ms)
    most = max(contender.runs_in(repeat_ms) for contender in prepared.values())
    for turn in range(most):
        for contender in prepared.values():
            if _is_due(turn, contender.runs_in(repeat_ms), most):
                for series in contender.series:
                    contender.run(series)
    torch.cuda.synchronize()
    return {who: contender.timing() for who, contender in prepared.items()}


def _is_due(turn: int, runs: int, turns: int) -> bool:
    """Whether one of `runs` runs, spread evenly over `turns` turns, falls on this one."""
    return turn * runs // turns != (turn + 1) * runs // turns


class _ColdCache:
    """Zeroes twice the L2 cache, which drives out what was there; before it, the GPU may be told to wait."""

    def __init__(self):
        cache = torch.cuda.get_device_properties(None).L2_cache_size
        if torch.version.hip:
            cache = max(cache, AMD_CACHE_MIB * 2**20)
        self.buffer = torch.empty(2 * cache, dtype=torch.int8, device="cuda")
        self.buffer.zero_()
        self.us = 1e3 * _event_ms(self.buffer.zero_, 20)
        torch.cuda._sleep(1)  # loads it
        self.cycles_per_us = 1e6 / (1e3 * _event_ms(lambda: torch.cuda._sleep(10**6), 1))

    def make(self, passes: int, wait_us: float) -> None:
        if wait_us:
            torch.cuda._sleep(int(wait_us * self.cycles_per_us))  # a kernel that watches the clock
        for _ in range(passes):
            self.buffer.zero_()


class _Contender:
    """One function, or several in turn, with the events of its runs."""

    def __init__(self, functions: Functions, cold: _ColdCache, graphed: bool):
        self.functions = [functions] if callable(functions) else list(functions)
        if not self.functions:
            raise FastkitError("got an empty list of functions to time: give at least one")
        self.copies, self.graph = 1, None
        self.series = ([], [])
        self.cold = cold
        for function in self.functions:  # compiles, tunes
            function()
        torch.cuda.synchronize()
        self.ms = _event_ms(self.call, 1)
        if graphed:
            self._capture()
            self.ms = _event_ms(self.call, 1)
        calls = max(1, min(20, int(20 / max(self.ms, 1e-3))))
        self.launch_us = _host_us(self.call, calls)
        host_us = _host_us(self._between_events, calls)  # events too take their time, which an empty kernel does not
        head_start = min(HEAD_START * host_us, LONGEST_HEAD_START_US)
        self.passes = max(1, min(MOST_PASSES, math.ceil(head_start / max(cold.us, 1.0))))
        self.wait_us = max(0.0, head_start - self.passes * cold.us)

    def _capture(self) -> None:
        """A graph of about a millisecond, every function in it as often as any other."""
        turns = max(1, min(100, round(1 / max(self.ms, 1e-3))) // len(self.functions))
        self.copies = turns * len(self.functions)
        stream = torch.cuda.Stream()  # a capture wants a run on a side stream before it
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for function in self.functions:
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(turns):
                for function in self.functions:
                    function()
        self.graph = graph

    def call(self, turn: int = 0) -> None:
        if self.graph:
            self.graph.replay()
        else:
            self.functions[turn % len(self.functions)]()

    def warm_up(self, warmup_ms: float) -> None:
        for turn in range(max(1, min(MAX_RUNS, int(warmup_ms / max(self.ms, 1e-3))))):
            self.call(turn)
        torch.cuda.synchronize()

    def runs_in(self, repeat_ms: float) -> int:
        """Runs of one series, in half of `repeat_ms`; at least 3."""
        head_start_ms = (self.passes * self.cold.us + self.wait_us) / 1e3
        return max(3, min(MAX_RUNS, int(repeat_ms / 2 / (self.ms + head_start_ms))))

    def run(self, series: list) -> None:
        series.append(self._between_events(len(series), self.passes, self.wait_us))  # both series rotate alike

    def _between_events(self, turn: int = 0, passes: int = 0, wait_us: float = 0.0) -> tuple:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cold.make(passes, wait_us)
        start.record()
        self.call(turn)
        end.record()
        return start, end

    def timing(self) -> Timing:
        halves = [
            torch.tensor([start.elapsed_time(end) / self.copies for start, end in series], dtype=torch.float64)
            for series in self.series
        ]
        runs = torch.cat(halves)
        median, p20, p80 = runs.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
        noise = abs(halves[0].quantile(0.5) - halves[1].quantile(0.5)).item()
        return Timing(median, p20, p80, len(runs), noise, self.launch_us / self.copies)


def _event_ms(call: Callable[[], object], calls: int) -> float:
    """Milliseconds a call, of `calls` in a row, by device events: an estimate."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def _host_us(call: Callable[[], object], calls: int) -> float:
    """Microseconds that the host spends on a call, of `calls` in a row, the GPU not waited for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * spent / calls
