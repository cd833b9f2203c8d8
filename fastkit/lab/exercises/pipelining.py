"""Exercise of notebook 08: matmul_prefetch."""

import dataclasses

from fastkit.lab.exercises.tiles import MATMUL_TILED

MATMUL_PREFETCH = dataclasses.replace(
    MATMUL_TILED,
    name="matmul_prefetch",
    task="Multiply two matrices with the next tiles already on their way: a pipeline of two stages, by hand.",
    signature="matmul_prefetch(a, b, c)",
    details=(
        "a is float16 [M, K], b float16 [K, N], c float32 [M, N]. Each may have any strides; b may be the transpose of "
        "a contiguous matrix. Load the first tiles before the loop. In the loop load the next ones first, multiply the "
        "ones that you have, then let the next ones take their place. Sum in float32."
    ),
    hints=(
        "Begin with matmul_tiled. A function of its own for the load of a tile pair helps: it is called in two places.",
        "In the last turn there are no next tiles. A mask with ks < K makes that load harmless: it brings zeros.",
        "a, b = tiles(0); for start in range(0, K, BLOCK_K): next_a, next_b = tiles(start + BLOCK_K); "
        "total = tl.dot(a, b, total); a, b = next_a, next_b",
    ),
)

EXERCISES = [MATMUL_PREFETCH]
