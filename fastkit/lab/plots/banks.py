"""Banks: where the numbers of a tile lie in shared memory, and what its columns cost for that."""

import numpy as np
from matplotlib.colors import ListedColormap

from fastkit.errors import FastkitError
from fastkit.lab.layouts import BANKS, LANES
from fastkit.lab.plots.paper import BAD, GOOD, Picture, blank, box, key, picture, plural

MOST_WORDS = 64  # of a row that is drawn


def banks_of(row_words: int = BANKS, phases: int = 1) -> np.ndarray:
    """int64 [32, row_words]: the bank in which each word of a tile lies.

    row_words  words from the beginning of a row to that of the next, padding included
    phases     rows after which the swizzle repeats: word n of row m stands at n ^ (m % phases) of its row; 1: none

    Raises FastkitError for a swizzle that would leave the row.
    """
    if not 1 <= row_words <= MOST_WORDS or phases < 1 or phases & (phases - 1):
        raise FastkitError(f"row_words {row_words}, phases {phases}: give 1 to {MOST_WORDS} words, a power of two")
    if row_words % phases:
        raise FastkitError(
            f"a swizzle over {phases} rows exchanges words in groups of {phases}, which do not fill rows of {row_words}"
        )
    m, n = np.arange(LANES)[:, None], np.arange(row_words)[None, :]
    return (m * row_words + (n ^ (m % phases))) % BANKS


def column_turns(row_words: int = BANKS, phases: int = 1, column: int = 0) -> int:
    """Turns that the banks take when 32 lanes read a column of the tile of `banks_of`, a row each."""
    return int(np.bincount(banks_of(row_words, phases)[:, column], minlength=BANKS).max())


@picture
def tile_banks(row_words: int = BANKS, phases: int = 1, column: int = 0) -> Picture:
    """A tile in shared memory, each word shaded by its bank, and the banks that a column of it asks (see `banks_of`).

    The column's words are framed: blue for the first that a bank has to give, hatched for every further one, which has
    to wait for a turn of its own.
    """
    banks = banks_of(row_words, phases)
    if not 0 <= column < row_words:
        raise FastkitError(f"column {column}: rows have {row_words} words")
    asked = np.bincount(banks[:, column], minlength=BANKS)
    turns, used = int(asked.max()), int((asked > 0).sum())
    lies = "lies in one bank" if used == 1 else f"is spread over {used} banks"
    headline = f"A column {lies}: 32 lanes take {plural(turns, 'turn')}"

    m = "m" if phases >= LANES else f"(m % {phases})"
    place = f"n ^ {m} of its row" if phases > 1 else "n of its row"
    bank = f"({row_words} * m + {f'(n ^ {m})' if phases > 1 else 'n'}) % {BANKS}"
    subtitle = f"{row_words} words from row to row. Word n of row m stands at {place}, in bank {bank}."
    figure = blank(headline, 4.9, subtitle)
    tile, bars = figure.subplots(1, 2, width_ratios=[max(row_words, 24), 16])
    shades = ListedColormap([str(0.97 - 0.55 * bank / (BANKS - 1)) for bank in range(BANKS)])
    tile.imshow(banks, cmap=shades, vmin=0, vmax=BANKS - 1, extent=(0, row_words, LANES, 0), aspect="auto")
    served = set()
    for m in range(LANES):
        bank = int(banks[m, column])
        box(tile, column, m, 1, 1, "conflict" if bank in served else "word", **(BAD if bank in served else GOOD))
        served.add(bank)
    tile.set(xlabel="word n of the row", ylabel="row m, read by lane m", ylim=(LANES, 0))
    tile.set_xticks([0.5, *np.arange(7.5, row_words, 8)], [0, *range(7, row_words, 8)])
    tile.set_yticks([0.5, 7.5, 15.5, 23.5, 31.5], [0, 7, 15, 23, 31])
    for bank, count in enumerate(asked):
        if count:
            box(bars, 0, bank + 0.06, 1, 0.88, "word", **GOOD)
        if count > 1:
            box(bars, 1, bank + 0.06, count - 1, 0.88, "conflict", **BAD)
    bars.set(xlabel="words of the column", ylabel="bank", xlim=(0, max(4, turns)), ylim=(LANES, 0))
    bars.set_yticks([0.5, 7.5, 15.5, 23.5, 31.5], [0, 7, 15, 23, 31])
    for axes in (tile, bars):
        axes.tick_params(length=0)
    shade = {"facecolor": shades(0), "edgecolor": "black"}, {"facecolor": shades(BANKS - 1), "edgecolor": "black"}
    meanings = {"bank 0": shade[0], "bank 31": shade[1], "first of its bank": GOOD}
    key(figure, meanings | ({"has to wait": BAD} if turns > 1 else {}))
    return figure
