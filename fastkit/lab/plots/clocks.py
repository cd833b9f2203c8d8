"""Time: what each clock sees of a launch, how long each run took, what a size costs."""

from collections.abc import Mapping, Sequence
from statistics import median

import torch

from fastkit.errors import FastkitError
from fastkit.kernels.ladders import matmul
from fastkit.lab.plots.paper import BLUE, EMPTY, GOOD, GREY, INK, ORANGE, OTHER, VERMILION, Picture, box, picture, sheet
from fastkit.lab.plots.speeds import point, roofline
from fastkit.lab.roofline import roofline as predict

LAUNCH, RUN, BACK = 1.0, 4.0, 0.6  # of the drawing: a launch, the kernel, the answer's way back


@picture
def two_clocks() -> Picture:
    """What a stopwatch, a stopwatch that waits, and events see of one kernel: a drawing, nothing in it is measured."""
    figure, axes = sheet("The host hands the work over and goes on; what you time depends on where you look", 2.6,
                         "A drawing: time runs to the right, no length in it is measured.")  # fmt: skip
    start, ends = LAUNCH, LAUNCH + RUN
    box(axes, 0, 0, LAUNCH, 0.8, "launch", **OTHER)
    axes.text(LAUNCH / 2, -0.16, "launch", ha="center", va="bottom", fontsize=9)
    box(axes, LAUNCH, 0, RUN + BACK, 0.8, "wait", **EMPTY)
    axes.text(LAUNCH + (RUN + BACK) / 2, 0.4, "the host is free, or waits", ha="center", va="center", fontsize=9)
    box(axes, start, 1.2, RUN, 0.8, "kernel", **GOOD)
    axes.text(start + RUN / 2, 1.6, "the kernel runs", ha="center", va="center", color="white", fontsize=9)
    spans = {
        "stopwatch": (0, LAUNCH),
        "stopwatch that waits": (0, ends + BACK),
        "events": (start, ends),
    }
    for row, (name, (left, right)) in enumerate(spans.items()):
        y = 2.5 + 0.5 * row
        axes.plot([left, right], [y, y], color=BLUE, marker="|", markersize=10, linewidth=2, gid=f"span {name}")
        axes.text(right + 0.1, y, name, va="center", fontsize=9)
    axes.set(xlim=(-0.9, 8.2), ylim=(3.9, -0.5))
    axes.set_yticks([0.4, 1.6, 3.0], ["host", "GPU", "what it shows"])
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


@picture
def runs(series: Mapping[str, Sequence[float]], source: str, headline: str = "") -> Picture:
    """Every run of one or more series, in the order in which they ran, on a scale of powers of ten.

    series    microseconds by name
    source    which machine, and whether now or recorded
    headline  by default what the first series' first run took

    Raises FastkitError for a series without runs.
    """
    if empty := [name for name, times in series.items() if not times] or ([""] if not series else []):
        raise FastkitError(f"a series has no runs: {', '.join(empty) or 'there is none'}")
    first = next(iter(series.values()))
    typical = median(first)
    ratio = first[0] / typical
    words = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
    figure, axes = sheet(headline or f"The first run took {words} times the median", 2.8, caption=source)
    for (name, times), look in zip(series.items(), _looks(), strict=False):
        axes.plot(range(1, len(times) + 1), times, linestyle="", label=name, gid=f"series {name}", **look)
        axes.axhline(median(times), color=look["color"], linewidth=0.9, linestyle="--", gid=f"median {name}")
    axes.set(yscale="log", xlabel="run", ylabel="microseconds")
    axes.text(1.005, typical, "median", transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=GREY)
    if len(series) > 1:
        axes.legend(loc="upper right", fontsize=9)
    return figure


def _looks():
    yield dict(marker="o", color=BLUE, markersize=5)
    yield dict(marker="x", color=VERMILION, markersize=6)
    yield dict(marker="D", color=INK, markersize=4, markerfacecolor="white")


@picture
def sizes(
    columns: Mapping[str, Sequence[tuple[float, float]]], source: str, bytes_a_us: float | None = None
) -> Picture:
    """What each timer shows of the same work at growing sizes, both scales in powers of ten.

    columns     (MiB moved, microseconds) by the timer's name
    bytes_a_us  of a copy: a line of what the bytes alone would take

    Raises FastkitError where there is no point.
    """
    points = [point for column in columns.values() for point in column]
    if not points:
        raise FastkitError("no size was timed: give points of (MiB, microseconds)")
    low, high = (pick(x for x, _ in points) for pick in (min, max))
    figure, axes = sheet("Small work costs what a launch costs, large work what its bytes cost", 3.4, caption=source)
    styles = [dict(marker="x", color=VERMILION), dict(marker="D", color=INK), dict(marker="o", color=BLUE),
              dict(marker="s", color=GREY), dict(marker="^", color=ORANGE)]  # fmt: skip
    for (name, column), style in zip(columns.items(), styles, strict=False):
        axes.plot(*zip(*column, strict=True), label=name, linewidth=1, markersize=5, gid=f"timer {name}", **style)
    if bytes_a_us:
        line = [2**20 * x / bytes_a_us for x in (low, high)]
        axes.plot([low, high], line, color="black", linestyle="--", label="its bytes alone", gid="bytes")
    least, most = min(y for _, y in points), max(y for _, y in points)
    axes.set(xscale="log", yscale="log", ylim=(least / 2, 2 * most), xlabel="MiB moved", ylabel="microseconds")
    axes.legend(loc="upper left", fontsize=9)
    return figure


@picture
def knee(points: Sequence[tuple[float, float]], ridge: float, source: str) -> Picture:
    """Times of work whose bytes stay and whose operations grow: flat under the ceiling of memory, then a slope.

    points  (operations a byte, milliseconds)
    ridge   operations a byte from which on arithmetic is the limit, by the two ceilings
    """
    if not points:
        raise FastkitError("no intensity was timed: give points of (operations a byte, milliseconds)")
    flat = min(ms for _, ms in points)
    last = max((x for x, ms in points if ms <= 1.2 * flat), default=points[0][0])
    figure, axes = sheet(
        f"Up to {last:,.3g} operations a byte the arithmetic is free; the two ceilings meet at {ridge:,.3g}", 3.0,
        caption=source,
    )  # fmt: skip
    axes.plot(*zip(*points, strict=True), marker="o", color=BLUE, linewidth=1, gid="times")
    axes.axvline(ridge, color="black", linestyle="--", linewidth=1, gid="ridge")
    axes.text(ridge, max(ms for _, ms in points), " the ceilings meet", va="top", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="milliseconds")
    return figure


def square_product(card: str = "RTX 4090", N: int = 1024) -> Picture:
    """Where the product of two [N, N] matrices of float16 lies under a card's ceilings, as they predict it.

    card  a name of fastkit.lab.cards
    """
    cost = matmul.cost(N, N, N)
    predicted = predict(cost, card=card, dtype=torch.float16, tensor=True)
    return roofline(card, [point(f"N = {N}", cost, predicted)])
