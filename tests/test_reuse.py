"""Blocks that the programs of a product share: counted, drawn, and the orders that the ladder's kernels really have."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkit.errors import FastkitError
from fastkit.lab.plots.reuse import block_loads
from fastkit.lab.reuse import blocks_loaded, memory_bytes

ROWS = [(row, column) for row in range(9) for column in range(9)]
SQUARE = [(row, column) for row in range(3) for column in range(3)]

ORDERS = """
import json
import torch
from fastkit.kernels.ladders import matmul
from fastkit.lab.reuse import order_of
from fastkit.lab.tracer import trace_launches

a, b, c = torch.empty(96, 32), torch.empty(32, 112), torch.empty(96, 112)
small = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
found = {}
for group in (1, 4, 9):
    launch = lambda: matmul.launch_grouped(a, b, c, GROUP_M=group, **small)
    (trace,) = trace_launches(launch, arch="sm_89", programs=None)
    found[group] = order_of(trace, 112, (16, 16))
try:
    (trace,) = trace_launches(launch, arch="sm_89", programs=8)
    order_of(trace, 112, (16, 16))
except Exception as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


def test_nine_programs():
    assert blocks_loaded(ROWS[:9], 9) == (9, 81)
    assert blocks_loaded(SQUARE, 9) == (27, 27)
    assert blocks_loaded(ROWS, 9) == (81, 81)


def stripes(tiles_m, tiles_n, group):
    """The order that stripes of `group` rows give, written down another way than the kernel does."""
    for first in range(0, tiles_m, group):
        for column in range(tiles_n):
            for row in range(first, min(first + group, tiles_m)):
                yield row, column


def test_the_kernels_order():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ORDERS], env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert "8 of 42 programs were traced" in found.pop("error")
    for group, order in found.items():
        assert list(map(tuple, order)) == list(stripes(6, 7, int(group))), group


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_memory_bytes_counts_waves(group, columns, waves_down, waves_across):
    """Where waves are whole rectangles the model is the count itself."""
    tiles_m, tiles_n = group * waves_down, columns * waves_across
    at_once, depth = group * columns, 3
    order = list(stripes(tiles_m, tiles_n, group))
    counted = 0
    for first in range(0, len(order), at_once):
        of_a, of_b = blocks_loaded(order[first : first + at_once], depth)
        counted += of_a * 32 * 16 + of_b * 16 * 64
    shape = (tiles_m * 32, tiles_n * 64, depth * 16)
    assert memory_bytes(shape, (32, 64), at_once, group, itemsize=1) == pytest.approx(counted)


def test_memory_bytes_of_all_at_once():
    assert memory_bytes((128, 256, 64), (32, 32), 10**6, 8) == (128 + 256) * 64 * 2


def test_block_loads():
    assert block_loads(ROWS).headline == "9 programs at once load 90 blocks: 9 of a and 81 of b"
    figure = block_loads(ROWS, programs=[40])
    assert figure.headline == "1 program at once loads 18 blocks: 9 of a and 9 of b"
    drawn = [patch.get_gid() for axes in figure.axes for patch in axes.patches]
    assert [drawn.count(f"{name} touched") for name in "abc"] == [9, 9, 1]
    assert [text.get_text() for text in figure.axes[2].texts] == [str(number) for number in range(81)]


@pytest.mark.parametrize(("blocks", "programs"), [(0, 1), (17, 1), (9, 0), (9, 82), (9, [81]), (9, [])])
def test_block_loads_refuses(blocks, programs):
    with pytest.raises(FastkitError):
        block_loads(ROWS, blocks, programs)
