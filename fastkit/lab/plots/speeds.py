"""How fast against what could be: the roofline, a ladder's rungs beside the limit, predictions beside counters."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastkit.errors import FastkitError
from fastkit.kernels.common import Cost
from fastkit.lab.cards import Card
from fastkit.lab.measure import Measured
from fastkit.lab.plots.labels import place
from fastkit.lab.plots.paper import BAD, BLUE, FAINT, GOOD, GREY, INK, VERMILION, Picture, picture, sheet
from fastkit.lab.profile import beside
from fastkit.lab.roofline import Prediction, Rates, rates
from fastkit.lab.tracer import Trace

PLATE = dict(facecolor="white", edgecolor="none", pad=0.6)  # under text that crosses a line
NEAR = 0.02  # a prediction this close to the counter, relatively, has hit it

_MATRIX_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class Point:
    """A kernel on the roofline: FLOPs a byte and 1e12 FLOPs a second, measured or predicted. Made by `point`."""

    name: str
    intensity: float
    tflops: float
    measured: bool


def point(name: str, cost: Cost, time: float | Prediction) -> Point:
    """The point of a kernel of `cost` that took `time` milliseconds, or for which `time` was predicted.

    Raises FastkitError for a cost without operations or bytes, and for a time that is none.
    """
    measured = not isinstance(time, Prediction)
    ms = time if measured else time.time_ms
    if not cost.flops or not cost.bytes_moved:
        raise FastkitError(
            f"{name} has {cost.flops} FLOPs on {cost.bytes_moved} bytes, no place on a roofline: use ladder"
        )
    if ms is None or not (math.isfinite(ms) and ms > 0):
        raise FastkitError(f"{name} took {ms} ms: give a time above 0")
    return Point(name, cost.flops / cost.bytes_moved, cost.flops / ms / 1e9, measured)


@picture
def roofline(card: Card | Measured | str | None, points: Iterable[Point], source: str = "") -> Picture:
    """What a card can reach at each number of FLOPs a byte, by memory and by its units, and where kernels are.

    card    as for fastkit.lab.roofline.rates
    points  of `point`: filled where measured, hollow where predicted
    source  which card measured points come from, and whether now or recorded

    Raises FastkitError for measured points without a source.
    """
    points = list(points)
    if not source and any(one.measured for one in points):
        raise FastkitError("measured points need a source: caption(result), or 'measured now on ...'")
    roofs = _roofs(card)
    memory = next(iter(roofs.values()))
    basis = f"ceilings: {memory.card}, {_basis(roofs.values())}"
    figure, axes = sheet(
        _roofline_headline(roofs, points), 4.6, "Left of a roof's corner, memory is the limit; right of it, the units.",
        "; ".join(filter(None, (basis, source))),
    )  # fmt: skip
    low, high = _roofline_range(roofs, points)
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOPs a byte", ylabel="TFLOP/s")
    top = max(reached.tflops for reached in roofs.values())
    bottom = min([low * memory.gbps / 1e3 * 3, *(one.tflops / 3 for one in points)])
    axes.set_ylim(bottom, 3 * top)
    axes.grid()
    corner = max(reached.ridge for reached in roofs.values())
    axes.plot([low, corner], [low * memory.gbps / 1e3, corner * memory.gbps / 1e3], color="black", gid="memory")
    for label, reached in roofs.items():
        dashes = "-" if reached.unit == "tensor cores" else "--"
        axes.plot([reached.ridge, high], [reached.tflops] * 2, color="black", linestyle=dashes, gid=label)
    _label_roofs(figure, axes, roofs, high)
    at = max(low, bottom * 1e3 / memory.gbps) * 1.6
    axes.annotate(
        f"memory: {memory.gbps:,.0f} GB/s", (at, at * memory.gbps / 1e3), (-2, 6), textcoords="offset points",
        rotation=_slope(figure, axes), rotation_mode="anchor", va="bottom", fontsize=9, gid="roof",
    )  # fmt: skip
    for one in points:
        look = (
            dict(marker="o", color=BLUE) if one.measured else dict(marker="D", color=VERMILION, markerfacecolor="white")
        )
        axes.plot(one.intensity, one.tflops, linestyle="", gid=f"point {one.name}", zorder=3, **look)
    place(figure, axes, [(_point_label(one), one.intensity, one.tflops) for one in points])
    return figure


def _point_label(one: Point) -> str:
    return f"{one.name}: {one.tflops:,.3g}" + ("" if one.measured else " predicted")


def _roofs(card) -> dict[str, Rates]:
    """The ceilings of a card by their names, dtypes of the same rate as one."""
    found = {}
    for name, dtype in _MATRIX_DTYPES.items():
        try:
            reached = rates(card, dtype, tensor=True)
        except FastkitError:  # no such units, or unknown
            continue
        same = next(
            (label for label, other in found.items() if math.isclose(other.tflops, reached.tflops, rel_tol=1e-3)), None
        )
        label = f"{name} tensor cores" if same is None else same.replace(" tensor", f", {name} tensor")
        if same is not None:
            del found[same]
        found[label] = reached
    try:
        found["fp32 arithmetic"] = rates(card)
    except FastkitError:
        if not found:
            raise
    return found


def _basis(roofs: Iterable[Rates]) -> str:
    return max((reached.basis for reached in roofs), key=len)


def _roofline_headline(roofs: dict[str, Rates], points: list[Point]) -> str:
    measured = [one for one in points if one.measured] or points
    if not measured:
        label, best = max(roofs.items(), key=lambda item: item[1].tflops)
        return f"Below {best.ridge:,.0f} FLOPs a byte, memory is the limit of the {label}"
    best = max(measured, key=lambda one: one.tflops)
    memory = next(iter(roofs.values())).gbps
    above = [r for r in roofs.items() if min(r[1].tflops, best.intensity * memory / 1e3) >= 0.99 * best.tflops]
    if not above:
        return f"{best.name} is above every ceiling that is known"
    label, roof = min(above, key=lambda item: item[1].attainable_tflops(best.intensity))
    share = best.tflops / roof.attainable_tflops(best.intensity)
    limit = "memory" if best.intensity < roof.ridge else label
    verb = "is at" if best.measured else "is predicted at"
    return f"{best.name} {verb} {share:.0%} of the roof above it: {limit}"


def _roofline_range(roofs, points) -> tuple[float, float]:
    corners = [reached.ridge for reached in roofs.values()]
    at = [one.intensity for one in points]
    return min([0.1 * min(corners), *(0.4 * x for x in at)]), max([20 * max(corners), *(8 * x for x in at)])


def _label_roofs(figure, axes, roofs: dict[str, Rates], x: float) -> None:
    """Names of the ceilings at their right ends, moved up where they would cover one another."""
    figure.draw_without_rendering()  # the layout decides
    inch, above = figure.dpi, -math.inf
    for label, reached in sorted(roofs.items(), key=lambda item: item[1].tflops):
        y = axes.transData.transform((x, reached.tflops))[1] / inch * 72
        above = max(y, above + 13)
        axes.annotate(
            f"{reached.tflops:,.4g} {label}", (x, reached.tflops), (5, above - y), textcoords="offset points",
            va="center", fontsize=9, gid="roof", annotation_clip=False,
        )  # fmt: skip


def _slope(figure, axes) -> float:
    """The angle at which a line of slope 1 is drawn, degrees."""
    figure.draw_without_rendering()  # the layout decides
    (x0, y0), (x1, y1) = axes.transData.transform([(axes.get_xlim()[0],) * 2, (axes.get_xlim()[1],) * 2])
    return math.degrees(math.atan2(y1 - y0, x1 - x0))


@picture
def ladder(
    rows: Sequence[dict], source: str, rungs: Iterable = (), limit: tuple[str, float] | None = None,
    others: Collection[str] = (),
) -> Picture:  # fmt: skip
    """Each rung of a ladder by the share of the limit's speed that it reaches, others beside it.

    rows    of one operation and size, as of fastkit.lab.bench: dicts of who, median_ms, floor_ms; also of rate and unit
    source  caption(result) of a recorded result, or which card measured it now
    rungs   the ladder's RUNGS, whose ideas stand under their names; rows of others are hatched
    limit   (what it is, milliseconds): by default what the declared cost takes at the card's measured speed
    others  who else is no rung, doing something else than the limit counts or being the limit: not in the headline

    Raises FastkitError for no rows, rows of several operations, or without a limit.
    """
    rows = list(rows)
    kinds = {(row.get("op"), row.get("size"), row.get("dtype")) for row in rows}
    if len(kinds) != 1:
        raise FastkitError(f"a ladder takes rows of one operation and size, not of {len(kinds)}: choose")
    name, floor_ms = limit or (_floor_name(rows[0]), rows[0].get("floor_ms"))
    if not floor_ms or not floor_ms > 0:
        raise FastkitError(f"the limit takes {floor_ms} ms: give limit=(what it is, milliseconds above 0)")
    ideas = {rung.name: rung.idea for rung in rungs}
    others = {row["who"] for row in rows if row["who"] in others or (ideas and row["who"] not in ideas)}
    shares = [floor_ms / row["median_ms"] if row.get("median_ms") else None for row in rows]
    what = " ".join(str(part) for part in next(iter(kinds)) if part is not None)
    step = 0.62 if ideas else 0.4
    figure, axes = sheet(_ladder_headline(rows, shares, others), 0.85 + step * len(rows), what, source)
    reach = max(1.0, *(share or 0 for share in shares))
    for y, (row, share) in enumerate(zip(rows, shares, strict=True)):
        who = row["who"]
        look = {**BAD, "facecolor": FAINT} if who in others else GOOD
        axes.barh(y, share or 0, height=0.34 if ideas else 0.6, gid=f"bar {who}", **look)
        axes.text((share or 0) + 0.008 * reach, y, _bar_label(row, share), va="center", fontsize=9, bbox=PLATE)
        if ideas.get(who):
            axes.text(0.004 * reach, y + 0.21, _fits(ideas[who]), va="top", fontsize=9, color=INK, gid="idea")
    axes.axvline(1, color="black", linestyle="--", linewidth=1.2, gid="limit")
    axes.text(1, -0.62, f"{name}: {floor_ms:.4g} ms", ha="right", va="bottom", fontsize=9)
    axes.set(xlim=(0, 1.32 * reach), ylim=(len(rows) - 0.35, -0.6), xlabel="share of the limit's speed")
    ticks = np.arange(0, reach + 0.01, 0.2)
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.set_yticks(range(len(rows)), [row["who"] for row in rows])
    axes.tick_params(axis="y", length=0, labelsize=10)
    return figure


def _floor_name(row: dict) -> str:
    return {"memory": "limit, its bytes at copy speed"}.get(
        row.get("limit"), f"limit, {row.get('limit') or 'the floor'}"
    )


def _fits(idea: str) -> str:
    return idea if len(idea) <= 105 else idea[:102].rsplit(" ", 1)[0] + " …"


def _bar_label(row: dict, share: float | None) -> str:
    if share is None:
        return "unknown"
    rate = f", {row['rate']:,.0f} {row['unit']}" if row.get("rate") and row.get("unit") else ""
    return (
        f"{share:.0%}: {row['median_ms']:.4g} ms{rate}"
        if share >= 0.01
        else f"{share:.1%}: {row['median_ms']:.4g} ms{rate}"
    )


def _ladder_headline(rows, shares, others) -> str:
    ours = [(share, row) for share, row in zip(shares, rows, strict=True) if share and row["who"] not in others]
    if not ours:
        return "Every rung's time is unknown"
    share, best = max(ours, key=lambda one: one[0])
    first = ours[0][1]
    gain = first["median_ms"] / best["median_ms"]
    climbed = f", {gain:.3g} times faster than {first['who']}" if best is not first else ""
    return f"{best['who']} reaches {share:.0%} of the limit's speed{climbed}"


@picture
def compare(trace: Trace, counters: dict, source: str) -> Picture:
    """The tracer's predictions for a launch beside the hardware's counters for it.

    counters  a row of fastkit.lab.profile.profile
    source    which card counted, and whether now or recorded
    """
    rows = beside(trace, counters)
    ratios = [_ratio(row["predicted"], row["measured"]) for row in rows]
    known = [ratio for ratio in ratios if ratio is not None]
    hits = sum(abs(ratio - 1) <= NEAR for ratio in known)
    headline = f"{hits} of {len(known)} predictions are within {NEAR:.0%} of what the hardware counted"
    if not known:
        headline = "Nothing to compare: prediction or counter is unknown everywhere"
    figure, axes = sheet(headline, 0.9 + 0.32 * len(rows), f"{trace.kernel}, predicted for {trace.arch}", source)
    finite = [ratio for ratio in known if 0 < ratio < math.inf]
    reach = max([1.25, *(max(ratio, 1 / ratio) * 1.15 for ratio in finite)])
    axes.axvline(1, color="black", linewidth=1.2)
    axes.axvspan(1 - NEAR, 1 + NEAR, color=FAINT, linewidth=0)
    for y, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        axes.plot([1 / reach, reach], [y, y], color=FAINT, linewidth=0.8, zorder=0)
        for x, text in ((-0.27, row["predicted"]), (-0.04, row["measured"])):
            axes.text(x, y, _number(text), transform=axes.get_yaxis_transform(), ha="right", va="center")
        if ratio is None or not 0 < ratio < math.inf:
            axes.text(
                1 + 2 * NEAR,
                y,
                "unknown" if ratio is None else "no ratio",
                va="center",
                fontsize=9,
                color=GREY,
                bbox=PLATE,
            )
        else:
            hit = abs(ratio - 1) <= NEAR
            look = dict(marker="o", color=BLUE) if hit else dict(marker="X", color=VERMILION, markersize=9)
            axes.plot(ratio, y, linestyle="", gid=f"ratio {row['what']}", **look)
    for x, text in ((-0.27, "predicted"), (-0.04, "counted")):
        axes.text(x, -0.7, text, transform=axes.get_yaxis_transform(), ha="right", va="center", color=GREY)
    axes.set(xscale="log", xlim=(1 / reach, reach), ylim=(len(rows) - 0.4, -0.6), xlabel="counted / predicted")
    ticks = [tick for tick in (0.1, 0.25, 0.5, 0.8, 1, 1.25, 2, 4, 10) if 1 / reach <= tick <= reach]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(rows)), [row["what"].replace("_", " ") for row in rows])
    axes.tick_params(axis="y", length=0, pad=175, labelsize=10)
    for label in axes.get_yticklabels():
        label.set_horizontalalignment("right")
    axes.spines["left"].set_visible(False)
    return figure


def _ratio(predicted: float | None, measured: float | None) -> float | None:
    """measured / predicted; None if one is unknown."""
    if predicted is None or measured is None:
        return None
    if predicted == 0:
        return 1.0 if measured == 0 else math.inf
    return measured / predicted


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
