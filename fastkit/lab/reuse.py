"""Who shares what in a tiled matrix product: the order of its programs, and the blocks that those at once load.

A matrix product c = a @ b is cut into blocks; a program writes one block of c and loads a row of blocks of a and a
column of blocks of b. Programs that run at once find a block that several of them want in the L2 cache.
"""

import math
from collections.abc import Sequence

from fastkit.errors import FastkitError
from fastkit.lab.tracer import Trace

Order = Sequence[tuple[int, int]]  # (row, column) of the block of c that each program writes, in blocks


def order_of(trace: Trace, columns: int, tile: tuple[int, int]) -> list[tuple[int, int]]:
    """The block of c that each program of `trace` wrote, in the order of the programs.

    columns  of c, whose rows lie one behind another
    tile     (rows, columns) of a block

    Raises FastkitError where not all programs were traced, or where they do not write whole blocks.
    """
    traced, total = trace.programs
    stores = trace.of("store")
    if traced < total or len(stores) != 1 or len(stores[0].walk) != total:
        raise FastkitError(f"{trace.kernel}: {traced} of {total} programs were traced, each with one store: trace all")
    places = [offset * 8 // stores[0].bits for _, offset in sorted(stores[0].walk)]
    return [(place // columns // tile[0], place % columns // tile[1]) for place in places]


def blocks_loaded(order: Order, depth: int) -> tuple[int, int]:
    """(blocks of a, blocks of b) that the programs of `order` load between them, each counted once.

    depth  blocks of a in a row, and of b in a column
    """
    rows, columns = {row for row, _ in order}, {column for _, column in order}
    return depth * len(rows), depth * len(columns)


def memory_bytes(
    shape: tuple[int, int, int], tile: tuple[int, int], at_once: int, group: int, itemsize: int = 2
) -> float:
    """Bytes of a and b that memory sends for a product of `shape` (M, N, K), a model of the L2 cache.

    Of each wave of programs that run at once, each number comes once, and nothing is kept for the next wave.

    tile      (rows, columns) of c that a program writes
    at_once   programs that run at once on the whole card
    group     height of the stripes in which programs are numbered, in tiles: GROUP_M
    """
    M, N, K = shape
    tiles_m, tiles_n = math.ceil(M / tile[0]), math.ceil(N / tile[1])
    at_once, group = min(at_once, tiles_m * tiles_n), min(group, tiles_m)
    stripes = max(1.0, at_once / (group * tiles_n))
    rows, columns = min(group * stripes, tiles_m), min(at_once / group, tiles_n)
    waves = tiles_m * tiles_n / at_once
    return waves * (rows * tile[0] + columns * tile[1]) * K * itemsize
