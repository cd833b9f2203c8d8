"""Pictures of torch's launches, of a norm's gradient and of turned pairs show what they are given."""

import numpy as np
import pytest
import torch
from test_plots import check

from fastkit.errors import FastkitError
from fastkit.lab.plots.gradients import tangent
from fastkit.lab.plots.passes import Pass, kept, passes, waterfall
from fastkit.lab.plots.rotation import rotation


def rows(device="meta", dtype=torch.float16):
    return torch.empty(6, 10, dtype=dtype, device=device)


def test_each_launch_reads_and_writes_its_tensors_once():
    x, y = rows(), rows()
    assert passes(lambda: x * y) == [Pass("mul", 240, 120)]
    assert passes(lambda: x * x) == [Pass("mul", 120, 120)]
    assert passes(lambda: torch.cat([x, y])) == [Pass("cat", 240, 240)]
    assert passes(lambda: x.float()) == [Pass("to_copy", 120, 240)]
    assert passes(lambda: x.add_(y)) == [Pass("add", 240, 120)]


def test_views_move_nothing_and_expanded_numbers_are_read_once():
    x = rows()
    assert passes(lambda: x.T[:3].reshape(3, 6).detach()) == [] == passes(lambda: torch.empty_like(x))
    assert passes(lambda: x + x[:, :1].expand(6, 10)) == [Pass("add", 120 + 12, 120)]


def test_the_backward_is_watched_too():
    x = rows().requires_grad_()
    names = [one.name for one in passes(lambda: torch.autograd.grad(x.relu(), x, rows()))]
    assert names == ["relu", "threshold_backward"]


def test_what_autograd_keeps_is_told_by_whose_it_is():
    x, w = (rows("cpu").requires_grad_() for _ in range(2))
    assert kept(lambda: x * w, x, w) == (240, 0)
    assert kept(lambda: x * w, x) == (120, 120)
    assert kept(lambda: (2 * x).exp().sin(), x) == (0, 120)  # exp's result is sin's input: one tensor
    assert kept(lambda: x + w, x, w) == (0, 0)


def test_the_waterfall_falls_by_what_is_moved():
    apart = [Pass("a", 2000, 1000), Pass("small", 1, 0), Pass("b", 1000, 1000)]
    figure = waterfall({"apart": apart, "fused": [Pass("c", 2000, 1000)]}, 1000)
    check(figure)
    assert figure.headline == "apart: 3 launches, 5 bytes a number; fused: 1 launch, 3 bytes a number"
    boxes = {gid: [b for b in figure.axes[0].patches if b.get_gid() == gid] for gid in ("read", "written")}
    assert [box.get_width() for box in boxes["read"]] == [2, 1, 2]
    assert [box.get_x() for box in boxes["written"]] == pytest.approx([2, 4.001, 2])
    for nothing in ({}, {"apart": []}):
        with pytest.raises(FastkitError, match="without a launch"):
            waterfall(nothing, 100)


@pytest.mark.parametrize(("angle", "length"), [(0, 2.0), (80, 2.0), (130, 0.5), (90, 1.0)])
def test_the_gradient_of_a_norm_stands_at_right_angles_to_the_row(angle, length):
    figure = tangent(angle, length)
    check(figure)
    arrow = {note.get_gid(): np.subtract(note.xy, note.xyann) for note in figure.axes[0].texts if note.get_gid()}
    (x,) = [line.get_xydata()[0] for line in figure.axes[0].lines if line.get_gid() == "x"]
    assert arrow["dx"] @ x == pytest.approx(0, abs=1e-9)
    assert arrow["wdy"] == pytest.approx(arrow["x_hat * c"] + length * arrow["dx"])
    assert f"{abs(np.cos(np.radians(angle))):.0%} of wdy" in figure.headline


def test_a_row_without_length_has_no_gradient():
    with pytest.raises(FastkitError, match="length above 0"):
        tangent(80, 0.0)


def test_turned_pairs_know_their_distance_alone():
    near, far = rotation(8, 3), rotation(105, 100)
    check(near)
    assert near.headline.partition("q · k")[2] == far.headline.partition("q · k")[2] != ""
    assert near.headline.partition("q · k")[2] != rotation(9, 3).headline.partition("q · k")[2]
    with pytest.raises(FastkitError, match="0 or more"):
        rotation(-1, 3)
