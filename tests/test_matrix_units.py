"""Multiplying instructions are counted as PTX has them, and drawn as they are counted."""

from collections import Counter

import pytest
import torch
from compiled import compile_all
from hypothesis import given
from hypothesis import strategies as st

from fastkit.errors import FastkitError
from fastkit.kernels.ladders import matmul
from fastkit.lab.matrix_units import Multiply, multiplies, thrown_away
from fastkit.lab.plots.matrix_units import cover

pytest.importorskip("triton")


def compiled(arch, dtype=torch.float16, launch=matmul.launch_tensor_cores, **tiling):
    x = torch.empty(1024, 1024, dtype=dtype, device="meta")
    (made,) = compile_all(lambda: launch(x, x, x if dtype.itemsize > 1 else x.half(), **tiling), arch)
    return made


@pytest.mark.parametrize(
    ("arch", "dtype", "tiling", "expected"),
    [
        ("sm_75", torch.float16, {}, ("FMA", (1, 1, 1), "f32", 1024)),
        ("sm_80", torch.float16, {}, ("HMMA", (16, 8, 16), "f16", 16)),
        ("sm_89", torch.bfloat16, {}, ("HMMA", (16, 8, 16), "bf16", 16)),
        ("sm_89", torch.float32, {}, ("HMMA", (16, 8, 8), "tf32", 32)),
        ("sm_89", torch.float8_e4m3fn, {}, ("HMMA", (16, 8, 32), "e4m3", 8)),
        ("sm_90", torch.float16, {}, ("WGMMA", (64, 64, 16), "f16", 2)),
        ("sm_90", torch.float16, {"num_warps": 2}, ("HMMA", (16, 8, 16), "f16", 32)),
        ("sm_90", torch.float8_e4m3fn, {}, ("WGMMA", (64, 64, 32), "e4m3", 1)),
    ],
)
def test_what_multiplies(arch, dtype, tiling, expected):
    made = compiled(arch, dtype, **tiling)
    (kind,) = multiplies(made)
    name, shape, factors, count = expected
    products = 64 * 64 * 32  # of tiles in which nothing is thrown away
    assert kind == Multiply(name, shape, factors, "f32", count, products)
    assert kind.tensor_cores == (name != "FMA")
    assert thrown_away(made, (64, 64, 32)) == 0


def test_counts_are_those_of_the_compile_report():
    made = compiled("sm_89", BLOCK_M=128, BLOCK_N=128)
    assert sum(kind.count for kind in multiplies(made)) == made.instructions["HMMA"] == 64


@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (16, 16), (8, 8), (64, 64), (16, 64), (128, 64)])
def test_the_picture_throws_away_what_the_code_does(rows, columns):
    made = compiled("sm_89", BLOCK_M=rows, BLOCK_N=columns)
    lost = thrown_away(made, (rows, columns, 32))
    headline = cover(rows, columns, 32, (16, 8, 16), made.num_warps).headline
    assert ("nothing thrown away" if lost == 0 else f": {100 * lost:.3g}% of") in headline
    (kind,) = multiplies(made)
    assert f"takes {kind.count * made.num_warps} instructions of 16 × 8 × 16" in headline


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 64))
def test_pieces_cover_the_tile(rows, columns, depth):
    figure = cover(rows, columns, depth)
    drawn = Counter(patch.get_gid() for patch in figure.axes[0].patches)
    assert drawn["piece"] == drawn["wanted"] == -(-rows // 16) * -(-columns // 8)
    wanted = [patch for patch in figure.axes[0].patches if patch.get_gid() == "wanted"]
    assert sum(patch.get_width() * patch.get_height() for patch in wanted) == rows * columns


def test_wgmma_is_shared_by_four_warps():
    assert "takes 2 instructions of 64 × 64 × 16, with nothing" in cover(64, 64, 32, (64, 64, 16), warps=4).headline


def test_nothing_multiplies():
    made = compiled("sm_89", launch=matmul.launch_grouped)
    bare = made.__class__(**{**vars(made), "code": ""})
    assert multiplies(bare) == [] and thrown_away(bare, (64, 64, 16)) is None


@pytest.mark.parametrize("tile", [(0, 8, 8), (8, 300, 8), (8, 8, 0)])
def test_cover_refuses(tile):
    with pytest.raises(FastkitError):
        cover(*tile)
