"""A prediction held against what was measured: the learner's, the model's, and the number itself, on one scale."""

import math

from fastkit.errors import FastkitError
from fastkit.lab.plots.paper import BAD, EMPTY, GOOD, GREY, Picture, picture, sheet

ONE_LINE = 84  # characters of a headline full of digits, which are wide
CHARACTER = 0.01  # of the axes' width, that a label's character takes at most
AS_GOOD_AS = 0.20  # the model's answer is called near where it is no further off, relatively


@picture
def prediction(mine: float | None, model: float, value: float | None, unit: str, source: str) -> Picture:
    """Three bars: what you said, what the model predicts, what was measured; None for one that is not there.

    Raises FastkitError for a measured value without a source, and for numbers that are none.
    """
    if value is not None and not source:
        raise FastkitError("a measured value needs a source: give Measurement.source")
    for number in (mine, model, value):
        if number is not None and not (isinstance(number, int | float) and math.isfinite(number)):
            raise FastkitError(f"a prediction is a number, not {number!r}")
    bars = [("you said", mine, EMPTY), ("the model predicts", model, BAD), ("measured", value, GOOD)]
    headline = _headline(mine, model, value, unit)
    if len(headline) > ONE_LINE:
        headline = headline.replace("; measured", ";\nmeasured")
    figure, axes = sheet(headline, 1.55, caption=source if value is not None else "")
    reach = max(abs(number) for _, number, _ in bars if number is not None) or 1.0
    low, high = min(0.0, *(1.25 * number for _, number, _ in bars if number is not None)), 1.25 * reach
    for y, (what, number, look) in enumerate(bars):
        axes.barh(y, number or 0, height=0.6, gid=f"bar {what}", **look)
        words = _words(number, unit) if number is not None else "nothing yet" if what == "you said" else "not yet"
        start, width = max(number or 0, 0) + 0.01 * reach, min(CHARACTER * len(words), 0.5)
        axes.text(start, y, words, va="center", color="black" if number else GREY)
        high = max(high, (start - low * width) / (1 - width))  # where these words end
    axes.set(xlim=(low, high), ylim=(2.5, -0.5), xlabel=unit)
    axes.set_yticks(range(3), [what for what, _, _ in bars])
    axes.tick_params(axis="y", length=0)
    return figure


def _words(number: float, unit: str) -> str:
    return f"{number:,.4g} {unit}".rstrip() if abs(number) < 1e4 else f"{number:,.0f} {unit}".rstrip()


def _headline(mine, model, value, unit) -> str:
    said = f"You said {_words(mine, '')}; the" if mine is not None else "The"
    if value is None:
        return f"{said} model says {_words(model, unit)}; not measured yet"
    text = f"{said} model says {_words(model, '')}; measured {_words(value, unit)}"
    if value == model:
        return f"{text}: exactly that"
    off = abs(model / value - 1) if value else math.inf
    near = f"within {_percent(off)}" if off <= AS_GOOD_AS else _times(model, value)
    return f"{text}: the model is {near}"


def _percent(off: float) -> str:
    return f"{max(1, math.ceil(100 * off))}%"


def _times(model: float, value: float) -> str:
    if not value or not model or (model < 0) != (value < 0):
        return "wrong"
    ratio = model / value
    return f"{ratio:.3g} times too high" if ratio > 1 else f"{1 / ratio:.3g} times too low"
