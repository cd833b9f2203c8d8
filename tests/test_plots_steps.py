"""The picture of speed against memory shows what it is given."""

import pytest
from test_plots import check, texts

from fastkit.errors import FastkitError
from fastkit.lab.plots.steps import speed_against_memory

MODEL = [
    {"who": "keep", "gib": 28.0, "tokens_per_second": 17000.0},
    {"who": "leanest", "gib": 6.0, "tokens_per_second": 12000.0},
]


@pytest.mark.parametrize("measured", [[], [{**row, "gib": row["gib"] + 1} for row in MODEL]])
def test_points_stand_where_they_are(measured):
    figure = speed_against_memory(MODEL, measured, "measured now on a card" if measured else "")
    check(figure)
    extra = 1 if measured else 0
    assert figure.headline == f"keep: 17,000 tokens/s in {28 + extra}.0 GiB; leanest: 12,000 in {6 + extra}.0"
    lines = {line.get_gid(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines["predicted"] == [28.0, 6.0] and lines.get("measured") == ([29.0, 7.0] if measured else None)
    assert {"keep", "leanest"} <= set(texts(figure))


def test_one_row_needs_no_comparison():
    assert speed_against_memory(MODEL[:1]).headline == "keep: 17,000 tokens/s in 28.0 GiB"


def test_measured_points_need_a_source():
    with pytest.raises(FastkitError, match="for measured ones their source"):
        speed_against_memory(MODEL, MODEL)
    with pytest.raises(FastkitError, match="give rows of who"):
        speed_against_memory([])
