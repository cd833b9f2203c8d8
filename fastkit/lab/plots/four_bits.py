"""Weights in 4 bits: where the 16 levels lie and how often each is used, and bits against error."""

import functools
from collections.abc import Mapping, Sequence

import torch

from fastkit.errors import FastkitError
from fastkit.kernels.nf4 import BLOCKSIZES, CODE
from fastkit.lab.plots.paper import BAD, BLUE, FAINT, GOOD, GREY, INK, Picture, blank, box, key, picture, sheet

EVEN = tuple(2 * i / 15 - 1 for i in range(16))
DRAWN = 2**18  # random numbers, so that errors are right to three digits


@picture
def levels(blocksize: int = 64) -> Picture:
    """NF4's 16 levels and 16 even ones under normal numbers, divided by the largest of each block of `blocksize`.

    Raises FastkitError for a block size that NF4 does not have.
    """
    if blocksize not in BLOCKSIZES:
        raise FastkitError(f"no blocks of {blocksize}: NF4 has {', '.join(map(str, BLOCKSIZES))}")
    numbers, largest = _drawn(blocksize)
    codes = {"NF4": (CODE, GOOD), "even": (EVEN, BAD)}
    indices = {name: _nearest(numbers, code) for name, (code, _) in codes.items()}
    errors = [
        float(((torch.tensor(code)[indices[name]] - numbers) * largest).square().mean().sqrt())
        for name, (code, _) in codes.items()
    ]  # of numbers of standard deviation 1
    figure = blank(
        f"Blocks of {blocksize}: NF4 is off by {errors[0]:.1%} of a typical weight, even levels by {errors[1]:.1%}",
        2.9, "Left: normal numbers, divided by the largest of their block, over the levels. Right: how often each "
        "level is the nearest; the line is a sixteenth.",
    )  # fmt: skip
    density, used = figure.subplots(1, 2)
    heights = torch.histc(numbers, 61, -1, 1)
    edges = torch.linspace(-1, 1, 62)
    density.fill_between(((edges[1:] + edges[:-1]) / 2).tolist(), (heights / heights.max()).tolist(), color=FAINT)
    for row, (name, (code, look)) in enumerate(codes.items()):
        color, y = look["facecolor"], -0.2 - 0.24 * row
        density.vlines(code, y - 0.08, y + 0.08, color=color, linewidth=2, gid=f"levels {name}")
        density.text(-1.04, y, name, ha="right", va="center", fontsize=9)
        share = torch.bincount(indices[name].flatten(), minlength=16) / numbers.numel()
        for index in range(16):
            box(used, index + 0.42 * row - 0.42, 0, 0.42, float(share[index]), f"used {name}", **look)
    used.axhline(1 / 16, color=INK, linestyle="--", linewidth=1, gid="sixteenth")
    density.set(xlim=(-1.22, 1.05), ylim=(-0.62, 1.05), xlabel="weight / largest of its block")
    density.set_yticks([])
    used.set(xlim=(-0.7, 15.7), ylim=(0, 0.22), xlabel="index", ylabel="share of the weights")
    used.set_xticks(range(0, 16, 3))
    key(figure, {name: look for name, (_, look) in codes.items()})
    return figure


@functools.cache
def _drawn(blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(normal numbers [blocks, blocksize] over the largest magnitude of their block, that magnitude [blocks, 1])."""
    x = torch.randn(DRAWN // blocksize, blocksize, generator=torch.Generator().manual_seed(0))
    largest = x.abs().amax(1, keepdim=True)
    return x / largest, largest


def _nearest(numbers: torch.Tensor, code: Sequence[float]) -> torch.Tensor:
    ascending = torch.tensor(code)
    return torch.bucketize(numbers, (ascending[1:] + ascending[:-1]) / 2)


@picture
def trade(series: Mapping[str, Mapping[int, tuple[float, float]]], headline: str) -> Picture:
    """What a format costs in bits and how far off it is, a line a format, a point a block size.

    series  by name: {block size: (bits a weight, error as a share of a typical weight)}

    Raises FastkitError where there is no point.
    """
    if not any(series.values()):
        raise FastkitError("no format has a point: give {block size: (bits, error)}")
    figure, axes = sheet(headline, 3.3)
    looks = (
        (dict(marker="o", color=BLUE), dict(xytext=(-5, -4), ha="right", va="top")),
        (dict(marker="s", color=INK, markerfacecolor="white"), dict(xytext=(5, 4))),
        (dict(marker="x", color=GREY), dict(xytext=(5, 4))),
    )
    for (name, points), (look, beside) in zip(series.items(), looks, strict=False):
        axes.plot(*zip(*points.values(), strict=True), label=name, linewidth=1, gid=f"format {name}", **look)
        for blocksize, (bits, error) in points.items():
            axes.annotate(
                str(blocksize), (bits, error), textcoords="offset points", fontsize=9, color=GREY, gid="size", **beside
            )
    low, high = axes.get_ylim()
    low -= 0.05 * (high - low)  # for the label below the lowest point
    axes.set(xlabel="bits a weight, scales included", ylabel="error", ylim=(low, high))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.1%}")
    axes.legend(loc="upper right", fontsize=9)
    return figure
