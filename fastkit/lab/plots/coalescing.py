"""Coalescing: the request of a warp whose lanes stand a stride apart, and what records of a size cost."""

import math
from collections.abc import Sequence

import numpy as np

from fastkit.errors import FastkitError
from fastkit.lab.layouts import LANES, Traffic, traffic
from fastkit.lab.plots.memory import lanes_and_sectors
from fastkit.lab.plots.paper import BLUE, INK, Picture, picture, sheet
from fastkit.lab.tracer import Access

NEAR = 0.20  # the model is called right where it is no further off, relatively


def request_of(stride: int, number_bytes: int = 4, first_byte: int = 0) -> Traffic:
    """What one request moves: 32 lanes, each of which wants a number, `stride` numbers after the lane before.

    first_byte  where lane 0's number begins, counted from a line of 128 bytes

    Raises FastkitError for numbers that no lane moves, or that begin between two of them.
    """
    lanes = _lanes(stride, number_bytes, first_byte)
    return traffic(lanes[None], number_bytes, np.ones((1, LANES), dtype=bool))


@picture
def strided_request(stride: int, number_bytes: int = 4, first_byte: int = 0) -> Picture:
    """The request of `request_of`: which lane's number lies in which sector of which line."""
    lanes = _lanes(stride, number_bytes, first_byte)
    moved = request_of(stride, number_bytes, first_byte)
    apart = f"of numbers {stride} apart" if stride else "of one number by all lanes"
    where = f", the first at byte {first_byte}" if first_byte else ""
    return lanes_and_sectors(
        Access(
            "load", apart + where, "", 0, "", 8 * number_bytes, (LANES,), "", "ld.global", 8 * number_bytes, False,
            requests=1, sectors=moved.sectors, lines=moved.lines, bytes_asked=moved.bytes_asked, lanes=lanes,
        )
    )  # fmt: skip


def _lanes(stride: int, number_bytes: int, first_byte: int) -> np.ndarray:
    if number_bytes not in (1, 2, 4, 8, 16):
        raise FastkitError(f"a lane moves 1, 2, 4, 8 or 16 bytes with one instruction, not {number_bytes}")
    if stride < 0 or first_byte < 0 or first_byte % number_bytes:
        raise FastkitError(
            f"stride {stride}, first byte {first_byte}: give numbers from 0 up, the byte a multiple of {number_bytes}"
        )
    return first_byte + np.arange(LANES, dtype=np.int64) * stride * number_bytes


@picture
def record_times(rows: Sequence[dict], source: str) -> Picture:
    """What an update of one number a record takes, by the size of the record, beside what its sectors must take.

    rows    dicts of fields (numbers in a record), ms and least_ms, the time of the sectors that have to move
    source  which card measured it, and whether now or recorded

    Raises FastkitError for no rows.
    """
    if not rows:
        raise FastkitError("there are no rows: measure records of some sizes")
    rows = sorted(rows, key=lambda row: row["fields"])
    far = max(abs(row["ms"] / row["least_ms"] - 1) for row in rows)
    percent = f"{math.ceil(round(100 * far, 6))}%"
    headline = (
        f"The sectors that must move tell the time of every record size to within {percent}"
        if far <= NEAR
        else f"The sectors that must move miss the time of a record size by up to {percent}"
    )
    figure, axes = sheet(
        headline, 3.4, "One weight of each record is updated in place; the rest of it is idle.", source
    )
    at = np.arange(len(rows))
    axes.plot(at, [row["least_ms"] for row in rows], color="black", linestyle="--", gid="model")
    axes.plot(at, [row["ms"] for row in rows], color=BLUE, marker="o", linestyle="", gid="measured")
    for x, row in zip(at, rows, strict=True):
        axes.annotate(
            f"{row['ms']:.3g} ms", (x, row["ms"]), (0, 8), textcoords="offset points", ha="center", fontsize=9
        )
    last = rows[-1]
    axes.annotate(
        "the model: its sectors, at the speed of a copy", (at[-1], last["least_ms"]), (0, -16),
        textcoords="offset points", ha="right", fontsize=9, color=INK,
    )  # fmt: skip
    axes.set(xlabel="bytes of a record", ylabel="ms", ylim=(0, 1.25 * max(row["ms"] for row in rows)))
    axes.set_xticks(at, [f"{4 * row['fields']}" for row in rows])
    axes.margins(x=0.08)
    axes.grid(axis="y")
    return figure
