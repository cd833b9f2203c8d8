"""Timing: what it does in which order and what it makes of the times, on a clock of our own; real times on a GPU."""

import itertools
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from fastkit.errors import FastkitError
from fastkit.lab import timing
from fastkit.lab.timing import Timing, compare, judge, median_ms, time_ms


class Clock:
    """A GPU whose work takes the time that we say, and a host that takes half of it."""

    def __init__(self):
        self.ms, self.log = 0.0, []

    def work(self, name, *ms):
        durations = itertools.cycle(ms)

        def run():
            self.log.append(name)
            self.ms += next(durations)

        return run

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.ms)
        event.elapsed_time = lambda end: end.at - event.at
        return event


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()

    class ColdCache:
        us = 10.0

        def make(self, passes, wait_us):
            clock.log += [f"wait {wait_us:.0f}"] * bool(wait_us) + [f"cold {passes}"]
            clock.ms += (passes * self.us + wait_us) / 1e3

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(timing, "_ColdCache", ColdCache)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.ms / 2e3)
    return clock


def test_a_steady_function(clock):
    found = time_ms(clock.work("f", 2.0))
    assert found.median_ms == found.p20_ms == found.p80_ms == pytest.approx(2)
    assert found.noise_ms == pytest.approx(0, abs=1e-9) and found.launch_us == pytest.approx(1000)
    assert found.runs == 2 * int(50 / (2.0 + 2.0))  # half of 100 ms a series, before each twice the host's millisecond
    assert median_ms(clock.work("f", 0.5)) == pytest.approx(0.5)


def test_the_spread(clock):
    found = time_ms(clock.work("f", 1.0, 1.0, 2.0, 2.0, 6.0, 6.0))
    assert 1 <= found.p20_ms < found.median_ms < found.p80_ms <= 6


def test_noise_is_what_identical_series_differ_by(clock):
    steady = itertools.count()

    def drifting():  # every second run is slower: the two series alternate, so they differ by it
        clock.ms += 1.0 + 0.2 * (next(steady) % 2)

    assert time_ms(drifting).noise_ms == pytest.approx(0.2)


def test_the_cache_is_made_cold_before_each_run_and_longer_than_the_host_takes(clock):
    time_ms(clock.work("f", 0.098))  # the host: 49 us, twice which takes 9.8 passes of 10 us
    last = clock.log[-20:]
    assert last[::2] == ["cold 10"] * 10 and last[1::2] == ["f"] * 10


def test_a_long_head_start_is_a_wait_and_not_many_launches(clock):
    time_ms(clock.work("f", 2.0))  # the host: 1,000 us, twice which is more than 50 passes of 10 us
    assert clock.log[-6:] == ["wait 1500", "cold 50", "f"] * 2
    time_ms(clock.work("g", 500.0))
    assert clock.log[-6:] == ["wait 99500", "cold 50", "g"] * 2  # a tenth of a second, no longer


def test_inputs_rotate_alike_in_both_series(clock):
    found = time_ms([clock.work("a", 1.0), clock.work("b", 3.0)])
    runs = [name for name in clock.log if not name.startswith(("cold", "wait"))]
    assert runs[-8:] in (["a", "a", "b", "b"] * 2, ["b", "b", "a", "a"] * 2)
    assert found.noise_ms == pytest.approx(0, abs=1e-9) and found.p20_ms == 1 and found.p80_ms == 3


def test_contenders_take_turns(clock):
    rows = compare({"ours": clock.work("ours", 1.0), "theirs": clock.work("theirs", 1.5)})
    assert [row["who"] for row in rows] == ["ours", "theirs"]
    assert rows[0]["verdict"] == "fastest" and rows[1]["verdict"] == "1.50 times the fastest"
    runs = [name for name in clock.log if not name.startswith(("cold", "wait"))]
    first = len(runs) - sum(row["runs"] for row in rows)
    for some in (runs[first : first + 20], runs[-20:]):
        counted = Counter(some)
        assert counted["ours"] >= counted["theirs"] >= 6


def test_a_slow_contender_runs_few_times_and_all_along(clock):
    rows = compare({"fast": clock.work("fast", 0.1), "slow": clock.work("slow", 500.0)})
    assert rows[1]["runs"] == 6 and rows[0]["runs"] > 100
    due = [turn for turn in range(250) if timing._is_due(turn, 3, 250)]
    assert len(due) == 3 and due[0] < 90 and due[-1] > 160


def test_it_is_compiled_and_warmed_before(clock):
    times = iter([1000.0])  # the first call compiles
    found = time_ms(lambda: setattr(clock, "ms", clock.ms + next(times, 1.0)))
    assert found.p80_ms == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("theirs", "noise", "verdict"),
    [
        (1.02, 0.03, "as fast, within noise"),
        (1.02, 0.01, "1.02 times the fastest"),
        (1.0004, 0, "as fast, within noise"),
    ],
)
def test_less_than_the_noise_is_noise(theirs, noise, verdict):
    rows = judge({"ours": Timing(1, 1, 1, 9, 0, 5), "theirs": Timing(theirs, 1, 2, 9, noise, 5)})
    assert [row["verdict"] for row in rows] == ["fastest", verdict]
    assert rows[1]["times_fastest"] == pytest.approx(theirs)


def test_errors(clock):
    with pytest.raises(FastkitError, match="empty list of functions"):
        time_ms([])
    with pytest.raises(FastkitError, match="no contenders"):
        compare({})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu():
    for call in (lambda: time_ms(print), lambda: compare({"ours": print}), timing.launch_overhead_us):
        with pytest.raises(FastkitError, match="needs a GPU: show the recorded result"):
            call()


@pytest.mark.gpu
class TestOnTheGpu:
    @pytest.fixture
    def copies(self):
        x = [torch.randn(2**22, device="cuda") for _ in range(3)]
        y = torch.empty_like(x[0])
        return [lambda one=one: y.copy_(one) for one in x], x, y

    def check(self, found):
        assert 0 < found.p20_ms <= found.median_ms <= found.p80_ms < 1e3
        assert found.runs >= 6 and found.noise_ms >= 0 and found.launch_us > 0

    def test_rotation(self, copies):
        functions, x, y = copies
        self.check(time_ms(functions))
        assert any(torch.equal(y, one) for one in x)

    def test_a_graph(self, copies):
        functions, x, y = copies
        y.zero_()
        found = time_ms(functions, graphed=True)
        self.check(found)
        assert torch.equal(y, x[-1])  # the graph ends with the last of them

    def test_compare(self, copies):
        functions, _, _ = copies
        rows = compare({"one": functions[0], "the same": functions[1]})
        assert {row["who"] for row in rows} == {"one", "the same"} and "fastest" in {row["verdict"] for row in rows}

    def test_a_host_that_takes_long_is_not_timed(self, copies):
        functions, _, _ = copies

        def slowly():
            functions[0]()
            time.sleep(0.05)
            functions[0]()

        assert median_ms(slowly) < 25  # two copies of 16 MiB, not the host's 50 ms

    def test_a_launch(self):
        assert timing.launch_overhead_us() > 0
        self.check(time_ms(timing.empty_launch()))
