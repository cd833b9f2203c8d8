"""One request of a warp: to global memory, by lanes and sectors; to shared memory, by lanes and banks."""

import numpy as np
from matplotlib.patches import Polygon

from fastkit.lab.bank_conflicts import SharedAccess
from fastkit.lab.layouts import BANKS, LANES, LINE, SECTOR, WORD, traffic
from fastkit.lab.plots.paper import (
    BAD,
    BLUE,
    EMPTY,
    FAINT,
    GOOD,
    GREY,
    INK,
    OFF,
    Picture,
    about,
    box,
    key,
    picture,
    plural,
    sheet,
    unknown,
)
from fastkit.lab.tracer import Access

LINES_SHOWN = 8  # whole; where more are touched, only their touched sectors are drawn
MATRIX_WIDTH = 4  # bytes of one row of an 8x8 matrix that a lane holds after ldmatrix


@picture
def lanes_and_sectors(access: Access) -> Picture:
    """Which lane's bytes lie in which sector (32 bytes) of which line (128), in the access's first request.

    Memory is drawn from left to right, without the lines that nobody asks for; where more than 8 lines are touched,
    without the sectors that nobody asks for.
    """
    if access.lanes is None:
        why = access.unknown or "no lane asks: the copy engine (TMA) moves the tile, or the mask stops every lane"
        return unknown("Lanes and sectors", why, about(access))
    width = max(access.vector_bits or access.bits, access.bits) // 8
    active = access.lanes >= 0
    cost = traffic(access.lanes[None], width, active[None])
    strip = _Strip(access.lanes[active], width)
    moved = SECTOR * cost.sectors
    share = cost.bytes_asked / moved
    s = "s" if active.sum() == 1 else ""
    headline = (
        f"{plural(int(active.sum()), 'lane')} want{s} {plural(cost.bytes_asked, 'byte')} and move{s} "
        f"{plural(cost.sectors, 'sector')}, {plural(moved, 'byte')}: "
        + ("all of it is wanted" if share == 1 else f"{_percent(share)} of it is wanted")
    )
    figure, axes = sheet(headline, 2.9, _of_the_launch(access, width))
    _draw_lanes(axes, access, width, strip)
    _draw_memory(axes, strip, access.lanes[active], width)
    meanings = {"wanted": GOOD}
    meanings |= {"moved, not wanted": BAD} if share < 1 else {}
    meanings |= {"not moved": EMPTY} if strip.unit == LINE and cost.sectors * SECTOR < len(strip.starts) * LINE else {}
    meanings |= {} if active.all() else {"lane that takes no part": OFF}
    key(figure, meanings)
    axes.set(xlim=(-0.01 * strip.length, 1.01 * strip.length), ylim=(-0.42, 2.45))
    axes.set_axis_off()
    return figure


class _Strip:
    """Memory as it is drawn: the touched lines or sectors (`unit` bytes each) in order, with gaps where some lack."""

    def __init__(self, offsets, width):
        lines, sectors = (_touched(offsets, width, unit) for unit in (LINE, SECTOR))
        self.unit = LINE if len(lines) <= LINES_SHOWN else SECTOR
        self.sectors = sectors
        self.starts = lines * LINE if self.unit == LINE else sectors * SECTOR
        self.breaks = np.diff(self.starts, prepend=self.starts[0] - self.unit) != self.unit
        gap = 0.2 * self.unit
        self.at = np.arange(len(self.starts)) * self.unit + np.cumsum(self.breaks) * gap
        self.length = self.at[-1] + self.unit

    def x(self, offsets):
        """Where bytes are drawn, given their offsets."""
        number = np.searchsorted(self.starts, offsets, side="right") - 1
        return self.at[number] + offsets - self.starts[number]


def _touched(offsets, width, unit):
    return np.unique((offsets[:, None] + np.arange(width)) // unit)


def _of_the_launch(access: Access, width: int) -> str:
    vector = width * 8 // access.bits
    each = f"{vector} numbers, {width} bytes" if vector > 1 else f"one number of {plural(width, 'byte')}"
    lines = [about(access), f"Drawn: its first request. A lane moves {each}, with one {access.instruction}."]
    if access.sectors_per_request is None:
        lines.append("The whole launch: sectors a request unknown.")
    else:
        lines.append(
            f"The whole launch: {access.sectors_per_request:.4g} sectors a request; "
            f"{_percent(access.efficiency)} of the bytes that move are wanted."
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _draw_lanes(axes, access, width, strip):
    step = strip.length / LANES
    vector = max(1, width * 8 // access.bits)
    for lane, offset in enumerate(access.lanes):
        left, top = lane * step, 2.0
        look = GOOD if offset >= 0 else OFF
        box(axes, left, top, step, 0.28, "lane" if offset >= 0 else "masked lane", **look)
        for part in range(1, vector):
            axes.plot([left + part * step / vector] * 2, [top, top + 0.08], color="white", linewidth=0.8)
        axes.text(
            left + step / 2, top + 0.15, str(lane), ha="center", va="center", fontsize=9,
            color="white" if offset >= 0 else INK,
        )  # fmt: skip
        if offset >= 0:
            low, high = strip.x(offset), strip.x(offset + width - 1) + 1
            corners = [(left + 0.1 * step, top), (left + 0.9 * step, top), (high, 0.42), (low, 0.42)]
            axes.add_patch(Polygon(corners, facecolor=BLUE, edgecolor=BLUE, alpha=0.25, linewidth=0.6))
    axes.text(0, 2.32, "lanes of the warp", va="bottom", fontsize=9, color=INK)


def _draw_memory(axes, strip, offsets, width):
    moved = set((strip.sectors * SECTOR).tolist())
    for start, at in zip(strip.starts, strip.at, strict=True):
        for sector in range(0, strip.unit, SECTOR):
            touched = start + sector in moved
            look = BAD if touched else EMPTY
            box(axes, at + sector, 0, SECTOR, 0.42, "touched sector" if touched else "sector", **look)
    least = 0.0016 * strip.length  # a pixel or two, however narrow bytes become
    for offset in np.unique(offsets):
        # a lane's bytes may end in a line that is drawn elsewhere
        for start in range(offset // SECTOR * SECTOR, offset + width, SECTOR):
            low, high = max(start, offset), min(start + SECTOR, offset + width)
            box(axes, strip.x(low), 0, max(high - low, least), 0.42, "wanted", **{**GOOD, "linewidth": 0.4})
    for at in strip.at:
        for sector in range(0, strip.unit, SECTOR):
            box(axes, at + sector, 0, SECTOR, 0.42, "edge", facecolor="none", edgecolor="black", linewidth=1.0)
        if strip.unit == LINE:
            box(axes, at, 0, LINE, 0.42, "line", facecolor="none", edgecolor="black", linewidth=2.4)
    shown = range(0, len(strip.starts), -(-len(strip.starts) // 10))
    for number in shown:
        axes.text(strip.at[number], -0.04, f"{strip.starts[number]:,}", va="top", fontsize=9, color=INK)
    for at in strip.at[1:][strip.breaks[1:]]:
        axes.text(at - 0.1 * strip.unit, 0.21, "//" if strip.unit == LINE else "", ha="center", va="center", color=GREY)
    left_out = "; gaps: bytes that no lane wants are left out" if strip.breaks[1:].any() else ""
    what = "lines of 128 bytes, each 4 sectors" if strip.unit == LINE else "touched sectors only, of 32 bytes"
    axes.text(0, -0.2, f"byte in the argument; memory drawn as {what}{left_out}", va="top", fontsize=9, color=INK)


@picture
def bank_map(access: SharedAccess) -> Picture:
    """Which lane wants which bank of shared memory, turn by turn, in the access's first request.

    A column is a bank, a row a turn (wavefront), a cell a word and the lane that wants it. Lanes of 8 bytes take their
    turns in two groups of 16 (A, B), lanes of 16 bytes in four of 8 (A to D); every turn after a group's first is a
    conflict.
    """
    if access.offsets is None:
        return unknown("Bank conflicts", access.unknown, about(access))
    matrix = access.instruction in ("ldmatrix", "stmatrix")
    width = max(access.bits, access.vector_bits or 0) // 8 if not matrix else MATRIX_WIDTH
    groups = served(access.offsets, width)
    taken, least = sum(len(group) for group in groups), len(groups)
    lanes = plural(int((access.offsets >= 0).sum()), "lane")
    if taken == least:
        headline = f"No conflicts: {lanes} in {plural(taken, 'turn')}"
    else:
        headline = f"{plural(taken - least, 'conflict')}: {lanes} in {plural(taken, 'turn')}, where {least} would do"
    figure, axes = sheet(headline, 0.65 + 0.165 * (taken + 0.5 * (least - 1)), _of_the_access(access, width, matrix))
    y, middles, names = 0.0, [], []
    for number, group in enumerate(groups):
        for turn, words in enumerate(group):
            for bank in range(BANKS):
                _draw_word(axes, bank, y, words.get(bank, ()), turn)
            middles.append(y + 0.5)
            names.append(f"{turn + 1}" if least == 1 else f"{'ABCD'[number]}{turn + 1}")
            y += 1
        y += 0.5
    axes.set(xlim=(0, BANKS), ylim=(y - 0.5, 0), ylabel="turn", xlabel="bank")
    axes.set_xticks(np.arange(BANKS) + 0.5, range(BANKS))
    axes.set_yticks(middles, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def served(offsets: np.ndarray, width: int) -> list[list[dict[int, list[int]]]]:
    """The turns of each group of lanes: for each turn {bank: the lanes that it serves}.

    offsets  int64 [32]: the first byte that each lane wants, -1 if none
    width    bytes that a lane wants
    """
    size = min(LANES, LANES * WORD // width)
    groups = []
    for first in range(0, LANES, size):
        waiting = {}  # bank -> {word: lanes}
        for lane in range(first, first + size):
            if offsets[lane] >= 0:
                for word in range(offsets[lane] // WORD, (offsets[lane] + width - 1) // WORD + 1):
                    waiting.setdefault(word % BANKS, {}).setdefault(word, []).append(lane)
        count = max((len(words) for words in waiting.values()), default=0)
        turns = [{} for _ in range(count)]
        for bank, words in waiting.items():
            for turn, word in enumerate(sorted(words)):
                turns[turn][bank] = words[word]
        if turns:
            groups.append(turns)
    return groups


def _of_the_access(access: SharedAccess, width: int, matrix: bool) -> str:
    if matrix:
        each = f"Drawn: a matrix of 8 rows of 16 bytes ({access.instruction}), the first number that each lane gets."
    else:
        each = f"Drawn: its first request, {plural(width, 'byte')} a lane."
    cells = "In a cell: the lane that wants a word of the bank; 4× if four lanes share it."
    if LANES * width > BANKS * WORD:
        cells += f" Groups of {LANES * WORD // width} lanes take turns: A, B …"
    if access.wavefronts is None:
        total = "The whole access, in one program: turns unknown."
    else:
        total = (
            f"The whole access, in one program: {plural(access.requests, 'request')}, "
            f"{plural(access.wavefronts, 'turn')}; {access.least:,} would do."
        )
    return f"{about(access)}\n{each}\n{cells}\n{total}"


def _draw_word(axes, bank, y, lanes, turn):
    if not len(lanes):
        box(axes, bank, y, 1, 1, "idle bank", facecolor="white", edgecolor=FAINT, linewidth=0.5)
        return
    conflict = turn > 0
    box(axes, bank, y, 1, 1, "conflict" if conflict else "word", **(BAD if conflict else GOOD))
    label = str(lanes[0]) if len(lanes) == 1 else f"{len(lanes)}×"
    plate = dict(facecolor=BAD["facecolor"], edgecolor="none", pad=0.6) if conflict else None
    axes.text(
        bank + 0.5, y + 0.52, label, ha="center", va="center", fontsize=9, color="black" if conflict else "white",
        bbox=plate,
    )  # fmt: skip
