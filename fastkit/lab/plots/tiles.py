"""A tile and its matrix: where it lies and where it goes, and which lane holds which of its numbers."""

import math

import numpy as np

from fastkit.errors import FastkitError
from fastkit.lab.layouts import LinearLayout
from fastkit.lab.plots.paper import BLUE, GREY, INK, TINTS, Picture, about, box, picture, plural, sheet, unknown
from fastkit.lab.tracer import Access

STEPS = 8  # of a walk in a still picture
CELLS = 512  # on a side, at most; larger matrices are drawn by squares of several numbers
ROWS, COLUMNS = 16, 32  # of a tile's layout at most


@picture
def tile_walk(access: Access, shape: tuple[int, int], step: int | None = None, stride: int | None = None) -> Picture:
    """The matrix [rows, columns] that lies behind an argument, and the numbers that the access touches, step by step.

    A step is one execution of the access: by the next program, or by the same one in the next turn of a loop. The mask
    of the first is known; later steps are drawn as if they had the same.

    step    show the steps up to this one, which is filled, from 0; None: the first 8, and the very first filled
    stride  numbers from one row to the next, if not `columns`

    Raises FastkitError for a shape or step that does not fit.
    """
    rows, columns = shape
    stride = columns if stride is None else stride
    if min(rows, columns) < 1 or stride < columns:
        raise FastkitError(f"no matrix has shape {tuple(shape)} and {stride} numbers from row to row: mend them")
    if access.tile is None or not access.walk:
        why = access.unknown or "its tile is too large to keep, or no lane of it is ever active"
        return unknown("The tile's walk", why, about(access))
    if step is not None and not 0 <= step < len(access.walk):
        raise FastkitError(f"there is no step {step}: the report keeps {len(access.walk)}, from 0")
    count = min(STEPS, len(access.walk)) if step is None else step + 1
    now = 0 if step is None else step
    scale = -(-max(rows, columns) // CELLS)
    places = _places(access, count, stride, shape, scale)
    figure, axes = sheet(
        _walk_headline(access, count, step), min(6.0, 0.75 + 8.2 * rows / columns), _walk_subtitle(access, scale)
    )
    _draw_matrix(axes, rows, columns)
    several = len({program for program, _ in access.walk[:count]}) > 1
    for cells, steps in places:
        if cells.any():
            steps.sort(key=lambda n: n != now)  # the one that is filled is named first
            names = [_step_name(n, access.walk[n][0], several) for n in steps]
            _draw_tile(axes, cells, scale, shape, now in steps, names, outside=bool({0, count - 1} & set(steps)))
    return figure


def _places(access, count, stride, shape, scale) -> list[tuple[np.ndarray, list[int]]]:
    """Where the first `count` steps are, and which: (the cells they touch, bool [rows, columns] by `scale`; steps)."""
    rows, columns = shape
    size = access.bits // 8
    numbers = np.sort(access.tile[access.tile >= 0]) // size
    row, column = numbers // stride, numbers % stride
    block = (column >= column[0]).all()  # it moves as one, and what leaves the matrix is masked
    steps_at = {}
    for step, (_, offset) in enumerate(access.walk[:count]):
        steps_at.setdefault(offset // size, []).append(step)
    found = []
    for start, steps in steps_at.items():
        if block:
            to_row, to_column = divmod(start, stride)
            at_row, at_column = row - row[0] + to_row, column - column[0] + to_column
        else:  # a run over the ends of rows
            at_row, at_column = np.divmod(numbers - numbers[0] + start, stride)
        inside = (at_row >= 0) & (at_row < rows) & (at_column >= 0) & (at_column < columns)
        cells = np.zeros((-(-rows // scale), -(-columns // scale)), dtype=bool)
        cells[at_row[inside] // scale, at_column[inside] // scale] = True
        found.append((cells, steps))
    return found


def _walk_headline(access: Access, count: int, step: int | None) -> str:
    who = access.argument or access.kind
    if step is not None:
        return f"{who}: step {step}, by program {_program(access.walk[step][0])}"
    programs = len({program for program, _ in access.walk[:count]})
    first = f"{who}: {plural(int((access.tile >= 0).sum()), 'number')} at once"
    if count == 1:
        return f"{first}, in a single step"
    if programs == count:
        return f"{first}; each of the first {count} steps is another program's"
    by = "one program, in a loop" if programs == 1 else f"{programs} programs"
    return f"{first}; the first {count} steps are those of {by}"


def _walk_subtitle(access: Access, scale: int) -> str:
    lines = [about(access)]
    kept = (
        f"The report keeps {plural(len(access.walk), 'step')}. In a tile: its steps, and their programs (p) if several."
    )
    lines.append(kept + (f" A pixel is {scale} × {scale} numbers." if scale > 1 else ""))
    if masked := int((access.tile < 0).sum()):
        lines.append(f"Of the first step, {plural(masked, 'element')} are masked, and not drawn in any.")
    return "\n".join(lines)


def _program(program: tuple[int, int, int]) -> str:
    """A program's number, or its numbers where the grid has several axes."""
    return str(program[0]) if not any(program[1:]) else str(program).replace(" ", "")


def _step_name(step: int, program: tuple[int, int, int], several: bool) -> str:
    return f"{step}·p{_program(program)}" if several else str(step)


def _draw_matrix(axes, rows, columns):
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", anchor="W", xlabel="column", ylabel="row")
    axes.spines[:].set_visible(True)
    axes.tick_params(which="both", length=0)
    step = 2 ** max(0, int(np.ceil(np.log2(max(rows, columns) / 8))))
    axes.set_xticks(range(0, columns + 1, step))
    axes.set_yticks(range(0, rows + 1, step if rows >= step else rows))
    if max(rows, columns) <= 64:
        axes.set_xticks(range(columns + 1), minor=True)
        axes.set_yticks(range(rows + 1), minor=True)
        axes.grid(which="minor")


def _draw_tile(axes, cells, scale, shape, filled, names, outside):
    """A tile outlined, or filled; with the names of its steps where they have room, or `outside` of it."""
    rows, columns = shape
    look = dict(facecolor=BLUE if filled else TINTS[0], edgecolor="none")
    at_row, at_column = np.nonzero(cells)
    high, wide = np.ptp(at_row) + 1, np.ptp(at_column) + 1
    whole = len(at_row) == high * wide
    for row, first, tall, length in [(at_row[0], at_column[0], high, wide)] if whole else _runs(cells):
        width = min((first + length) * scale, columns) - first * scale
        height = min((row + tall) * scale, rows) - row * scale
        box(axes, first * scale, row * scale, width, height, "touched now" if filled else "touched", **look)
    inches = min(8.2, 5.4 * columns / rows) / columns * scale  # of a cell
    thin = min(high, wide) * inches < 0.12
    for x, y in _outline(cells):
        x, y = np.minimum(x * scale, columns), np.minimum(y * scale, rows)
        axes.plot(x, y, color="black", linewidth=0.3 if thin else 0.9, gid="edge")
    more = ", …" if len(names) > 1 else ""
    texts = [", ".join(names), names[0] + more, names[0].partition("·")[0]]
    text = next((text for text in texts if 0.085 * len(text) <= wide * inches), "")
    middle = (at_column.min() + wide / 2) * scale, (at_row.min() + high / 2) * scale
    scattered = len(at_row) < 0.5 * high * wide
    if text and not (thin or scattered):
        axes.text(
            *middle, text, ha="center", va="center", fontsize=9, gid="step",
            color="white" if filled and whole else "black",
            bbox=None if whole else dict(facecolor="white", edgecolor="none", pad=0.8, alpha=0.85),
        )  # fmt: skip
    elif outside:
        along = 0.25 if filled else 0.6  # of the tile, so that the first and the last do not meet
        if scattered:
            end, to = ((at_column[0] + 0.5) * scale, (at_row[0] + 0.5) * scale), (18, -20 - 30 * along)
        elif high > wide:
            end, to = (middle[0], (at_row.min() + along * high) * scale), (44 if 2 * middle[0] < columns else -44, 0)
        else:
            end, to = ((at_column.min() + along * wide) * scale, middle[1]), (0, -36 if 2 * middle[1] < rows else 36)
        axes.annotate(
            f"step {names[0]}{more}", end, to, textcoords="offset points", ha="center", va="center", fontsize=9,
            arrowprops=dict(arrowstyle="->", color="black"), gid="step",
        )  # fmt: skip


def _runs(cells):
    """(row, first column, 1, length) of every run of cells in a row."""
    edges = np.diff(np.pad(cells, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, first = np.nonzero(edges == 1)
    length = np.nonzero(edges == -1)[1] - first
    return zip(rows.tolist(), first.tolist(), [1] * len(rows), length.tolist(), strict=True)


def _outline(cells):
    """Lines around the cells, as two (xs, ys) with breaks: the vertical ones and the horizontal ones."""
    padded = np.pad(cells, 1)
    y, x = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    gaps = np.full(len(x), np.nan)
    yield np.stack([x, x, gaps], 1).ravel(), np.stack([y, y + 1, gaps], 1).ravel()
    y, x = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    gaps = np.full(len(x), np.nan)
    yield np.stack([x, x + 1, gaps], 1).ravel(), np.stack([y, y, gaps], 1).ravel()


@picture
def layout_map(access: Access) -> Picture:
    """Which lane of which warp holds which number of the access's tile: its layout in registers.

    Large tiles are cut to their first 16 rows and 32 columns.
    """
    owners = _owners(access.spread)
    if owners is None:
        return unknown(
            "The layout", f"no lanes hold the tile in two dimensions: {access.layout or 'none'}", about(access)
        )
    warp, lane, copies = owners
    whole = warp.shape
    warp, lane = (part[:ROWS, :COLUMNS] for part in (warp, lane))
    held = warp * 64 + lane
    run = _first_run(held[0])
    flat = len(access.shape) == 1
    below = _first_run(held[:, 0])
    headline = f"A lane holds {plural(run, 'number')} side by side" if run > 1 else "Neighbours are held by other lanes"
    if run == 1 < below:
        headline = f"A lane holds {plural(below, 'number')} one below the other"
    subtitle = [about(access), access.layout]
    if copies > 1:
        subtitle.append(f"Each number is held {copies} times, by other lanes and warps too; its first holder is shown.")
    if held.shape != whole:
        part, all_of_it = ((shape[1:] if flat else shape) for shape in (held.shape, whole))
        subtitle.append(f"Cut: the first {' × '.join(map(str, part))} of {' × '.join(map(str, all_of_it))} numbers.")
    subtitle.append("In a cell: the lane that holds it.")
    figure, axes = sheet(headline, 0.7 + 0.22 * held.shape[0], "\n".join(subtitle))
    rows, columns = held.shape
    for row in range(rows):
        column = 0
        while column < columns:
            count = _first_run(held[row, column:])
            w, l = int(warp[row, column]), int(lane[row, column])
            box(axes, column, row, count, 1, f"warp {w} lane {l}", facecolor=TINTS[w % len(TINTS)], edgecolor=GREY)
            axes.text(column + count / 2, row + 0.52, str(l), ha="center", va="center", fontsize=9, color=INK)
            column += count
    _mark_warps(axes, warp)
    axes.set(xlim=(0, columns), ylim=(rows, 0), xlabel="number" if flat else "column of the tile")
    axes.set_ylabel("" if flat else "row of the tile")
    axes.set_xticks(np.arange(0, columns, 4) + 0.5, range(0, columns, 4))
    axes.set_yticks(np.arange(rows) + 0.5, [""] * rows if flat else range(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _first_run(values) -> int:
    """How many equal values stand at the beginning."""
    other = np.flatnonzero(values != values[0])
    return int(other[0]) if len(other) else len(values)


def _mark_warps(axes, warp):
    """A thick line between warps, and each one's name at the right of its first row."""
    for x, y in (line for w in np.unique(warp) for line in _outline(warp == w)):
        axes.plot(x, y, color="black", linewidth=1.8, clip_on=False)
    for row in range(len(warp)):
        names = list(dict.fromkeys(warp[row].tolist()))
        if row == 0 or names != list(dict.fromkeys(warp[row - 1].tolist())):
            text = "warp " + ", ".join(map(str, names[:4])) + (" …" if len(names) > 4 else "")
            axes.text(warp.shape[1] + 0.3, row + 0.52, text, va="center", fontsize=9)


def _owners(spread: LinearLayout | None) -> tuple[np.ndarray, np.ndarray, int] | None:
    """(warp, lane, copies) of a tile: the first holder of each number, as arrays [rows, columns].

    None where no lane moves the tile, or for more than two dimensions.
    """
    if spread is None or not 1 <= len(spread.shape) <= 2:
        return None
    held = spread.elements()
    last_first = held.reshape(-1)[::-1]  # of several holders, the first is written last
    warp, lane = (np.empty(math.prod(spread.shape), dtype=np.int64) for _ in range(2))
    for owner, axis in ((warp, 0), (lane, 2)):
        owner[last_first] = np.indices(held.shape)[axis].reshape(-1)[::-1]
    copies = int((held == 0).any(axis=1).sum())
    shape = (1, *spread.shape) if len(spread.shape) == 1 else spread.shape
    return warp.reshape(shape), lane.reshape(shape), copies
