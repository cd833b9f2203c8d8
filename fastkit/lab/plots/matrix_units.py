"""How instructions of the tensor cores cover a tile."""

from fastkit.errors import FastkitError
from fastkit.lab.plots.paper import BAD, EMPTY, GOOD, Picture, box, key, picture, plural, sheet

MOST = 256  # rows or columns of a tile that can be drawn


@picture
def cover(
    rows: int = 64, columns: int = 64, depth: int = 32, instruction: tuple[int, int, int] = (16, 8, 16), warps: int = 4
) -> Picture:
    """The tile of c that `tl.dot` adds to, cut into what one instruction multiplies; what it multiplies for nothing.

    rows, columns, depth  BLOCK_M, BLOCK_N, BLOCK_K
    instruction           (m, n, k) of one instruction
    warps                 that share the work: where there are fewer pieces than warps, several do the same piece

    Raises FastkitError for a tile that cannot be drawn.
    """
    if not (1 <= rows <= MOST and 1 <= columns <= MOST and depth >= 1):
        raise FastkitError(f"a tile of {rows} × {columns} × {depth} cannot be drawn: take 1 to {MOST} rows and columns")
    m, n, k = instruction
    down, across, deep = -(-rows // m), -(-columns // n), -(-depth // k)
    pieces, group = down * across, 1 if m < 64 else 4
    repeated = max(1, warps // group // pieces)
    count = pieces * deep * repeated
    waste = 1 - rows * columns * depth / (count * m * n * k)
    tile, shape = f"{rows} × {columns} × {depth}", f"{m} × {n} × {k}"
    headline = f"A product of {tile} takes {plural(count, 'instruction')} of {shape}"
    headline += f": {100 * waste:.3g}% of their work is thrown away" if waste else ", with nothing thrown away"
    subtitle = f"The tile of c. Each piece is added to by {plural(deep, 'instruction')}, {k} numbers of k at a time"
    subtitle += f"; and {repeated} times, since {warps} warps have {plural(pieces, 'piece')}." if repeated > 1 else "."
    high, wide = down * m, across * n
    figure, axes = sheet(headline, max(1.1, min(3.4, 3.4 * high / 64)) + 0.9, subtitle)
    for row in range(0, high, m):
        for column in range(0, wide, n):
            box(axes, column, row, n, m, "beyond", **BAD)
            inside = min(n, columns - column), min(m, rows - row)
            box(axes, column, row, *inside, "wanted", **(GOOD if repeated == 1 else EMPTY))
            box(axes, column, row, n, m, "piece", facecolor="none", edgecolor="black", linewidth=1.2)
    axes.set(xlim=(0, max(wide, 64)), ylim=(high, 0), xlabel="column of the tile", ylabel="row")
    axes.set_xticks(range(0, wide + 1, 8))
    axes.set_yticks(range(0, high + 1, 16 if high > 16 else 8))
    meanings = {"wanted": GOOD} if repeated == 1 else {f"wanted, but multiplied {repeated} times": EMPTY}
    key(figure, meanings | ({"multiplied for nothing": BAD} if high > rows or wide > columns else {}))
    return figure
