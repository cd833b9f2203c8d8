"""Several operations at once: what each contender reaches of a yardstick's speed."""

from collections.abc import Mapping, Sequence

from fastkit.errors import FastkitError
from fastkit.lab.plots.paper import BAD, GOOD, GREY, LINE_INCHES, Picture, picture, sheet

OTHERS = {**BAD, "facecolor": "white", "edgecolor": GREY}
PLATE = dict(facecolor="white", edgecolor="none", pad=0.6)  # where a label crosses the yardstick
GAP = 0.7  # between groups, in bars


@picture
def shares(groups: Mapping[str, Sequence[dict]], source: str) -> Picture:
    """A group of bars for each operation: the share of the yardstick's speed that ours and others' reach.

    groups  {operation: rows of fastkit.lab.bench with `ours` beside: dicts of who, median_ms, floor_ms, ours};
            bars of others are hatched, the best of ours in each group is in the headline
    source  which card measured it, and when

    Raises FastkitError for no groups, or one without rows of ours.
    """
    best = [max((_share(row) for row in rows if row["ours"]), default=0) for rows in groups.values()]
    if not all(best) or not best:
        raise FastkitError("give groups of rows of who, median_ms, floor_ms and ours, some of them ours")
    headline = f"fastkit on {source}: {min(best):.0%} to {max(best):.0%} of the yardstick's speed"
    bars = sum(map(len, groups.values())) + GAP * len(groups)
    figure, axes = sheet(
        headline, 0.6 + 1.1 * LINE_INCHES * bars,
        "The yardstick: its bytes at a copy's speed, or its operations at cuBLAS's on square matrices, as measured.",
    )  # fmt: skip
    most = max(1.0, *(_share(row) for rows in groups.values() for row in rows))
    y, places = 0.0, []
    for name, rows in groups.items():
        for row in rows:
            share = _share(row)
            axes.barh(y, share, height=0.86, gid=f"{name}: {row['who']}", **(GOOD if row["ours"] else OTHERS))
            label = f"{share:.0%}  {row['who']}, {row['median_ms']:.3g} ms"
            axes.text(share + 0.012, y, label, va="center", fontsize=9, bbox=PLATE)
            y += 1
        places.append(y - (len(rows) + 1) / 2)
        y += GAP
    axes.axvline(1, color="black", linestyle="--", linewidth=1.2, gid="limit", zorder=0)
    axes.set(xlim=(0, 1.6 * most), ylim=(y - GAP, -0.7))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "yardstick"])
    axes.set_yticks(places, list(groups))
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.spines["left"].set_visible(False)
    return figure


def _share(row: dict) -> float:
    return row["floor_ms"] / row["median_ms"]
