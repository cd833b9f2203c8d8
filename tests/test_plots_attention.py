"""Pictures of attention show the blocks that are computed and the memory that was measured."""

import itertools
import random
from functools import partial
from unittest import mock

import pytest
import torch
from test_plots import check, drawn, says

from fastkit.errors import FastkitError
from fastkit.kernels import attention_forward
from fastkit.kernels.attention import seen_pairs
from fastkit.lab.plots.attention import ScoreBlock, memory_growth, score_blocks, score_blocks_of
from fastkit.lab.tracer import trace_launches


@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_those_with_a_pair_that_is_seen(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 70) for _ in range(draw.randint(1, 3))]
    block_m, block_n, causal = draw.randint(1, 20), draw.randint(1, 20), draw.random() < 0.8
    window = draw.choice([None, draw.randint(1, 40)]) if causal else None
    expected = []
    for start, T in zip(itertools.accumulate((0, *lengths)), lengths, strict=False):
        seen = seen_pairs(T, T, causal, window)
        seen = torch.ones(T, T, dtype=torch.bool) if seen is None else seen
        for m, n in itertools.product(range(0, T, block_m), range(0, T, block_n)):
            block = seen[m : m + block_m, n : n + block_n]
            if block.any():
                whole = block.shape[1] == block_n and bool(block.all())
                expected.append(ScoreBlock(start + m, start + n, *block.shape, whole))
    assert score_blocks_of(lengths, block_m, block_n, causal, window) == expected


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 200)])
def test_blocks_are_those_that_the_kernel_loads(causal, window):
    pytest.importorskip("triton")
    q, k, v, o = (torch.zeros(1, 1, 500, 16, dtype=torch.float16) for _ in range(4))
    lse, sizes = torch.zeros(1, 1, 500), {"BLOCK_M": 64, "BLOCK_N": 32}
    launch = partial(attention_forward.launch_forward, q, k, v, o, lse, causal=causal, window=window, scale=0.1)
    with mock.patch.object(attention_forward, "architecture", lambda device: "sm_89"):
        (trace,) = trace_launches(partial(launch, **sizes), arch="sm_89", programs=None)
    asked = sum(access.bytes_asked for access in trace.of("load") if access.argument == "k")
    blocks = score_blocks_of(500, 64, 32, causal, window)
    assert asked == sum(block.keys for block in blocks) * 16 * 2


def test_the_square_of_a_program():
    figure = score_blocks(1024, program=5)
    check(figure)
    assert figure.headline == "36 of the square's 64 blocks are computed; 8 of them need a mask"
    assert says(figure, "Program 5 keeps queries 640 to 767 and walks over 6 blocks of keys.")
    assert drawn(figure)["whole"] == 28 and drawn(figure)["masked"] == 8 and says(figure, "5")


def test_a_program_that_keeps_keys_walks_down():
    figure = score_blocks((384, 256), 64, 64, program=2, keeps="keys")
    check(figure)
    assert figure.headline == "31 of the square's 100 blocks are computed; 10 of them need a mask"
    assert says(figure, "Program 2 keeps keys 128 to 191 and walks over 4 blocks of queries.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lengths=(3, 0)), r"lengths \(3, 0\) in blocks of 128 × 128: give numbers from 1 up"),
        (dict(lengths=8192), "4096 blocks cannot be drawn: take at most 32 on a side"),
        (dict(lengths=256, program=2), "there is no program 2: they are 0 to 1"),
        (dict(lengths=256, keeps="values"), "a program keeps queries or keys, not 'values'"),
    ],
)
def test_squares_that_cannot_be_drawn(arguments, message):
    with pytest.raises(FastkitError, match=message):
        score_blocks(**arguments)


def test_memory_by_tokens():
    rows = [
        {"tokens": tokens, "who": who, "mib": mib}
        for who, sizes in {"lines": (64.0, 256.0, None), "ours": (8.125, 16.25, 32.5)}.items()
        for tokens, mib in zip((1024, 2048, 4096), sizes, strict=True)
    ]
    figure = memory_growth(rows, "measured now on a card of the test", "attention")
    check(figure)
    assert figure.headline == "Memory for 4,096 tokens: lines too much, ours 32.5 MiB"
    (axes,) = figure.axes
    lines = {line.get_gid(): list(line.get_xydata()[-1]) for line in axes.lines}
    assert lines == {"way lines": [2048, 256.0], "way ours": [4096, 32.5]}
    assert says(figure, "lines: more does not fit") and says(figure, "measured now on a card")


def test_memory_without_rows():
    with pytest.raises(FastkitError, match="there are no rows"):
        memory_growth([], "somewhere")
