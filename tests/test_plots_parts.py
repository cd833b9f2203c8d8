"""The pictures of a loss without logits show what they are given."""

import pytest
from test_plots import check, texts

from fastkit.errors import FastkitError
from fastkit.lab.plots.parts import PARTS, by_part_size, logits_by_parts, stacks


def heights(figure, gid):
    return [patch.get_height() for axes in figure.axes for patch in axes.patches if patch.get_gid() == gid]


@pytest.mark.parametrize(
    ("step", "parts", "headline"),
    [
        (1, 1, "Part 1 of 1: 500 MiB of logits are there, of 500"),
        (3, 8, "Part 3 of 8: 62.5 MiB of logits are there, of 500"),
        (32, 32, "Part 32 of 32: 15.62 MiB of logits are there, of 500"),
    ],
)
def test_a_part_goes_all_the_way(step, parts, headline):
    figure = logits_by_parts(step, parts)
    check(figure)
    assert figure.headline == headline
    assert heights(figure, "logits") == [8192 / parts] and len(heights(figure, "at work")) == 2
    assert len(heights(figure, "dhidden")) == step - 1 and len(heights(figure, "to come")) == parts - step


@pytest.mark.parametrize(("step", "parts"), [(0, 8), (9, 8), (1, 8193)])
def test_a_part_that_there_is_not(step, parts):
    with pytest.raises(FastkitError, match=f"no part {step} of {parts}: give parts from 1 to 8192"):
        logits_by_parts(step, parts)


def test_bars_are_as_long_as_their_parts():
    figure = stacks({"all": {"logits": 2.0, "softmax": 4.0}, "part": {"a part": 0.25}}, "GiB in all", "counted")
    check(figure)
    assert figure.headline == "all: 6 GiB in all; part: 0.25" and figure.axes[0].get_xlabel() == "GiB"
    widths = {patch.get_gid(): patch.get_width() for patch in figure.axes[0].patches}
    assert widths == {"logits": 2.0, "softmax": 4.0, "a part": 0.25}
    assert "a part 0.25" in texts(figure) and "logits\n2" in texts(figure)


def test_a_part_has_one_colour_and_no_other_part_has_it():
    first = {f"part {n}": 1.0 for n in range(8)}
    figure = stacks({"first": first, "second": {"of its own": 1.0} | dict(reversed(first.items()))})
    colours = {}
    for patch in figure.axes[0].patches:
        colours.setdefault(patch.get_gid(), set()).add(patch.get_facecolor())
    assert len(colours) == len(PARTS) == len(set.union(*colours.values()))
    assert all(len(found) == 1 for found in colours.values())


def test_names_with_commas_stay_apart_outside_of_their_bars():
    figure = stacks({"much": {"x": 100.0, "q, k, v": 2.0, "o": 1.0}, "little": {"q, k, v": 2.0, "a, b": 1.0}})
    check(figure)
    assert {"q, k, v 2; o 1", "q, k, v 2; a, b 1"} <= set(texts(figure))


def test_many_small_parts_take_several_lines_beside_their_bars():
    small = {f"the part of number {n}": 1.0 for n in range(9)}
    figure = stacks({"a long one": {"x": 400.0} | small, "a short one": {"x": 150.0} | small})
    check(figure)
    below, beside = (text.get_text().split("\n") for text in figure.axes[0].texts if text.get_gid() == "small")
    assert len(below) == 2 and len(beside) > 2 and all("number" in line for line in beside)
    assert "; ".join(line.rstrip(";") for line in below) == "; ".join(f"{name} 1" for name in small)
    axes = figure.axes[0].get_window_extent()
    assert axes.width > 0.8 * figure.get_window_extent().width  # not made small by what stands beside


@pytest.mark.parametrize("ways", [{}, {"one": {"logits": -1.0}}])
def test_no_parts_are_no_picture(ways):
    with pytest.raises(FastkitError, match="at least one way"):
        stacks(ways)


MODEL = [{"rows": rows, "ms": ms, "mib": rows / 16} for rows, ms in ((64, 21.0), (256, 7.0), (1024, 7.0))]


@pytest.mark.parametrize("measured", [[], [{**row, "ms": 1.1 * row["ms"]} for row in MODEL[1:]]])
def test_the_smallest_part_is_held_against_the_best(measured):
    figure = by_part_size(MODEL, measured, "measured now on a card" if measured else "", chosen=1024)
    check(figure)
    rows, times = (256, "1") if measured else (64, "3")
    assert figure.headline == f"Parts of {rows} rows take {times} times as long as the best"
    lines = {line.get_gid(): list(line.get_ydata()) for axes in figure.axes for line in axes.lines}
    assert lines["model ms"] == [21.0, 7.0, 7.0] and ("measured ms" in lines) == bool(measured)


def test_measured_points_need_a_source():
    with pytest.raises(FastkitError, match="for measured ones their source"):
        by_part_size(MODEL, MODEL)
    with pytest.raises(FastkitError, match="give the model's rows"):
        by_part_size([])
