"""Which instructions multiply in a compiled kernel, and how much of what they multiply is wanted."""

import re
from dataclasses import dataclass

from fastkit.lab.compiling import Compiled

LANES, GROUP = 32, 4  # lanes of a warp, warps that execute one WGMMA together
_TENSOR = re.compile(r"(mma\.sync|wgmma\.mma_async)[\w.]*?\.m(\d+)n(\d+)k(\d+)(?:\.row\.col)?\.(\w+)\.(\w+)\.(\w+)")
_PLAIN = re.compile(r"\bfma\.rn\.f32\b")


@dataclass(frozen=True)
class Multiply:
    """One kind of multiplying instruction of an NVIDIA kernel.

    name      "HMMA" (one warp), "WGMMA" (four warps together) or "FMA" (each lane for itself, no tensor core)
    shape     (m, n, k): an instruction adds the products of [m, k] and [k, n] numbers to [m, n]
    dtype     of the factors, as PTX calls it: "f16", "bf16", "tf32", "e4m3", "f32"
    sums      dtype of the sums
    count     how often it stands in the code: for a loop, once for each turn
    products  multiply-adds of the whole program for that
    """

    name: str
    shape: tuple[int, int, int]
    dtype: str
    sums: str
    count: int
    products: int

    @property
    def tensor_cores(self) -> bool:
        return self.name != "FMA"


def multiplies(compiled: Compiled) -> list[Multiply]:
    """The kinds of multiplying instruction in a kernel compiled for NVIDIA; those of tensor cores alone, if it has any.

    Else its FMAs in fp32, which need not all be those of a product. An empty list where there is none.
    """
    found = {}
    for kind, *shape, sums, dtype, _ in _TENSOR.findall(compiled.code):
        key = ("HMMA" if kind == "mma.sync" else "WGMMA", tuple(map(int, shape)), dtype, sums)
        found[key] = found.get(key, 0) + 1
    if not found and (count := len(_PLAIN.findall(compiled.code))):
        found["FMA", (1, 1, 1), "f32", "f32"] = count
    at_once = {"FMA": LANES * compiled.num_warps, "HMMA": compiled.num_warps, "WGMMA": compiled.num_warps // GROUP}
    return [
        Multiply(name, (m, n, k), dtype, sums, count, count * m * n * k * at_once[name])
        for (name, (m, n, k), dtype, sums), count in found.items()
    ]


def thrown_away(compiled: Compiled, tile: tuple[int, int, int]) -> float | None:
    """The share of a kernel's products that nobody wants, being beyond the tile or another warp's as well.

    tile  (BLOCK_M, BLOCK_N, BLOCK_K) of its one tl.dot, in a loop that is neither unrolled nor peeled

    None where nothing multiplies.
    """
    rows, columns, depth = tile
    done = sum(kind.products for kind in multiplies(compiled))
    return 1 - rows * columns * depth / done if done else None
