"""Attention: which blocks of scores programs compute, and how memory grows with the tokens."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastkit.errors import FastkitError
from fastkit.lab.plots.paper import (
    BAD,
    BLUE,
    EMPTY,
    GOOD,
    GREY,
    INK,
    TINTS,
    VERMILION,
    Picture,
    box,
    key,
    picture,
    plural,
    sheet,
)

MOST_BLOCKS = 32  # on a side of the square
OWNERS = {"queries": "keys", "keys": "queries"}  # what a program keeps, and what it walks over
WHOLE, MASKED = {**GOOD, "facecolor": TINTS[0]}, {**BAD, "facecolor": TINTS[2]}  # of the programs that are not shown


@dataclass(frozen=True)
class ScoreBlock:
    """A block of scores with a pair that is seen: its first query and key, how many of each, and whether it needs no
    mask, being full and seen by all."""

    query: int
    key: int
    queries: int
    keys: int
    whole: bool


def score_blocks_of(
    lengths: int | Sequence[int], block_m: int = 128, block_n: int = 128, causal: bool = True, window: int | None = None
) -> list[ScoreBlock]:
    """The blocks that the library's attention computes for one head, of one sequence or of several that are packed.

    What a query sees is as for `fastkit.kernels.attention`. Raises FastkitError for lengths or blocks below 1.
    """
    lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
    if not lengths or min(*lengths, block_m, block_n) < 1:
        raise FastkitError(f"lengths {lengths} in blocks of {block_m} × {block_n}: give numbers from 1 up")
    nearest, farthest = (0 if causal else -math.inf), (math.inf if window is None else window - 1)  # seen keys, back
    found = []
    for start, T in zip(itertools.accumulate((0, *lengths)), lengths, strict=False):
        for m, n in itertools.product(range(0, T, block_m), range(0, T, block_n)):
            queries, keys = min(block_m, T - m), min(block_n, T - n)
            least, most = m - (n + keys - 1), m + queries - 1 - n  # from a query back to a key
            if most >= nearest and least <= farthest:
                whole = keys == block_n and least >= nearest and most <= farthest
                found.append(ScoreBlock(start + m, start + n, queries, keys, whole))
    return found


@picture
def score_blocks(
    lengths: int | Sequence[int], block_m: int = 128, block_n: int = 128, causal: bool = True,
    window: int | None = None, program: int | None = None, keeps: str = "queries",
) -> Picture:  # fmt: skip
    """The square of queries and keys, and the blocks of it that are computed (`score_blocks_of`).

    program  whose blocks are filled and numbered as it comes to them; None: all are filled
    keeps    "queries": a program has a block of them and walks over keys, as for o and dq; "keys": as for dk and dv

    Raises FastkitError for a square too large to draw, a program that there is not, or something else to keep.
    """
    blocks = score_blocks_of(lengths, block_m, block_n, causal, window)
    total = lengths if isinstance(lengths, int) else sum(lengths)
    square = -(-total // block_m) * -(-total // block_n)
    if keeps not in OWNERS:
        raise FastkitError(f"a program keeps {' or '.join(OWNERS)}, not {keeps!r}")
    if max(-(-total // block_m), -(-total // block_n)) > MOST_BLOCKS:
        raise FastkitError(f"{square} blocks cannot be drawn: take at most {MOST_BLOCKS} on a side")
    firsts = sorted({_kept(block, keeps) for block in blocks})
    if program is not None and not 0 <= program < len(firsts):
        raise FastkitError(f"there is no program {program}: they are 0 to {len(firsts) - 1}")
    mine = [block for block in blocks if program is not None and _kept(block, keeps) == firsts[program]]
    masked = sum(not block.whole for block in blocks)
    headline = f"{len(blocks)} of the square's {plural(square, 'block')} are computed; {masked} of them need a mask"
    figure, axes = sheet(headline, 4.4, _walk_words(mine, program, keeps))
    for block in blocks:
        strong = program is None or block in mine
        look = (GOOD if strong else WHOLE) if block.whole else (BAD if strong else MASKED)
        box(axes, block.key, block.query, block.keys, block.queries, "whole" if block.whole else "masked", **look)
    for number, block in enumerate(mine):
        axes.text(
            block.key + block.keys / 2, block.query + block.queries / 2, str(number), ha="center", va="center",
            fontsize=9, gid="step", color="white" if block.whole else INK,
            bbox=None if block.whole else dict(facecolor="white", edgecolor="none", pad=0.8),
        )  # fmt: skip
    for edge in () if isinstance(lengths, int) else itertools.accumulate(lengths[:-1]):
        axes.plot([0, total], [edge, edge], [edge, edge], [0, total], color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, total), ylim=(total, 0), aspect="equal", anchor="W", xlabel="key", ylabel="query")
    ticks = range(0, total + 1, max(block_m, block_n, total // 8))
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.spines[:].set_visible(True)
    key(figure, {"all of it is seen": GOOD, "a part is seen: masked": BAD, "never computed": EMPTY})
    return figure


def _kept(block: ScoreBlock, keeps: str) -> int:
    return block.query if keeps == "queries" else block.key


def _walk_words(mine: list[ScoreBlock], program: int | None, keeps: str) -> str:
    if not mine:
        return "Of the rest, no score is computed and no key is read for it."
    first, size = _kept(mine[0], keeps), mine[0].queries if keeps == "queries" else mine[0].keys
    over = plural(len(mine), "block")
    return f"Program {program} keeps {keeps} {first} to {first + size - 1} and walks over {over} of {OWNERS[keeps]}."


@picture
def memory_growth(rows: Sequence[dict], source: str, what: str = "") -> Picture:
    """The memory that ways to compute the same take on top of their inputs, by the number of tokens.

    rows    dicts of tokens, who and mib: None where it did not fit
    source  which card measured it, and whether now or recorded
    what    is computed

    Raises FastkitError for no rows.
    """
    if not rows:
        raise FastkitError("there are no rows: measure some numbers of tokens")
    ways = {who: [row for row in rows if row["who"] == who] for who in dict.fromkeys(row["who"] for row in rows)}
    figure, axes = sheet(_growth_headline(ways), 3.9, what, source)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MiB")
    tokens = sorted({row["tokens"] for row in rows})
    marks = itertools.cycle(("o", "s", "D"))
    for (who, measured), color in zip(ways.items(), itertools.cycle((VERMILION, BLUE, INK)), strict=False):
        fit = [(row["tokens"], row["mib"]) for row in measured if row["mib"] is not None]
        if not fit:
            continue
        axes.plot(*zip(*fit, strict=True), color=color, marker=next(marks), gid=f"way {who}")
        end = fit[-1]
        note = who if len(fit) == len(measured) else f"{who}: more does not fit"
        axes.annotate(
            note, end, (-8, 8), textcoords="offset points", ha="right", va="bottom", fontsize=9, color=color, gid="way"
        )
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.06, y=0.14)
    axes.grid()
    return figure


def _growth_headline(ways: dict[str, list[dict]]) -> str:
    longest = max(row["tokens"] for rows in ways.values() for row in rows)
    ends = {who: next((row["mib"] for row in rows if row["tokens"] == longest), None) for who, rows in ways.items()}
    words = [f"{who} {'too much' if mib is None else _mib(mib)}" for who, mib in ends.items()]  # who may be plural
    return f"Memory for {longest:,} tokens: {', '.join(words)}"


def _mib(mib: float) -> str:
    return f"{mib:,.0f} MiB" if mib >= 100 else f"{mib:.3g} MiB"
