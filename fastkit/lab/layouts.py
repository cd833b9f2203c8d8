"""Which lane asks for which bytes, and what that costs: requests, sectors, lines, banks. Plain arithmetic on numpy.

A Triton tile is spread over the registers of a program's lanes and warps by a *linear layout* (Zhou et al. 2025,
arXiv:2505.23819): each bit of a register's, lane's or warp's number moves an element's coordinates by its basis vector,
and moves add up by exclusive or. A basis of zeros means that the bit changes nothing: copies of the same element.

What memory is asked for goes out by the warp: a *request* is one load or store instruction of one warp. Global memory
answers in sectors of 32 bytes, four to a line of 128. Shared memory has 32 banks, each 4 bytes wide; of one bank, one
word can be had at a time, so words of the same bank take turns (*wavefronts*).
"""

from dataclasses import dataclass

import numpy as np

SECTOR = 32  # bytes
LINE = 128
BANKS = 32
WORD = 4  # bytes of a bank
LANES = 32

Bases = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class LinearLayout:
    """The bases of a tile's layout: for each bit, how far it moves an element along each dimension of `shape`."""

    shape: tuple[int, ...]
    register: Bases
    lane: Bases
    warp: Bases

    def elements(self) -> np.ndarray:
        """The element (numbered in C order) that each register of each lane holds: int64 [warps, registers, lanes]."""
        warp, register, lane = (self._numbers(bases) for bases in (self.warp, self.register, self.lane))
        return warp[:, None, None] ^ register[None, :, None] ^ lane[None, None, :]

    def _numbers(self, bases: Bases) -> np.ndarray:
        # A dimension's size is a power of two, so coordinates sit in separate bits of the element's number, and
        # exclusive or on coordinates is exclusive or on numbers.
        strides = [int(np.prod(self.shape[dim + 1 :])) for dim in range(len(self.shape))]
        numbers = np.zeros(1, dtype=np.int64)
        for basis in bases:
            numbers = np.concatenate([numbers, numbers ^ int(np.dot(basis, strides))])
        return numbers


@dataclass(frozen=True)
class Requests:
    """The requests by which a layout's warps move a tile, `vector` elements a lane at a time."""

    elements: np.ndarray  # int64 [requests, lanes]: the first element of each lane's vector
    active: np.ndarray  # bool [requests, lanes]: whether the lane takes part
    warp: np.ndarray  # int64 [requests]
    vector: int

    @classmethod
    def of(cls, layout: LinearLayout, vector: int, once: bool) -> "Requests":
        """The requests of `layout`.

        vector  elements of one lane that one instruction moves; they lie in neighbouring registers
        once    whether an element is moved once only, as by a store: copies in other lanes and warps stay out. A load
                fetches into every lane; copies in another register of the same lane are never fetched twice.
        """
        elements = layout.elements()
        warps, registers, lanes = elements.shape
        starts = [r for r in range(0, registers, vector) if not r & _free_bits(layout.register)]
        lane_ok = (
            np.array([not lane & _free_bits(layout.lane) for lane in range(lanes)]) if once else np.ones(lanes, bool)
        )
        warp_ok = [w for w in range(warps) if not (once and w & _free_bits(layout.warp))]
        picked = elements[warp_ok][:, starts]  # [warps, vectors, lanes]
        count = picked.shape[0] * picked.shape[1]
        return cls(
            elements=picked.reshape(count, lanes),
            active=np.broadcast_to(lane_ok, (count, lanes)),
            warp=np.repeat(warp_ok, len(starts)),
            vector=vector,
        )


def _free_bits(bases: Bases) -> int:
    return sum(1 << bit for bit, basis in enumerate(bases) if not any(basis))


@dataclass
class Traffic:
    """What a number of requests moved. Bytes asked for count once in a request, however many lanes ask for them."""

    requests: int = 0  # with at least one lane that takes part
    sectors: int = 0
    lines: int = 0
    bytes_asked: int = 0

    def __iadd__(self, other: "Traffic") -> "Traffic":
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


def traffic(addresses: np.ndarray, width: int, active: np.ndarray, past_l1: bool = False) -> Traffic:
    """The traffic of requests to global memory.

    addresses  int64 [requests, lanes]: the first byte that each lane asks for, a multiple of its element's size
    width      bytes a lane asks for
    active     bool [requests, lanes]
    past_l1    asynchronous copies of 16 bytes, which go past the L1 cache (cp.async.cg). There the counter does not
               tell apart 32 lanes' sectors: a pair of lanes counts as one in each line that it touches. So it was for
               all of 340 patterns of strides, masks and offsets on an H200; tests/test_layouts.py has some.
    """
    if past_l1:
        sectors = _distinct(addresses.reshape(-1, 2), width, active.reshape(-1, 2), LINE)
    else:
        sectors = _distinct(addresses, width, active, SECTOR)
    return Traffic(
        requests=int(active.any(axis=1).sum()),
        sectors=sectors,
        lines=_distinct(addresses, width, active, LINE),
        bytes_asked=_bytes_asked(addresses, width, active),
    )


def _distinct(addresses, width, active, unit) -> int:
    """How many units of `unit` bytes the requests touch, summed over requests."""
    first, last = addresses // unit, (addresses + width - 1) // unit
    if (first == last).all():
        return _count_distinct(first, active)
    reach = width // unit + 2
    touched = np.concatenate([np.minimum(first + step, last) for step in range(reach)], axis=1)
    return _count_distinct(touched, np.tile(active, reach))


def _aligned(addresses, width, active) -> bool:
    return width & (width - 1) == 0 and not (addresses[active] % width).any()


def _count_distinct(values, active) -> int:
    """Distinct values in each row among the active ones, summed over rows."""
    if not active.any():
        return 0
    nothing = np.iinfo(values.dtype).min
    ordered = np.sort(np.where(active, values, nothing), axis=1)
    new = np.diff(ordered, axis=1, prepend=nothing) != 0
    return int((new & (ordered != nothing)).sum())


def _bytes_asked(addresses, width, active) -> int:
    if _aligned(addresses, width, active):  # two lanes then ask for the same bytes or for none in common
        return width * _count_distinct(addresses, active)
    every = (addresses[:, :, None] + np.arange(width)).reshape(len(addresses), -1)
    return _count_distinct(every, np.repeat(active, width, axis=1))


def wavefronts(offsets: np.ndarray, width: int, active: np.ndarray) -> tuple[int, int]:
    """(wavefronts taken, fewest possible) of requests to shared memory; the difference are its bank conflicts.

    Lanes take their turns in groups that together ask for 128 bytes: all 32 with up to 4 bytes each, 16 with 8, 8 with
    16. Within a group each bank serves its distinct words one after the other; lanes that want the same word share it.

    offsets  int64 [requests, lanes]: the first byte of each lane, a multiple of its width
    width    bytes a lane asks for: 1, 2, 4, 8 or 16
    """
    group = min(LANES, LANES * WORD // width)
    each = max(1, width // WORD)  # words a lane asks for
    words = (offsets[:, :, None] // WORD + np.arange(each)).reshape(-1, group * each)  # a row for each group's turn
    taking_part = np.repeat(active, each, axis=1).reshape(words.shape)
    return turns(words, taking_part), int(taking_part.any(axis=1).sum())


def turns(words: np.ndarray, taking_part: np.ndarray) -> int:
    """Turns that the banks take to serve rows of words [rows, words] one row after the other, each row at once."""
    row, place = np.nonzero(taking_part)
    if not len(row):
        return 0
    row, word = np.unique(np.stack([row, words[row, place]]), axis=1)
    waiting = np.zeros((len(words), BANKS), dtype=np.int64)
    np.add.at(waiting, (row, word % BANKS), 1)
    return int(waiting.max(axis=1).sum())
