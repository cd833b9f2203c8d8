"""What happens when: the stages of a pipelined loop, and a card's clocks, temperature and power."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastkit.errors import FastkitError
from fastkit.lab.monitor import NO_THROTTLE
from fastkit.lab.plots.paper import (
    BAD,
    BLUE,
    GOOD,
    INK,
    OTHER,
    Picture,
    blank,
    box,
    key,
    picture,
    plural,
    sheet,
    unknown,
)

MOST_ITERATIONS = 64


@dataclass(frozen=True)
class Slot:
    """When one iteration's tile is loaded and used."""

    load_start: float
    load_end: float
    compute_start: float
    compute_end: float


def schedule(load: float, compute: float, stages: int, iterations: int) -> list[Slot]:
    """A model of a loop that Triton pipelined with `num_stages`: when each iteration's tile is loaded and used.

    With 1 stage a tile is loaded when the one before it has been used. With more, `stages - 1` loads start at once;
    from then on the next one starts when a tile's turn to be used comes, since that frees a buffer. Loads in flight do
    not slow each other: `load` is latency, and bandwidth is taken to be enough. An iteration then takes
    max(compute, load / (stages - 1)).
    """
    slots = []
    for number in range(iterations):
        ahead = number - max(1, stages - 1)
        if ahead < 0:
            load_start = 0.0
        else:
            load_start = slots[ahead].compute_end if stages == 1 else slots[ahead].compute_start
        ready = load_start + load
        compute_start = max(ready, slots[-1].compute_end) if slots else ready
        slots.append(Slot(load_start, ready, compute_start, compute_start + compute))
    return slots


@picture
def pipeline(
    load: float, compute: float, stages: int | Sequence[int] = (1, 2, 3, 4), iterations: int = 8, unit: str = "ns"
) -> Picture:
    """The loop of a matmul, say, with 1 to 4 stages: loads in flight, arithmetic, and the gaps where it waits.

    A model (see `schedule`), no measurement: `load` is the latency of a tile's load, `compute` the time of its
    arithmetic, both in `unit`. Raises FastkitError for times or counts that make no schedule.
    """
    stages = (stages,) if isinstance(stages, int) else tuple(stages)
    if not (math.isfinite(load) and math.isfinite(compute) and load > 0 and compute > 0):
        raise FastkitError(f"load {load} and compute {compute} must be times above 0")
    if not stages or min(stages) < 1 or max(stages) > 16 or not 1 <= iterations <= MOST_ITERATIONS:
        raise FastkitError(
            f"stages {stages}, iterations {iterations}: give 1 to 16 stages, 1 to {MOST_ITERATIONS} turns"
        )
    found = {count: schedule(load, compute, count, iterations) for count in stages}
    ends = {count: slots[-1].compute_end for count, slots in found.items()}
    subtitle = (
        f"A model, not a measurement: a tile's load takes {load:g} {unit}, its arithmetic {compute:g} {unit}; "
        f"{plural(iterations, 'turn')} of the loop. Loads in flight do not slow one another."
    )
    heights = [max(1, count - 1) + 1 for count in stages]
    figure, axes = sheet(
        _pipeline_headline(ends, load, compute, iterations), 0.9 + 0.12 * len(stages) + 0.24 * sum(heights), subtitle
    )
    longest, top = max(ends.values()), 0.0
    for count, height in zip(stages, heights, strict=True):
        _draw_stages(axes, top, count, found[count], longest)
        top += height + 0.5
    key(figure, {"a tile's load": OTHER, "its arithmetic": GOOD, "the arithmetic waits": BAD})
    axes.set(xlim=(-0.004 * longest, 1.16 * longest), ylim=(top, -0.1), xlabel=f"time, {unit}")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    return figure


def _pipeline_headline(ends: dict[int, float], load: float, compute: float, iterations: int) -> str:
    first, last = min(ends), max(ends)
    if first == last:
        return f"{plural(first, 'stage')}: {iterations * compute / ends[first]:.0%} of the time is arithmetic"
    hides = 1 + math.ceil(load / compute)  # stages from which on compute > load / (stages - 1)
    gain = f"{last} stages take {ends[first] / ends[last]:.2f} times less time than {first}"
    return f"{gain}; from {max(2, hides)} on, loads are hidden once the loop runs"


def _draw_stages(axes, top, stages, slots, longest):
    rows = max(1, stages - 1)
    for number, slot in enumerate(slots):
        y = top + number % rows
        _bar(axes, slot.load_start, y, slot.load_end, "load", OTHER, number, longest)
        _bar(axes, slot.compute_start, top + rows, slot.compute_end, "compute", GOOD, number, longest)
        free = slots[number - 1].compute_end if number else 0.0
        if slot.compute_start > free:
            _bar(axes, free, top + rows, slot.compute_start, "wait", BAD, None, longest)
    end = slots[-1].compute_end
    busy = sum(slot.compute_end - slot.compute_start for slot in slots) / end
    axes.text(-0.012 * longest, top + (rows + 1) / 2, f"{stages} stage{'s' * (stages > 1)}", ha="right", va="center")
    axes.text(
        end + 0.01 * longest,
        top + rows + 0.45,
        f"{end:{',.0f' if end >= 1000 else '.4g'}}: {busy:.0%} busy",
        va="center",
        fontsize=9,
    )


def _bar(axes, start, y, end, gid, look, number, longest):
    box(axes, start, y + 0.05, end - start, 0.82, gid, **look)
    if number is not None and (end - start) / longest > 0.022:
        dark = look is GOOD
        axes.text(
            (start + end) / 2, y + 0.48, str(number), ha="center", va="center", fontsize=9,
            color="white" if dark else "black",
            bbox=None if dark else dict(facecolor=look["facecolor"], edgecolor="none", pad=0.5),
        )  # fmt: skip


@picture
def throttling(samples: list[dict], source: str) -> Picture:
    """A card's clock, temperature and power while something ran, and when what held the clock back.

    samples  of fastkit.lab.monitor.Monitor: dicts of t_s, sm_mhz, temperature_c, power_w, reasons
    source   which card, and whether now or recorded
    """
    if not samples:
        return unknown("Clocks, temperature and power", "there are no samples, nothing was watched", caption=source)
    time = np.array([sample["t_s"] for sample in samples], dtype=float)
    spans = {reason: _spans(samples, reason) for reason in _reasons(samples)}
    figure = blank(_throttling_headline(samples, spans), 4.2 + 0.22 * len(spans), caption=source)
    grid = figure.subplots(4, 1, sharex=True, height_ratios=[3, 2, 2, 0.35 + 0.45 * max(1, len(spans))])
    quantities = (("sm_mhz", "SM clock", "MHz"), ("temperature_c", "temperature", "°C"), ("power_w", "power", "W"))
    for axes, (name, words, unit) in zip(grid, quantities, strict=False):
        values = np.array([np.nan if sample.get(name) is None else sample[name] for sample in samples], dtype=float)
        axes.set_ylabel(f"{words}\n{unit}")
        if np.isnan(values).all():
            axes.text(0.01, 0.5, "unknown: this card does not tell", transform=axes.transAxes, va="center")
            axes.set_yticks([])
            continue
        axes.plot(time, values, color=BLUE, marker="o" if len(time) < 40 else "", markersize=4, gid=name)
        axes.margins(y=0.2)
        axes.grid(axis="y")
    _draw_reasons(grid[3], samples, spans, time)
    grid[3].set_xlabel("time since the start, s")
    return figure


def _reasons(samples) -> list[str]:
    seen = (reason for sample in samples for reason in sample.get("reasons") or ())
    return [reason for reason in dict.fromkeys(seen) if reason not in NO_THROTTLE]


def _spans(samples, reason) -> list[tuple[float, float]]:
    """(start, length) of the times in which `reason` was seen; a sample stands for the time until the next."""
    times = [sample["t_s"] for sample in samples]
    step = (times[-1] - times[0]) / max(1, len(times) - 1) or 1.0
    ends = [*times[1:], times[-1] + step]
    spans = []  # [start, end]
    for start, end, sample in zip(times, ends, samples, strict=True):
        if reason in (sample.get("reasons") or ()):
            if spans and spans[-1][1] == start:
                spans[-1][1] = end
            else:
                spans.append([start, end])
    return [(start, end - start) for start, end in spans]


def _throttling_headline(samples, spans) -> str:
    clocks = [sample["sm_mhz"] for sample in samples if sample.get("sm_mhz") is not None]
    ran = f"The clock ran at {min(clocks):,.0f} to {max(clocks):,.0f} MHz" if clocks else "The clock is unknown"
    if all(sample.get("reasons") is None for sample in samples):
        return f"{ran}; what held it back is unknown"
    return f"{ran}, held back by {', '.join(spans)}" if spans else f"{ran}, held back by nothing"


def _draw_reasons(axes, samples, spans, time):
    axes.set_ylabel("held\nback by")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if not spans:
        known = any(sample.get("reasons") is not None for sample in samples)
        axes.set_yticks([])
        axes.text(0.01, 0.5, "nothing" if known else "unknown", transform=axes.transAxes, va="center", color=INK)
        return
    looks = (BAD, OTHER, {**GOOD, "hatch": "...."})
    for row, (reason, held) in enumerate(spans.items()):
        axes.broken_barh(held, (row + 0.1, 0.8), **{**looks[row % len(looks)], "edgecolor": "black"}, gid=reason)
    axes.set_yticks([row + 0.5 for row in range(len(spans))], list(spans))
    axes.set_ylim(len(spans), 0)
    axes.tick_params(axis="y", labelcolor=INK)
