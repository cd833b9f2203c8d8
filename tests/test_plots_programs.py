"""Pictures of programs, of transfers and of talking lanes show what they are given."""

import numpy as np
import pytest
from test_plots import check, texts

from fastkit.errors import FastkitError
from fastkit.kernels.ladders import add, softmax
from fastkit.lab import blocks
from fastkit.lab.plots.lanes import butterfly
from fastkit.lab.plots.programs import programs, transfers


def add_in_blocks(n, BLOCK):
    memory = blocks.Memory()
    x, y, out = memory.put("x", range(n)), memory.put("y", range(n)), memory.room("out", n)
    return blocks.launch(add._grid_kernel, blocks.cdiv(n, BLOCK), x, y, out, n, BLOCK=BLOCK)


def boxes(figure, gid):
    return [patch.get_x() for axes in figure.axes for patch in axes.patches if patch.get_gid() == gid]


@pytest.mark.parametrize(
    ("n", "BLOCK", "headline"),
    [
        (22, 8, "3 programs store 22 numbers; 2 lanes are masked"),
        (8, 8, "1 program stores 8 numbers; no lane is masked"),
        (7, 4, "2 programs store 7 numbers; 1 lane is masked"),
    ],
)
def test_programs_are_drawn_over_their_numbers(n, BLOCK, headline):
    figure = programs(add_in_blocks(n, BLOCK), "out")
    check(figure)
    assert figure.headline == headline
    assert boxes(figure, "lane") == list(range(n))
    assert boxes(figure, "masked lane") == list(range(n, -(-n // BLOCK) * BLOCK))
    assert len(boxes(figure, "number")) == n


def test_programs_of_a_tensor_that_nobody_touched():
    with pytest.raises(FastkitError, match="no program touched 'z': this launch touched x, y, out"):
        programs(add_in_blocks(4, 4), "z")


def test_long_tensors_carry_no_numbers():
    figure = programs(add_in_blocks(100, 32), "x")
    assert figure.headline == "4 programs load 100 numbers; 28 lanes are masked" and "99" not in texts(figure)


def test_transfers_are_those_that_were_made():
    def run(kernel, BLOCK_N):
        memory = blocks.Memory()
        x, y = memory.put("x", np.arange(60)), memory.room("y", 60)
        return blocks.launch(kernel, 3, x, y, 20, 20, 20, BLOCK_N=BLOCK_N)

    figure = transfers({"three": run(softmax._three_pass_kernel, 8), "one": [run(softmax._fused_kernel, 32)]}, 60)
    check(figure)
    assert figure.headline == "three: 4 transfers; one: 2"
    assert len(boxes(figure, "read")) == 3 + 1 and len(boxes(figure, "write")) == 2
    assert {"three: 4", "one: 2", "read x", "write y"} <= set(texts(figure))


@pytest.mark.parametrize("step", range(6))
def test_a_butterfly_adds_twice_as_many_lanes_in_each_step(step):
    figure = butterfly(step, lane=5)
    check(figure)
    distances = (16, 8, 4, 2, 1)[:step]
    sources = [i for i in range(32) if (i ^ 5) & ~sum(distances) == 0]
    assert figure.headline.endswith(
        f"lane 5 holds the sum of {2**step} lane{'s' * (step > 0)}: {sum(sources) + 2**step}"
    )
    assert len(boxes(figure, "in the sum")) == 2 ** (step + 1) - 1
    with pytest.raises(FastkitError, match="steps 0 to 5"):
        butterfly(6)
