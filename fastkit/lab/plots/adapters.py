"""A LoRA adapter beside its weight, and inside it: what moves because of it."""

from fastkit.errors import FastkitError
from fastkit.lab.plots.paper import BAD, EMPTY, GOOD, Picture, blank, box, key, picture

THIN = 0.13  # of the drawing: a side too short to be seen is drawn so
UNIT = 4096  # numbers along a side of 1
TALL = 2.0  # of the drawing: M, whatever it is
BYTES = 2  # a number, 16 bits


@picture
def two_ways(r: int = 16, M: int = 8192, N: int = 14336, K: int = 4096) -> Picture:
    """y = x @ W.T with an adapter of rank r: as two more products, and in the weight; matrices N and K to scale.

    Raises FastkitError for a shape that there is not.
    """
    if min(r, M, N, K) < 1:
        raise FastkitError(f"no adapter has rank {r}, {M} rows, {N} outputs and {K} inputs: give numbers above 0")
    beside, inside = BYTES * (M * (K + 2 * r + 2 * N) + r * (N + K)), BYTES * r * (N + K)
    figure = blank(
        f"{M:,} token{'s' * (M > 1)}, rank {r}: the adapter beside its weight moves {_size(beside)}, inside it "
        f"{_size(inside)}",
        2.9, f"x [{M:,}, {K:,}], W [{N:,}, {K:,}], in 16 bits. A and B are drawn thicker than they are.",
    )  # fmt: skip
    axes = figure.subplots(2, 1)
    k, n = K / UNIT, N / UNIT
    thin = max(THIN, r / UNIT)
    top = [("x", k, TALL, EMPTY), ("·",), ("Wᵀ", n, k, EMPTY), ("=",), ("y", n, TALL, EMPTY), ("  then",),
           ("x", k, TALL, BAD), ("·",), ("Aᵀ", thin, k, BAD), ("·",), ("Bᵀ", n, thin, BAD), ("+",),
           ("y", n, TALL, BAD), ("=",), ("y", n, TALL, BAD)]  # fmt: skip
    low = [("x", k, TALL, EMPTY), ("· (",), ("Wᵀ", n, k, EMPTY), ("+",), ("Aᵀ", thin, k, GOOD), ("·",),
           ("Bᵀ", n, thin, GOOD), (") =",), ("y", n, TALL, EMPTY)]  # fmt: skip
    width = _width(top)
    for row, (parts, name) in enumerate(((top, "beside"), (low, "inside"))):
        _draw(axes[row], parts, width)
        axes[row].set_ylabel(name)
    key(figure, {"moves because of the adapter": BAD, "the same, when it is added to the weight": GOOD})
    return figure


def _size(count: float) -> str:
    return f"{count / 1e6:,.3g} MB" if count >= 1e6 else f"{count / 1e3:,.3g} KB"


def _width(parts) -> float:
    return sum(part[1] + 0.1 if len(part) > 1 else 0.16 + 0.16 * len(part[0]) for part in parts)


def _draw(axes, parts, width: float) -> None:
    x = 0.0
    for name, *shape in parts:
        if not shape:
            step = 0.16 + 0.16 * len(name)
            axes.text(x + step / 2 - 0.05, 0, name, ha="center", va="center")
            x += step
            continue
        wide, high, look = shape
        box(axes, x, -high / 2, wide, high, f"matrix {name}", **{**look, "edgecolor": "black", "linewidth": 0.8})
        inside = wide > 0.3 and high > 0.3
        axes.text(
            x + wide / 2, 0 if inside else high / 2 + 0.17, name, ha="center", va="center", fontsize=9,
            bbox=dict(facecolor="white", edgecolor="none", pad=0.8) if inside else None,
        )  # fmt: skip
        x += wide + 0.1
    axes.set(xlim=(-0.1, width), ylim=(-1.15, 1.15))
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
