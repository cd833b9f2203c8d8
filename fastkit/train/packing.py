"""Short records laid end to end in rows, none of which sees another: a pass then holds tokens, and hardly any padding.

What keeps records apart are positions that begin anew at each: with `position_ids`, no attention mask and no cache,
transformers (5.17 to 5.24; sdpa and eager, whatever the rows; flash attention in a batch of one row alone) masks what
lies before the latest position that does not follow the one before it. Fused layers read that mask (see
`fastkit.models.sequences`). A record's first token is no target, for the token before it is of another record.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from fastkit.train import data

Row = tuple[int, ...]  # indices of records


def best_fit(lengths: Sequence[int], order: Sequence[int], room: int) -> list[Row]:
    """`order`, indices of `lengths`, in rows of at most `room` tokens: best fit decreasing (Johnson, 1974).

    The longest record first, each into the row in which it leaves least room, else into a new one; of one length, in
    the order given. How many rows there are, and of what lengths, does not depend on the order. Lengths lie between 1
    and `room`.
    """
    rows: list[list[int]] = []
    by_room = defaultdict(list)  # rows, by the tokens that they still take
    some = 0  # bit n: there are rows that still take n tokens
    for index in sorted(order, key=lengths.__getitem__, reverse=True):
        fits = some >> lengths[index]
        if fits:
            left = lengths[index] + (fits & -fits).bit_length() - 1  # the lowest bit's
            row = by_room[left].pop()
            if not by_room[left]:
                some ^= 1 << left
        else:
            left, row = room, []
            rows.append(row)
        row.append(index)
        left -= lengths[index]
        by_room[left].append(row)
        some |= 1 << left
    return [tuple(row) for row in rows]


class PackedOrder(Sampler[Row]):
    """Rows of records for `Rows`: each record once, in another order each epoch, the same number of rows in all.

    In each epoch records are shuffled, packed by `best_fit` (so that those of one length change places), and the rows
    shuffled. The order is a function of seed and epoch alone; `set_epoch` is called by the Trainer, which takes every
    epoch to be as long as the first.

    A step is `per_step` rows, in batches of `batch_size` for each of `processes`; which rows, does not depend on the
    latter two. They are dealt out to the processes to and fro, the dearest first: what two processes do in a step
    differs by no more than the dearest row and the cheapest, and the batches of one pass are alike. Empty rows make up
    the last pass of an epoch.

    A row's cost counts operations in a decoder layer of hidden size H: a record of n tokens takes 24 n H^2 in the
    products with some 12 H^2 weights and 2 n^2 H in causal attention; in units of the former, n + n^2 / 12 H.
    """

    def __init__(
        self, lengths: Sequence[int], room: int, batch_size: int, per_step: int, processes: int, hidden: int, seed: int
    ):
        self.lengths, self.room, self.hidden, self.seed, self.epoch = lengths, room, hidden, seed, 0
        self.batch_size, self.per_step, self.processes = batch_size, per_step, processes
        self.rows = len(best_fit(lengths, range(len(lengths)), room))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows + -self.rows % (self.batch_size * self.processes)

    def __iter__(self) -> Iterator[Row]:
        shuffle = random.Random(f"{self.seed} {self.epoch}").shuffle
        order = list(range(len(self.lengths)))
        shuffle(order)
        rows = best_fit(self.lengths, order, self.room)
        shuffle(rows)
        for start in range(0, len(rows), self.per_step):
            yield from self._dealt(rows[start : start + self.per_step])

    def _dealt(self, rows: list[Row]) -> Iterator[Row]:
        """The rows of a step as accelerate hands them out: a batch to each process, then the next pass."""
        rows = sorted(rows, key=self.cost, reverse=True)
        rows += [()] * (-len(rows) % (self.batch_size * self.processes))
        rounds = [rows[n : n + self.processes] for n in range(0, len(rows), self.processes)]  # a row to each process
        for one in rounds[1::2]:
            one.reverse()
        for start in range(0, len(rounds), self.batch_size):
            for process in range(self.processes):
                yield from (one[process] for one in rounds[start : start + self.batch_size])

    def tokens(self, row: Row) -> int:
        return sum(self.lengths[record] for record in row)

    def cost(self, row: Row) -> float:
        return sum(n + n * n / (12 * self.hidden) for n in map(self.lengths.__getitem__, row))

    def __str__(self) -> str:
        records, full = len(self.lengths), sum(self.lengths) / (self.rows * self.room)
        return (
            f"packing: {records:,} records in {self.rows:,} rows of {self.room} tokens, {full:.1%} full; a step's "
            f"{self.per_step} rows hold some {min(records, self.per_step * records / self.rows):,.0f} records"
        )


class Rows(torch.utils.data.Dataset):
    """A tokenized dataset as `PackedOrder` asks for it, by rows: each a list of its records."""

    def __init__(self, records: Dataset, order: PackedOrder):
        self.records, self.order = records, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, row: Row) -> list[dict]:
        return self.records.__getitems__(list(row))


class RowCollator(data.Collator):
    """Rows of tokenized records -> one batch, padded on the right to its longest row.

    The call takes a list of rows, lists of {input_ids, labels}, and returns what `data.Collator` does, with
    `position_ids` for `attention_mask`: from 0 in each record, and below 0 in padding, by which it can be told. A
    record alone is a row of its own, and empty rows are left out; where all are empty, the batch is one padding token.

    width   of every batch, for CUDA graphs: then rows come in one length, with no `logits_to_keep` or `shift_labels`
    """

    def __init__(self, pad_token_id: int, width: int | None = None):
        super().__init__(pad_token_id, width)
        self.width = width

    def __call__(self, rows: Sequence[list[dict] | dict]) -> dict[str, torch.Tensor]:
        rows = [row if isinstance(row, list) else [row] for row in rows]
        empty = {"input_ids": [self.pad_token_id], "labels": [data.IGNORE]}
        batch = super().__call__([_laid(row) for row in rows if row] or [empty])
        if self.width:
            del batch["logits_to_keep"], batch["shift_labels"]
        lengths = [[len(record["input_ids"]) for record in row] for row in rows if row] or [[]]
        width = batch.pop("attention_mask").shape[1]
        batch["position_ids"] = torch.stack(
            [torch.cat([*map(torch.arange, row), torch.arange(sum(row) - width, 0)]) for row in lengths]
        )
        return batch


def _laid(row: list[dict]) -> dict[str, list[int]]:
    """The records of a row as one, in which no record's first token is a target."""
    return {
        "input_ids": [token for record in row for token in record["input_ids"]],
        "labels": [label for record in row for label in [data.IGNORE, *record["labels"][1:]]],
    }
