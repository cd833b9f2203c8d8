"""The pictures of notebooks 14 and 15: levels, bits against error, an adapter beside its weight and inside it."""

import pytest
import torch
from test_plots import check, texts

from fastkit.errors import FastkitError
from fastkit.kernels import nf4, nf4_quantize
from fastkit.lab.plots.adapters import two_ways
from fastkit.lab.plots.four_bits import DRAWN, EVEN, levels, trade


def boxes(figure, gid):
    return [patch for axes in figure.axes for patch in axes.patches if patch.get_gid() == gid]


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_the_error_is_that_of_the_librarys_quantization(blocksize):
    figure = levels(blocksize)
    check(figure)
    x = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))
    packed, absmax = nf4_quantize.reference(x, blocksize)
    weight = nf4.NF4Weight(packed, absmax, x.shape, x.dtype, blocksize, torch.tensor(nf4.CODE))
    off = (nf4.reference(weight) - x).square().mean().sqrt().item()
    assert f"Blocks of {blocksize}: NF4 is off by {off:.1%} of a typical weight" in figure.headline
    for name in ("NF4", "even"):
        used = [bar.get_height() for bar in boxes(figure, f"used {name}")]
        assert len(used) == 16 and sum(used) == pytest.approx(1)
    counts = torch.bincount(torch.cat([packed >> 4, packed & 15]).long(), minlength=16) / DRAWN
    found = [bar.get_height() for bar in boxes(figure, "used NF4")]
    assert found == pytest.approx(counts.tolist(), abs=1e-4)


def test_even_levels_are_even():
    steps = torch.tensor(EVEN).diff()
    assert len(EVEN) == 16 and EVEN[0] == -1 and EVEN[-1] == 1 and torch.allclose(steps, steps[:1])


def test_no_such_blocks():
    with pytest.raises(FastkitError, match="no blocks of 48: NF4 has 32, 64"):
        levels(48)


def test_each_format_has_its_points():
    series = {"one": {64: (4.5, 0.09), 32: (5.0, 0.08)}, "another": {64: (4.1, 0.09)}}
    figure = trade(series, "Bits against error")
    check(figure)
    lines = {line.get_gid(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines == {"format one": [[4.5, 0.09], [5.0, 0.08]], "format another": [[4.1, 0.09]]}
    assert texts(figure).count("64") == 2
    with pytest.raises(FastkitError, match="no format has a point"):
        trade({"one": {}}, "nothing")


@pytest.mark.parametrize(
    ("r", "M", "sizes"),
    [(16, 8192, ("538 MB", "590 KB")), (256, 8192, ("555 MB", "9.44 MB")), (16, 1, ("655 KB", "590 KB"))],
)
def test_what_an_adapter_moves(r, M, sizes):
    figure = two_ways(r, M)
    check(figure)
    assert figure.headline.endswith("beside its weight moves {}, inside it {}".format(*sizes))
    assert f"{M:,} token{'s' * (M > 1)}, rank {r}" in figure.headline
    drawn = {name: boxes(figure, f"matrix {name}") for name in ("x", "y", "Wᵀ", "Aᵀ", "Bᵀ")}
    assert [len(found) for found in drawn.values()] == [3, 4, 2, 2, 2]
    assert drawn["Wᵀ"][0].get_width() == 3.5 and drawn["Wᵀ"][0].get_height() == 1


def test_no_such_adapter():
    with pytest.raises(FastkitError, match="rank 0"):
        two_ways(0)
