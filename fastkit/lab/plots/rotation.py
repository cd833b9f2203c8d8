"""Rotary positions: pairs of a query and a key, each turned by its token's position."""

import math

import numpy as np
from matplotlib.patches import Circle

from fastkit.errors import FastkitError
from fastkit.lab.plots.paper import BLUE, GREY, VERMILION, Picture, blank, picture

PAIRS = 4  # of a head of 8 numbers
BASE = 10000.0  # of the frequencies, as in Llama and Mistral
QUERY, KEY = (20.0, 70.0, 130.0, 200.0), (50.0, 20.0, 160.0, 250.0)  # degrees of each pair at position 0


@picture
def rotation(query: int = 8, key: int = 3) -> Picture:
    """The pairs of a head of 8 numbers, of a query at position `query` and a key at position `key`.

    All pairs have length 1, so that the dot product is the sum of the cosines of the angles between them.

    Raises FastkitError for positions below 0.
    """
    if query < 0 or key < 0:
        raise FastkitError(f"positions {query} and {key}: a token's position is 0 or more")
    theta = BASE ** (-np.arange(PAIRS) / PAIRS)
    q, k = (np.radians(start) + position * theta for start, position in ((QUERY, query), (KEY, key)))
    dot = float(np.cos(q - k).sum())
    headline = f"Query at {query}, key at {key}: q · k = {dot:.2f}, as wherever they are {query - key} tokens apart"
    figure = blank(headline, 2.6, "Pair i turns by position · theta_i. Only the angle between q and k counts.")
    for i, axes in enumerate(figure.subplots(1, PAIRS)):
        axes.add_artist(Circle((0, 0), 1, fill=False, edgecolor=GREY, linewidth=1.0))
        for name, angle, start, color, style in (
            ("q", q[i], QUERY[i], BLUE, "-"), ("k", k[i], KEY[i], VERMILION, "--")
        ):  # fmt: skip
            first = math.radians(start)
            axes.plot([0, math.cos(first)], [0, math.sin(first)], color=color, linewidth=0.8, linestyle=":")
            axes.plot([0, math.cos(angle)], [0, math.sin(angle)], color=color, linewidth=2.2, linestyle=style, gid=name)
            axes.text(1.2 * math.cos(angle), 1.2 * math.sin(angle), name, ha="center", va="center", color=color)
        between = abs((math.degrees(q[i] - k[i]) + 180) % 360 - 180)
        axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", title=f"pair {i}: theta = {theta[i]:.3g}")
        axes.set_xlabel(f"{between:.0f}° apart")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    return figure
