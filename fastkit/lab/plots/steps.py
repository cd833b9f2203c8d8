"""A step's speed against the memory that it takes."""

from collections.abc import Sequence

from fastkit.errors import FastkitError
from fastkit.lab.plots.labels import place
from fastkit.lab.plots.paper import BLUE, VERMILION, Picture, picture, sheet

CARDS = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 192)  # GiB: memories of cards, and between


@picture
def speed_against_memory(model: Sequence[dict], measured: Sequence[dict] = (), source: str = "") -> Picture:
    """Tokens a second over the GiB that a step takes at its peak; rows of {who, gib, tokens_per_second}.

    model     what is predicted: hollow
    measured  what was measured: filled
    source    of the measured ones

    Raises FastkitError without any row, or for measured ones without a source.
    """
    rows = [*model, *measured]
    if not rows or (measured and not source):
        raise FastkitError("give rows of who, gib and tokens_per_second, and for measured ones their source")
    known = measured or model
    fastest, leanest = max(known, key=lambda row: row["tokens_per_second"]), min(known, key=lambda row: row["gib"])
    headline = f"{fastest['who']}: {fastest['tokens_per_second']:,.0f} tokens/s in {fastest['gib']:.1f} GiB"
    if leanest is not fastest:
        headline += f"; {leanest['who']}: {leanest['tokens_per_second']:,.0f} in {leanest['gib']:.1f}"
    figure, axes = sheet(headline, 4.2, "Up is faster, left is leaner.", source)
    for kind, group, look in (
        ("predicted", model, dict(marker="D", color=VERMILION, markerfacecolor="white")),
        ("measured", measured, dict(marker="o", color=BLUE)),
    ):
        if group:
            xs, ys = ([row[what] for row in group] for what in ("gib", "tokens_per_second"))
            axes.plot(xs, ys, linestyle="", label=kind, gid=kind, **look)
    axes.set(
        xlim=(0, 1.12 * max(row["gib"] for row in rows)),
        ylim=(0, 1.15 * max(row["tokens_per_second"] for row in rows)),
        xlabel="GiB at the peak",
        ylabel="tokens/s",
    )
    axes.grid()
    figure.legend(loc="outside lower left", ncols=2)
    place(figure, axes, [(row["who"], row["gib"], row["tokens_per_second"]) for row in known])
    return figure


@picture
def ours_and_peers(rows: Sequence[dict], what: str, source: str) -> Picture:
    """Tokens a second over the GiB that a step takes at its peak, measured: ours beside others', each by its name.

    rows    {who, gib, tokens_per_second, ours, fp8}: circles are ours, triangles ours in FP8, squares others'
    what    each of them did
    source  which card measured it, and when

    Raises FastkitError without a row of ours.
    """
    ours = [row for row in rows if row["ours"]]
    if not ours:
        raise FastkitError("give rows of who, gib, tokens_per_second, ours and fp8, some of them ours")
    exact = [row for row in ours if not row["fp8"]] or ours
    fastest, leanest = max(exact, key=lambda row: row["tokens_per_second"]), min(exact, key=lambda row: row["gib"])
    headline = f"fastkit on {source}: {fastest['tokens_per_second']:,.0f} tokens/s in {fastest['gib']:.1f} GiB"
    if leanest is not fastest:
        headline += f", or {leanest['tokens_per_second']:,.0f} in {leanest['gib']:.1f}"
    height = 4.2 + 0.15 * max(0, len(rows) - 6)  # room for their names
    figure, axes = sheet(headline, height, f"{what}.\nUp is faster, left is leaner. Blue: fastkit, by plan.")
    looks = {
        "ours": dict(marker="o", color=BLUE),
        "ours in FP8": dict(marker="^", color=BLUE),
        "others": dict(marker="s", color=VERMILION),
    }
    for row in rows:
        kind = ("ours in FP8" if row["fp8"] else "ours") if row["ours"] else "others"
        axes.plot(row["gib"], row["tokens_per_second"], linestyle="", gid=kind, **looks[kind])
    low, high = (pick(row["gib"] for row in rows) for pick in (min, max))
    axes.set(xscale="log", xlim=(0.7 * low, 1.5 * high), xlabel="peak GiB allocated, logarithmic", ylabel="tokens/s")
    axes.set_ylim(0, 1.12 * max(row["tokens_per_second"] for row in rows))
    axes.set_xticks([size for size in CARDS if 0.7 * low <= size <= 1.5 * high])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid()
    place(figure, axes, [(row["who"], row["gib"], row["tokens_per_second"]) for row in rows])
    for note, row in zip(axes.texts, rows, strict=True):
        note.set_color(BLUE if row["ours"] else VERMILION)
    return figure
