"""The gradient of a norm, drawn for a row of two numbers."""

import math

import numpy as np
from matplotlib.patches import Circle

from fastkit.errors import FastkitError
from fastkit.lab.plots.paper import BLUE, GREY, INK, VERMILION, Picture, picture, sheet

X_ANGLE = 35  # degrees; of the row that is drawn


@picture
def tangent(angle: float = 80, length: float = 2.0) -> Picture:
    """What the backward of RMSNorm makes of wdy, the gradient of x_hat, for a row x of two numbers.

    angle   of wdy against x, in degrees
    length  of x, in lengths of x_hat: 1 / rstd

    Raises FastkitError for a length that is not positive.
    """
    if not length > 0:
        raise FastkitError(f"a row of length {length:g} has no norm: give a length above 0")
    direction = np.array([math.cos(math.radians(X_ANGLE)), math.sin(math.radians(X_ANGLE))])
    x_hat = math.sqrt(2) * direction  # mean(x_hat²) = 1
    turned = math.radians(X_ANGLE + angle)
    wdy = 1.3 * np.array([math.cos(turned), math.sin(turned)])
    c = (x_hat * wdy).mean()
    rest = wdy - x_hat * c
    dx, dropped = rest / length, abs(math.cos(math.radians(angle)))
    slower = "as long as" if length == 1 else f"1/{length:g} of" if length > 1 else f"{1 / length:g} times"
    headline = f"{dropped:.0%} of wdy's length points along the row and is dropped; dx is {slower} the rest"
    figure, axes = sheet(headline, 4.1, f"c = mean(x_hat * wdy) = {c:.3g}, rstd = {1 / length:.3g}")
    axes.add_artist(Circle((0, 0), math.sqrt(2), fill=False, edgecolor=GREY, linewidth=1.2))
    far = max(length, 1.0) * x_hat + 0.6 * direction
    axes.plot([0, far[0]], [0, far[1]], color=GREY, linestyle=":", linewidth=1.0)
    axes.plot(*x_hat, marker="o", color=INK, gid="x_hat")
    axes.plot(*(length * x_hat), marker="s", color=INK, gid="x")
    axes.annotate("x_hat", x_hat, (6, -14), textcoords="offset points")
    if abs(length - 1) > 0.1:
        axes.annotate("x", length * x_hat, (6, -14), textcoords="offset points")
    arrows = (("wdy", x_hat, wdy, INK), ("x_hat * c", x_hat, x_hat * c, VERMILION), ("dx", length * x_hat, dx, BLUE))
    for name, start, step, color in arrows:
        end = start + step
        look = dict(arrowstyle="-|>", color=color, linewidth=2, shrinkA=0, shrinkB=0)
        axes.annotate("", end, start, arrowprops=look, gid=name)
        if np.hypot(*step) > 0.12:
            axes.annotate(name, end, (4, 4), textcoords="offset points", color=color)
    axes.plot(*zip(x_hat + wdy, x_hat + x_hat * c, strict=True), color=GREY, linestyle="--", linewidth=1.0)
    points = np.array([[-1.6, -0.3], far, x_hat + wdy, x_hat + x_hat * c, length * x_hat + dx])
    low, high = points.min(0) - 0.25, points.max(0) + 0.45
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal", xlabel="first number of the row")
    axes.set_ylabel("second number")
    return figure
