"""The course's timers: each adds what it says to the one before; the pictures of time; the polynomial's ladder."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_plots import check, drawn, says
from tolerance import assert_as_close_as_torch

from fastkit.errors import FastkitError
from fastkit.kernels.ladders import horner as ladder
from fastkit.kernels.ladders.horner import horner
from fastkit.lab import timers
from fastkit.lab.plots import clocks
from fastkit.lab.tracer import trace_launches

SOURCE = "measured now on a card of the test"
RUNGS = [rung.name for rung in ladder.RUNGS]


@pytest.fixture
def events(monkeypatch):
    """What a timer does, in order; its clock stands still but for the call, which takes a second."""
    log, clock = [], [0.0]
    monkeypatch.setattr(timers, "wait", lambda: log.append("wait"))
    monkeypatch.setattr(timers, "sweeper", lambda: lambda: log.append("sweep"))
    monkeypatch.setattr(timers.time, "perf_counter", lambda: [log.append("look"), clock[0]][1])
    monkeypatch.setattr(timers, "mark", lambda: [log.append("mark"), clock[0]][1])

    def call():
        log.append("call")
        clock[0] += 1.0

    return log, call


@pytest.mark.parametrize(
    ("name", "first", "each"),
    [
        ("stopwatch", "", "look call look"),
        ("waiting", "", "wait look call wait look"),
        ("warmed", "call", "wait look call wait look"),
        ("by_events", "call", "wait mark call mark wait"),
        ("cold", "call", "sweep mark call mark wait"),
    ],
)
def test_what_each_timer_does(name, first, each, events):
    log, call = events
    assert timers.TIMERS[name](call, runs=3) == [1e6] * 3
    assert log == [*first.split(), *(3 * each.split())]


@pytest.mark.parametrize("timer", timers.TIMERS.values(), ids=timers.TIMERS)
def test_timers_run_here(timer, device):
    x = torch.randn(1000, device=device)
    found = timer(lambda: x.sum(), runs=4)
    assert len(found) == 4 and all(math.isfinite(us) and us > 0 for us in found)


def test_the_cache_is_cleared_twice_over():
    sweep = timers.sweeper()
    size = torch.cuda.get_device_properties(None).L2_cache_size if torch.cuda.is_available() else 32 * 2**20
    assert sweep.__self__.numel() == 2 * size


# --- pictures


def gids(figure) -> set[str]:
    return {line.get_gid() for axes in figure.axes for line in axes.lines}


def test_two_clocks():
    figure = clocks.two_clocks()
    check(figure)
    assert drawn(figure).keys() >= {"launch", "kernel", "wait"}
    spans = {line.get_gid(): line.get_xdata() for line in figure.axes[0].lines}
    (kernel,) = [patch for patch in figure.axes[0].patches if patch.get_gid() == "kernel"]
    assert list(spans["span events"]) == [kernel.get_x(), kernel.get_x() + kernel.get_width()]
    assert spans["span stopwatch"][1] <= kernel.get_x() and spans["span stopwatch that waits"][1] > kernel.get_x()


def test_runs():
    figure = clocks.runs({"torch": [900.0, 10.0, 11.0, 10.0], "ours": [5.0, 5.0, 6.0, 5.0]}, SOURCE)
    check(figure)
    assert figure.headline == "The first run took 85.7 times the median" and says(figure, SOURCE)
    assert gids(figure) == {"series torch", "median torch", "series ours", "median ours"}
    check(clocks.runs({"torch": [1e6, 10.0, 10.0]}, SOURCE))
    assert clocks.runs({"torch": [1e6, 10.0, 10.0]}, SOURCE).headline.startswith("The first run took 100,000 times")
    for nothing in ({}, {"torch": []}):
        with pytest.raises(FastkitError, match="a series has no runs"):
            clocks.runs(nothing, SOURCE)


def test_sizes():
    columns = {"stopwatch": [(0.5, 8.0), (512.0, 8.0)], "events": [(0.5, 2.0), (512.0, 180.0)]}
    figure = clocks.sizes(columns, SOURCE, bytes_a_us=3e6)
    check(figure)
    (line,) = [line for line in figure.axes[0].lines if line.get_gid() == "bytes"]
    assert list(line.get_ydata()) == [2**19 / 3e6, 2**29 / 3e6]
    assert gids(clocks.sizes(columns, SOURCE)) == {"timer stopwatch", "timer events"}
    with pytest.raises(FastkitError, match="no size was timed"):
        clocks.sizes({}, SOURCE)


def test_knee():
    figure = clocks.knee([(1, 0.18), (16, 0.2), (64, 0.7)], 22.2, SOURCE)
    check(figure)
    assert figure.headline.startswith("Up to 16 operations a byte the arithmetic is free")
    with pytest.raises(FastkitError, match="no intensity was timed"):
        clocks.knee([], 22.2, SOURCE)


@pytest.mark.parametrize(("N", "limit"), [(64, "memory"), (4096, "tensor cores")])
def test_square_product(N, limit):
    figure = clocks.square_product("RTX 4090", N)
    check(figure)
    assert limit in figure.headline


# --- the polynomial


@pytest.mark.usefixtures("poisoned", "fresh_seed")
@pytest.mark.parametrize("name", RUNGS)
@given(n=st.integers(0, 9000), degree=st.integers(0, 9))
def test_horner(name, dtype, device, n, degree):
    x = (2 * torch.rand(n, device=device) - 1).to(dtype)
    truth = sum((x.double() ** power for power in range(degree + 1)), torch.zeros_like(x, dtype=torch.float64))
    in_torch = torch.ones_like(x)
    for _ in range(degree):
        in_torch = (in_torch.float() * x.float() + 1.0).to(dtype)
    assert_as_close_as_torch(horner(x, degree, name), in_torch, truth)


def test_only_the_stepwise_rung_moves_more_with_the_degree():
    x, y = torch.empty(4096), torch.empty(4096)

    def moved(launch, degree):
        traces = trace_launches(lambda: launch(x, degree, y), arch="sm_89")
        return sum(trace.bytes_moved("load") + trace.bytes_moved("store") for trace in traces)

    assert moved(ladder.launch_fused, 3) == moved(ladder.launch_fused, 30) == ladder.cost(4096, 3).bytes_moved
    assert moved(ladder.launch_stepwise, 3) == 4096 * 4 * (1 + 3 * 3)


def test_what_horner_refuses():
    with pytest.raises(ValueError, match="degree is -1; give 0 or more"):
        horner(torch.ones(3), -1)
    with pytest.raises(ValueError, match=r"pass x\.contiguous"):
        horner(torch.ones(4, 4).T, 2)
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        horner(torch.ones(3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="there is no rung 'fast'; take one of stepwise, fused"):
        horner(torch.ones(3), 2, "fast")
