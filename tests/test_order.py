"""Batches of like length, in an order that seed and epoch decide."""

import random

from hypothesis import given
from hypothesis import strategies as st

from fastkit.train.order import LengthGrouped


@given(
    lengths=st.lists(st.integers(1, 500), max_size=300),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 5),
)
def test_every_record_comes_once_and_seed_and_epoch_decide_the_order(lengths, batch_size, seed, epoch):
    first, second = LengthGrouped(lengths, batch_size, seed), LengthGrouped(lengths, batch_size, seed)
    for order in (first, second):
        order.set_epoch(epoch)
    assert list(first) == list(first) == list(second)
    assert sorted(first) == list(range(len(lengths))) and len(first) == len(lengths)


def test_epochs_and_seeds_differ_and_little_is_padded():
    lengths = [random.Random(n).randint(20, 400) for n in range(400)]
    order = LengthGrouped(lengths, 4, seed=0)
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first != list(LengthGrouped(lengths, 4, seed=1))
    batches = [[lengths[i] for i in first[n : n + 4]] for n in range(0, 400, 4)]
    padded = sum(4 * max(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    widths = [max(batch) for batch in batches]
    assert widths != sorted(widths), "the batches themselves come in no order of length"
