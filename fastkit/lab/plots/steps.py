"""A step's speed against the memory that it takes."""

from collections.abc import Sequence

from fastkit.errors import FastkitError
from fastkit.lab.plots.labels import place
from fastkit.lab.plots.paper import BLUE, VERMILION, Picture, picture, sheet


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
