"""Lanes that talk: a warp's sum by shuffles, step by step."""

from fastkit.errors import FastkitError
from fastkit.lab.layouts import LANES
from fastkit.lab.plots.paper import BLUE, EMPTY, FAINT, GOOD, INK, Picture, box, picture, plural, sheet

STEPS = (16, 8, 4, 2, 1)  # lane i takes the value of lane i ^ d


@picture
def butterfly(step: int = 5, lane: int = 0) -> Picture:
    """A warp's sum after `step` of the butterfly's 5 steps, lane i having begun with i + 1.

    lane  whose number is followed back: blue are all that have gone into it

    Raises FastkitError for a step or a lane that there is not.
    """
    if not (0 <= step <= len(STEPS) and 0 <= lane < LANES):
        raise FastkitError(f"no step {step} of lane {lane}: there are steps 0 to {len(STEPS)}, lanes 0 to {LANES - 1}")
    rows = [[i + 1 for i in range(LANES)]]
    for d in STEPS[:step]:
        rows.append([rows[-1][i] + rows[-1][i ^ d] for i in range(LANES)])
    sources = [{lane}]  # from the last row upwards: whose numbers are in it
    for d in reversed(STEPS[:step]):
        sources.insert(0, sources[0] | {i ^ d for i in sources[0]})
    headline = (
        f"After {plural(step, 'shuffle')}, lane {lane} holds the sum of {plural(2**step, 'lane')}: {rows[-1][lane]}"
    )
    figure, axes = sheet(headline, 0.5 + 0.75 * len(rows))
    for y, row in enumerate(rows):
        for i, number in enumerate(row):
            mine = i in sources[y]
            box(axes, i, 1.6 * y, 1, 0.7, "in the sum" if mine else "lane", **(GOOD if mine else EMPTY))
            color = "white" if mine else INK
            axes.text(i + 0.5, 1.6 * y + 0.35, str(number), ha="center", va="center", fontsize=9, color=color)
        if y:
            d = STEPS[y - 1]
            for i in sorted(range(LANES), key=lambda i: i in sources[y]):  # blue lines last, above the others
                mine = i in sources[y]
                for source in (i, i ^ d):
                    axes.plot(
                        [source + 0.5, i + 0.5], [1.6 * (y - 1) + 0.7, 1.6 * y],
                        color=BLUE if mine else FAINT, linewidth=1.0 if mine else 0.6, gid="mine" if mine else "other",
                    )  # fmt: skip
    axes.set(xlim=(0, LANES), ylim=(1.6 * len(rows) - 0.8, -0.1))
    names = ["lane's own", *(f"+ lane i ^ {d}" for d in STEPS[:step])]
    axes.set_yticks([1.6 * y + 0.35 for y in range(len(rows))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
