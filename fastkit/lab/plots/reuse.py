"""What the programs of a tiled matrix product share, drawn on its three matrices."""

from collections.abc import Sequence

from fastkit.errors import FastkitError
from fastkit.lab.plots.paper import EMPTY, GOOD, OTHER, Picture, blank, box, key, picture, plural
from fastkit.lab.reuse import Order, blocks_loaded

MOST_BLOCKS = 16  # on a side of a matrix


@picture
def block_loads(order: Order, blocks: int = 9, programs: int | Sequence[int] = 9) -> Picture:
    """Which blocks of a and b the programs that run at once load, and which blocks of c they write.

    order     (row, column) of the block of c that each program writes (`fastkit.lab.reuse.order_of`)
    blocks    on each side of a, b and c
    programs  how many run at once: the first so many; or the numbers of those that do

    Raises FastkitError for matrices too large to draw, or programs that there are not.
    """
    chosen = list(range(programs)) if isinstance(programs, int) else list(programs)
    if not 1 <= blocks <= MOST_BLOCKS:
        raise FastkitError(f"{blocks} blocks on a side cannot be drawn: take 1 to {MOST_BLOCKS}")
    if not chosen or not 0 <= min(chosen) <= max(chosen) < len(order):
        raise FastkitError(f"programs {chosen} are not all of the {len(order)} that there are: take 1 or more of those")
    at_once = [order[number] for number in chosen]
    of_a, of_b = blocks_loaded(at_once, blocks)
    headline = (
        f"{plural(len(chosen), 'program')} at once load{'s' * (len(chosen) == 1)} {plural(of_a + of_b, 'block')}: "
        f"{of_a} of a and {of_b} of b"
    )
    wanted = len(chosen) * 2 * blocks
    subtitle = (
        f"c = a @ b, {blocks} × {blocks} blocks each. The programs ask for {wanted} blocks, so that each block serves "
        f"{wanted / (of_a + of_b):.3g} of them. In c: the number of the program that writes the block."
    )
    figure = blank(headline, 3.5, subtitle)
    axes = figure.subplots(1, 3)
    rows, columns = {row for row, _ in at_once}, {column for _, column in at_once}
    _draw(axes[0], "a", blocks, {(row, k): OTHER for row in rows for k in range(blocks)}, "k, in blocks", "row")
    _draw(axes[1], "b", blocks, {(k, column): OTHER for column in columns for k in range(blocks)}, "column", "k")
    _draw(axes[2], "c", blocks, dict.fromkeys(at_once, GOOD), "column", "row")
    for number, (row, column) in enumerate(order):
        if row < blocks and column < blocks:
            inside = (row, column) in at_once
            axes[2].text(
                column + 0.5, row + 0.53, str(number), ha="center", va="center", fontsize=9 if blocks <= 10 else 7,
                color="white" if inside else "black", gid="program",
            )  # fmt: skip
    key(figure, {"loaded": OTHER, "written": GOOD})
    return figure


def _draw(axes, name: str, blocks: int, looks: dict[tuple[int, int], dict], across: str, down: str) -> None:
    for row in range(blocks):
        for column in range(blocks):
            look = looks.get((row, column), EMPTY)
            gid = f"{name} block" if look is EMPTY else f"{name} touched"
            box(axes, column, row, 1, 1, gid, **{**look, "edgecolor": "black", "linewidth": 0.6})
    axes.set(xlim=(0, blocks), ylim=(blocks, 0), aspect="equal", title=name, xlabel=across, ylabel=down)
    axes.set_xticks([])
    axes.set_yticks([])
