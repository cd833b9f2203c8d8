"""Packed rows that a warm-up runs: one for each binary that hangs on where sequences begin within rows.

Of attention's launches these integers do: the heads of all sequences, those of a section, whose keys fit the L2 cache
together (fewer where the longest sequence is longer), and the strides that are multiples of the batch's tokens: of lse
from head to head, of the others past all rows. Triton compiles anew where one becomes 1, or divisible by 16, or
neither. The longest sequence itself is not compiled for, but a window is, in rows that are longer than it.

RoPE's table has a part for each row of the batch, where without positions all share one: its stride from part to part
is another such integer where a head's numbers are not divisible by 16.

What the integers become is computed, and a batch is taken where none before has the same. A captured step has numbers
of sequences of its own, and takes the longest for as long as the row (see `graphs.py`). Rows padded on the left are two
sequences at most, padding and text: they launch nothing else.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import torch

from fastkit.kernels.attention_forward import section_heads
from fastkit.models.graphs import FEWEST_SEQUENCES
from fastkit.models.sequences import Packed

MANY = 2**31  # sequences, for more heads than any section has


@dataclass(frozen=True)
class Heads:
    """A model's attention: query heads, key heads, their size and dtype, and the windows of layers that have one."""

    queries: int
    keys: int
    D: int
    dtype: torch.dtype
    windows: tuple[int, ...] = ()

    def section(self, sequences: int, longest: int) -> int:
        """Key heads of a section, as the launches of attention take them."""
        return section_heads(sequences * self.keys, longest, self.D, self.dtype)


class Rows(NamedTuple):
    """A batch of `rows` rows of `tokens` tokens, in `sequences` sequences, the longest of `longest` tokens.

    captured   as in a captured step: each row is one sequence, and others have no tokens
    """

    rows: int
    tokens: int
    sequences: int
    longest: int
    captured: bool = False

    def position_ids(self, device: torch.device) -> torch.Tensor:
        """[rows, tokens]: sequences of `longest`, as often as they fit, and of one token at the end of the batch."""
        token = torch.arange(self.rows * self.tokens, device=device)
        first = token % self.tokens % self.longest == 0
        if not self.captured:
            others = (~first & (token > self.longest)).nonzero().squeeze(1)
            first[others[len(others) - (self.sequences - int(first.sum())) :]] = True
        return (token - (token * first).cummax(0).values).view(self.rows, self.tokens)

    def packed(self, device: torch.device) -> Packed | None:
        """What the layers are told in a captured step; None where they read it from the mask."""
        if not self.captured:
            return None
        ended = torch.arange(self.sequences + 1, dtype=torch.int32, device=device).clamp(max=self.rows) * self.tokens
        return Packed(ended, self.longest)


def packed_rows(batches: range, lengths: range, heads: Heads) -> list[Rows]:
    """One for each binary that packed batches of so many rows and tokens a row need, as small as was tried.

    Tried are few of them all: see `_lengths` and `_plain`.
    """
    by_section: dict[tuple, list[int]] = {}  # longest sequences, ascending, by what the largest section becomes
    for longest in range(1, lengths.stop):
        section = heads.section(MANY, longest)
        by_section.setdefault(_kinds(section, section * (heads.queries // heads.keys)), []).append(longest)
    few = {*batches[:16], *batches[-16:]}
    sizes = [(rows, tokens) for rows in few for tokens in _lengths(lengths, heads, by_section.values())]
    sizes.sort(key=lambda size: (size[0] * size[1], size))
    found: dict[tuple, Rows] = {}
    for one in chain(_plain(sizes, heads, by_section.values()), _captured(sizes)):
        for key in _binaries(one, heads):
            found.setdefault(key, one)
    return sorted(set(found.values()))


def _lengths(lengths: range, heads: Heads, sections: Collection[list[int]]) -> set[int]:
    """The shortest rows and the longest, within windows and beyond; of each largest section those for every remainder
    by 16. A row of one token is none that is packed."""
    edges = sorted({lengths.start, *(window + 1 for window in heads.windows), lengths.stop})
    found = {tokens for edge in edges for tokens in range(edge - 16, edge + 32)}
    for known in sections:
        for start, stop in pairwise(edges):
            found.update({tokens % 16: tokens for tokens in known if start <= tokens < stop}.values())
    return {tokens for tokens in found if tokens in lengths and tokens > 1}


def _plain(sizes: list[tuple[int, int]], heads: Heads, sections: Collection[list[int]]) -> Iterator[Rows]:
    """Rows of sequences, and how long the longest is: for each largest section as long as leaves 0 to 16 tokens of a
    row, half of it, three quarters and so on. How many they are: as few as can be, and as few as have more heads than a
    section, and up to 15 more, for every remainder by 16."""
    for rows, tokens in sizes:
        rooms = {*range(tokens - 16, tokens + 1), *(tokens >> n for n in range(tokens.bit_length()))}
        fitting = ((known, bisect_right(known, room)) for known in sections for room in rooms)
        for longest in sorted({known[count - 1] for known, count in fitting if count}):
            fewest = max(rows * -(-tokens // longest), rows + 1)  # no more than rows are not packed
            most = rows * tokens - longest + 1
            beyond = max(fewest, heads.section(MANY, longest) // heads.keys + 1)
            for sequences in sorted({*range(fewest, fewest + 16), *range(beyond, beyond + 16)}):
                if sequences <= most:
                    yield Rows(rows, tokens, sequences, longest)


def _captured(sizes: list[tuple[int, int]]) -> Iterator[Rows]:
    for rows, tokens in sizes:
        sequences = FEWEST_SEQUENCES
        yield Rows(rows, tokens, sequences, tokens, captured=True)
        while sequences < rows * tokens:
            sequences *= 2
            yield Rows(rows, tokens, sequences, tokens, captured=True)


def _binaries(one: Rows, heads: Heads) -> list[tuple]:
    """What decides which binary of attention's kernels a batch needs, and which of RoPE's, if another than unpacked."""
    total, section, each = one.rows * one.tokens, heads.section(one.sequences, one.longest), heads.queries // heads.keys
    numbers = (one.sequences * heads.queries, one.sequences * heads.keys, section * each, section)
    strides = (heads.D * n for n in (heads.queries, heads.keys, heads.queries + 2 * heads.keys))
    windowed = (one.tokens > window for window in heads.windows)
    kinds = _kinds(*numbers, *(total * stride for stride in (1, heads.queries, *strides)))
    found = [("attention", *kinds, *windowed)]
    if one.rows > 1 and heads.D % 16:
        found.append(("rope", (min(one.tokens, 32) - 1).bit_length(), *_kinds(one.tokens, one.tokens * heads.D)))
    return found


def _kinds(*numbers: int) -> tuple[str, ...]:
    """What Triton makes of each."""
    return tuple("1" if number == 1 else "" if number % 16 else "16" for number in numbers)
