"""The loss without the logits: its matrices a part at a time, what is alive at its peak, what a part's size costs."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence

from fastkit.errors import FastkitError
from fastkit.lab.plots.paper import (
    BAD,
    BLUE,
    EMPTY,
    FAINT,
    GOOD,
    GREY,
    INK,
    OTHER,
    TINTS,
    VERMILION,
    Picture,
    blank,
    box,
    key,
    picture,
    plural,
    sheet,
)

ROWS, HIDDEN, VOCABULARY = 8192, 4096, 32000  # Mistral-7B's, of 4 sequences of 2,048 tokens
MIB = 2**20
LETTERS = 120  # as wide as the bars of `stacks`
GAP = 2600  # between matrices, in numbers
PARTS = (*TINTS, "#C4E8D5", "#EFD0E2", "#FBF3A6", "#F4B896", "#93B9DC")  # behind black text, one after another


@picture
def logits_by_parts(step: int = 3, parts: int = 8) -> Picture:
    """Hidden states, head, logits and their gradient, to scale, while part `step` (from 1) of `parts` is at work.

    Raises FastkitError for a part that there is not.
    """
    if not 1 <= step <= parts <= ROWS:
        raise FastkitError(f"no part {step} of {parts}: give parts from 1 to {ROWS}, and a step from 1 to as many")
    rows = ROWS / parts
    here, all_of_it = (count * VOCABULARY * 2 / MIB for count in (rows, ROWS))
    headline = f"Part {step} of {parts}: {here:,.4g} MiB of logits are there, of {all_of_it:,.4g}"
    subtitle = (
        f"{ROWS:,} tokens with {HIDDEN:,} numbers each, a vocabulary of {VOCABULARY:,}, to scale. A part goes all the "
        "way: logits, loss, their gradient in their place, dhidden. Then the next takes the same buffer."
    )
    figure, axes = sheet(headline, 3.2, subtitle)
    left, right = HIDDEN + GAP, HIDDEN + 2 * GAP + VOCABULARY
    top = HIDDEN + GAP / 2
    box(axes, left, 0, VOCABULARY, HIDDEN, "weight", **OTHER)
    box(axes, left, top, VOCABULARY, ROWS, "not there", facecolor="white", edgecolor=GREY, linestyle="--")
    for part in range(1, parts + 1):
        y = top + (part - 1) * rows
        now, done = part == step, part < step
        if now:
            box(axes, left, y, VOCABULARY, rows, "logits", **BAD)
        box(axes, 0, y, HIDDEN, rows, "at work" if now else "hidden", **(BAD if now else GOOD))
        look, what = (BAD, "at work") if now else (GOOD, "dhidden") if done else (EMPTY, "to come")
        box(axes, right, y, HIDDEN, rows, what, **look)
    plate = dict(facecolor="white", edgecolor="none", pad=1.5)
    for x, y, text in (
        (left + VOCABULARY / 2, HIDDEN / 2, "weightᵀ"),
        (left + VOCABULARY / 2, top + (step - 0.5) * rows, "logits, then dlogits: one buffer"),
    ):
        axes.text(x, y, text, ha="center", va="center", fontsize=10, color=INK, bbox=plate)
    for x, text in ((HIDDEN / 2, "hidden"), (right + HIDDEN / 2, "dhidden")):
        axes.text(x, top - 500, text, ha="center", va="bottom", fontsize=10)
    axes.set(xlim=(-200, right + HIDDEN + 200), ylim=(top + ROWS + 200, -200), aspect="equal")
    axes.set_axis_off()
    key(figure, {"there": GOOD, "at work": BAD, "the head, frozen": OTHER, "not written yet": EMPTY})
    return figure


@picture
def stacks(ways: Mapping[str, Mapping[str, float]], unit: str = "GiB at the peak", caption: str = "") -> Picture:
    """What each way's whole is made of: {way: {part: amount}}, a bar of its parts one after another.

    A part has one colour in all bars, and no other part has it: up to nine of them.

    unit     of the amounts: its first word labels the axis
    caption  where the numbers come from

    Raises FastkitError for no ways, or a part of less than nothing.
    """
    if not ways or any(size < 0 for parts in ways.values() for size in parts.values()):
        raise FastkitError("give each way's parts with their amounts, from 0 up, and at least one way")
    totals = {way: sum(parts.values()) for way, parts in ways.items()}
    most, last = max(totals, key=totals.get), list(totals)[-1]
    headline = f"{most}: {totals[most]:.3g} {unit}"
    headline += f"; {last}: {totals[last]:.3g}" if last != most else ""
    reach = totals[most] or 1.0
    drawn = {way: _small(parts, totals[way], reach) for way, parts in ways.items()}
    lines = max(len(words) for words, _ in drawn.values())
    figure, axes = sheet(headline, 0.9 + (0.62 + 0.2 * max(0, lines - 1)) * len(ways), caption=caption)
    names = dict.fromkeys(name for parts in ways.values() for name in parts)
    tints = dict(zip(names, itertools.cycle(PARTS)))
    for y, (way, parts) in enumerate(ways.items()):
        x, (words, beside) = 0.0, drawn[way]
        for name, size in parts.items():
            box(axes, x, y - 0.18, size, 0.5, name, facecolor=tints[name], edgecolor=INK)
            if _holds_its_name(name, size, reach):
                axes.text(x + size / 2, y + 0.07, f"{name}\n{size:.3g}", ha="center", va="center", fontsize=9)
            x += size
        if beside:
            axes.text(x + 0.01 * reach, y + 0.07, "\n".join(words), va="center", fontsize=9, gid="small")
        else:
            axes.text(reach, y + 0.36, "\n".join(words), ha="right", va="top", fontsize=9, gid="small")
    axes.set(xlim=(0, 1.02 * reach), ylim=(len(ways) - 0.25, -0.5), xlabel=unit.split()[0])
    axes.set_yticks([y + 0.07 for y in range(len(ways))], list(ways))
    axes.tick_params(axis="y", length=0)
    return figure


def _holds_its_name(name: str, size: float, reach: float) -> bool:
    return size > 0.012 * reach * max(8, len(name))


def _small(parts: Mapping[str, float], total: float, reach: float) -> tuple[list[str], bool]:
    """(lines that name the parts too small for it, whether beside their bar, else below it)"""
    small = {name: size for name, size in parts.items() if size and not _holds_its_name(name, size, reach)}
    each = "; ".join(f"{name} {size:.2g}".replace(" ", "\N{NO-BREAK SPACE}") for name, size in small.items())
    beside = total < 0.7 * reach
    lines = textwrap.wrap(each, int(LETTERS * (1 - total / reach)) if beside else LETTERS)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines], beside


@picture
def by_part_size(
    model: Sequence[dict], measured: Sequence[dict] = (), source: str = "", chosen: int | None = None
) -> Picture:
    """Time and memory of the loss against the rows of a part; rows of {rows, ms, mib}.

    model     what the roofline and the buffer's size predict: drawn as lines
    measured  what was measured: points
    source    of the measured ones
    chosen    the library's own choice, marked

    Raises FastkitError without a model, or for measured points without a source.
    """
    if not model or (measured and not source):
        raise FastkitError("give the model's rows, and for measured ones their source")
    least = min(row["ms"] for row in measured or model)
    tight = min((measured or model), key=lambda row: row["rows"])
    headline = f"Parts of {plural(tight['rows'], 'row')} take {tight['ms'] / least:.2g} times as long as the best"
    figure = blank(headline, 3.2, "Above: time. Below: the buffer of logits. Both axes are logarithmic.", source)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, what, label in ((upper, "ms", "ms"), (lower, "mib", "MiB")):
        axes.plot([row["rows"] for row in model], [row[what] for row in model], color=VERMILION, gid=f"model {what}")
        if measured:
            points = [row["rows"] for row in measured], [row[what] for row in measured]
            axes.plot(*points, linestyle="", marker="o", color=BLUE, gid=f"measured {what}")
        if chosen:
            axes.axvline(chosen, color=FAINT, linewidth=6, zorder=0, gid="chosen")
        axes.set(xscale="log", yscale="log", ylabel=label)
        axes.grid()
        values = [row[what] for row in (*model, *measured)]
        ticks = _ticks(values)
        axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.set_ylim(0.9 * ticks[0], 1.4 * max(values))
    sizes = sorted({row["rows"] for row in model})
    lower.set_xticks(sizes, [f"{size:,}" for size in sizes])
    lower.set_xticks([], minor=True)
    lower.set_xlabel("rows of a part")
    meanings = {"the model": dict(color=VERMILION)}
    meanings |= {"measured": dict(color=BLUE, marker="o", linestyle="")} if measured else {}
    meanings |= {"the library's choice": dict(color=FAINT, linewidth=6)} if chosen else {}
    handles = [upper.plot([], [], label=label, **look)[0] for label, look in meanings.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    return figure


def _ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten, from below the least of `values` to above the greatest."""
    every = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]
    below = max(tick for tick in every if tick <= min(values))
    return [tick for tick in every if below <= tick <= 1.2 * max(values)]
