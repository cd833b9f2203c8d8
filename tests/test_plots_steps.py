"""The pictures of speed against memory, and of shares of the limit's speed, show what they are given."""

import itertools

import pytest
from matplotlib.text import Text
from test_plots import check, says, texts

from fastkit.errors import FastkitError
from fastkit.lab.plots.shares import shares
from fastkit.lab.plots.steps import ours_and_peers, speed_against_memory
from fastkit.models.plans import PLANS

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


# --- ours beside others'


def step(who, gib, rate, ours=True, fp8=False):
    return {"who": who, "gib": gib, "tokens_per_second": rate, "ours": ours, "fp8": fp8}


PEERS = [step("Unsloth", 6.4, 11400.0, ours=False), step("Liger, nothing recomputed", 40.6, 13700.0, ours=False)]


def test_each_contender_stands_where_it_is_by_its_name():
    rows = [
        *PEERS,
        step("keep", 27.6, 17400.0),
        step("leanest", 5.3, 13200.0),
        step("keep, fp8", 27.7, 22000.0, fp8=True),
    ]
    figure = ours_and_peers(rows, "A step of a model", "Some card, 2026-11-24")
    check(figure)
    assert figure.headline == "fastkit on Some card, 2026-11-24: 17,400 tokens/s in 27.6 GiB, or 13,200 in 5.3"
    drawn = [(line.get_gid(), line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines]
    kinds = ["others", "others", "ours", "ours", "ours in FP8"]
    assert drawn == [(kind, row["gib"], row["tokens_per_second"]) for kind, row in zip(kinds, rows, strict=True)]
    assert {row["who"] for row in rows} <= set(texts(figure)) and says(figure, "A step of a model")
    colours = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert colours["keep"] == colours["keep, fp8"] != colours["Unsloth"]


def test_names_of_many_contenders_do_not_cover_each_other():
    rows = PEERS + [step(name, 5 * 1.2**n, 12700 + 600 * n) for n, name in enumerate(PLANS)]
    rows += [step(f"auto {gib} GiB", gib - 0.4, 13000 + 180 * gib) for gib in (6, 8, 12, 16, 24)]
    figure = ours_and_peers(rows, "A step of a model", "Some card, 2026-11-24")
    check(figure)
    renderer = figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in figure.axes[0].texts]
    assert len(boxes) == len(rows) and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_ours_must_be_among_them():
    with pytest.raises(FastkitError, match="some of them ours"):
        ours_and_peers(PEERS, "A step", "Some card")


# --- shares of the limit's speed


def timed(who, ms, floor=0.2, ours=False):
    return {"who": who, "median_ms": ms, "floor_ms": floor, "ours": ours}


def test_bars_are_as_long_as_their_share():
    groups = {
        "copy": [timed("first", 4.0, ours=True), timed("last", 0.25, ours=True), timed("torch", 0.2)],
        "matmul": [timed("fastkit", 1.6, 2.0, ours=True), timed("cuBLAS", 2.5, 2.0)],
    }
    figure = shares(groups, "Some card, 2026-11-24")
    check(figure)
    assert figure.headline == "fastkit on Some card, 2026-11-24: 80% to 125% of the yardstick's speed"
    drawn = {patch.get_gid(): (patch.get_width(), patch.get_hatch()) for patch in figure.axes[0].patches}
    for name, rows in groups.items():
        for row in rows:
            width, hatch = drawn.pop(f"{name}: {row['who']}")
            assert width == row["floor_ms"] / row["median_ms"] and bool(hatch) != row["ours"]
    assert not drawn and {"80%  last, 0.25 ms", "125%  fastkit, 1.6 ms"} <= set(texts(figure))


@pytest.mark.parametrize("groups", [{}, {"copy": [timed("torch", 0.2)]}])
def test_a_group_needs_one_of_ours(groups):
    with pytest.raises(FastkitError, match="some of them ours"):
        shares(groups, "Some card")
