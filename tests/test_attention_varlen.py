"""Attention of packed sequences: each as if it were alone."""

import math

import pytest
import torch
from attention_case import assert_same, check, inputs, packed, run

from fastkit.ops import attention, attention_varlen

pytestmark = [
    pytest.mark.usefixtures("poisoned", "fresh_seed"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),  # the interpreter's numpy, under a mask
]


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [((5, 40, 1), (5, 40, 1)), ((0, 37, 3), (2, 50, 1)), ((12,), (40,))], ids=str
)
def test_packed_sequences_are_attended_one_by_one(lengths_q, lengths_k, window, dtype, device):
    q, k, v, cu_q, cu_k = packed(lengths_q, lengths_k, 2, 1, 16, dtype, device)
    do = torch.randn_like(q)

    def together(q, k, v):
        return attention_varlen(q, k, v, cu_q, max(lengths_q), True, window, None, cu_k, max(lengths_k))

    def one_by_one(q, k, v):
        return torch.cat([
            attention(*(x.transpose(0, 1)[None] for x in parts), True, window)[0].transpose(0, 1)
            for parts in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
        ])  # fmt: skip

    assert_same(run(together, q, k, v, do), run(one_by_one, q, k, v, do))


def test_packed_sequences_do_not_leak(dtype, device):
    lengths = (20, 30, 7)
    q, k, v, cu, _ = packed(lengths, lengths, 2, 2, 8, dtype, device)
    clean = run(lambda *x: attention_varlen(*x, cu, 30), q, k, v, torch.ones_like(q))
    for x in (q, k, v):
        x[20:50] = math.nan
    leaky = run(lambda *x: attention_varlen(*x, cu, 30), q, k, v, torch.ones_like(q))
    for part in (slice(0, 20), slice(50, None)):
        assert_same([x[part] for x in leaky], [x[part] for x in clean])


def test_cu_seqlens_that_do_not_cover_the_batch():
    q, k, v = (x[0].transpose(0, 1) for x in inputs(1, 2, 2, 6, 6, 8, torch.bfloat16, "cpu"))
    for ends in ([0, 4], [1, 6], [0, 5, 4, 6], [0, 7]):
        with pytest.raises(ValueError, match="must grow from 0 to the total, 6"):
            attention_varlen(q, k, v, torch.tensor(ends).int(), 6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("D", "window"), [(64, None), (96, 300), (128, None), (128, 500), (256, None)])
def test_close_to_the_truth_at_the_library_s_own_tiles(D, window, dtype, device):
    check(attention, *inputs(1, 4, 2, 777, 777, D, dtype, device), True, window)
    lengths = (300, 5, 472)
    q, k, v, cu, _ = packed(lengths, lengths, 4, 2, D, dtype, device)
    o = attention_varlen(q, k, v, cu, 472, True, window)
    parts = [
        attention(*(x.transpose(0, 1)[None] for x in part), True, window)[0].transpose(0, 1)
        for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    assert_same([o], [torch.cat(parts)])
