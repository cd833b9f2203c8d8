"""Labels beside points, moved until none covers another, a point or a line, and no two lines to them cross."""

import numpy as np
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from fastkit.lab.plots.paper import GREY

GAP = 8.0  # points from a point to its label
RINGS = 14  # distances tried
POINT = 5.0  # radius of a marker, points


def place(figure, axes, labels: list[tuple[str, float, float]]) -> None:
    """Write each (text, x, y) beside its point: near it where there is room, else farther, with a thin line to it.

    The axes' limits must be set. Points further up are served first, or those at a side, where that disturbs less.
    """
    figure.draw_without_rendering()  # the layout decides where points are
    renderer = figure.canvas.get_renderer()
    notes = [
        axes.annotate(
            text, (x, y), (GAP, 0), textcoords="offset points", fontsize=9, ha="left", va="center", gid="label",
            bbox=dict(facecolor="white", edgecolor="none", pad=0.6, alpha=0.85),
            arrowprops=dict(arrowstyle="-", color=GREY, linewidth=0.7, shrinkA=0, shrinkB=3),
        )
        for text, x, y in labels
    ]  # fmt: skip
    found = None
    for order in (lambda note: -note.xy[1], lambda note: note.xy[0], lambda note: -note.xy[0]):
        score, places = _arranged(axes, renderer, notes, sorted(notes, key=order))
        if found is None or score < found[0]:
            found = score, places
        if score == 0:
            break
    for note, (dx, dy) in found[1]:
        _move(note, dx, dy)
        note.arrow_patch.set_visible(np.hypot(dx, dy) > 2 * GAP)


def _arranged(axes, renderer, notes: list, order: list) -> tuple[int, list]:
    """(what is wrong with it, a place for each note): each takes the best that those before it in `order` leave."""
    points = renderer.points_to_pixels(1.0)
    frame = axes.get_window_extent(renderer)
    marks = [Bbox.from_bounds(x - POINT * points, y - POINT * points, 2 * POINT * points, 2 * POINT * points)
             for x, y in axes.transData.transform([note.xy for note in notes] or np.empty((0, 2)))]  # fmt: skip
    written = [text.get_window_extent(renderer).padded(points) for text in axes.texts if text not in notes]
    lines = [line.get_transform().transform_path(line.get_path()) for line in axes.lines if len(line.get_xdata()) > 1]
    leaders: list[Path] = []  # thin lines of labels that lie far off
    total, places = 0, []
    for note in order:
        point = axes.transData.transform(note.xy)
        best = None
        for dx, dy in _offsets():
            _move(note, dx, dy)
            note.update_positions(renderer)
            extent = Text.get_window_extent(note, renderer).padded(points)
            inside = frame.x0 <= extent.x0 and extent.x1 <= frame.x1 and frame.y0 <= extent.y0 and extent.y1 <= frame.y1
            overlaps = sum(extent.overlaps(other) for other in (*marks, *written))
            crossed = sum(path.intersects_bbox(extent, filled=False) for path in (*lines, *leaders))
            leader = Path([point, (extent.min + extent.max) / 2])
            crossed += sum(leader.intersects_path(other, filled=False) for other in leaders)
            crossed += sum(leader.intersects_bbox(other, filled=False) for other in written)
            score = (not inside) * 8 + overlaps * 4 + crossed
            if best is None or score < best[0]:
                best = score, dx, dy, extent, leader
            if score == 0:
                break
        score, dx, dy, extent, leader = best
        total += score
        places.append((note, (dx, dy)))
        written.append(extent)
        if np.hypot(dx, dy) > 2 * GAP:
            leaders.append(leader)
    return total, places


def _move(note, dx: float, dy: float) -> None:
    note.set_position((dx, dy))
    note.set_horizontalalignment("left" if dx > 0 else "right" if dx < 0 else "center")


def _offsets():
    """Places around a point in points, near ones first, to the right before the left."""
    for ring in range(1, RINGS + 1):
        out = GAP + 12.0 * (ring - 1)
        for dx, dy in ((1, 0), (1, -1), (1, 1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1)):
            yield dx * (GAP if abs(dy) and ring > 1 else out), dy * out
