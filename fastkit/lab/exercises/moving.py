"""Exercises that move data: vector_add, copy_coalesced, transpose_tile, dequant_4bit."""

import torch

from fastkit.lab.exercises.exercise import Demand, Exercise, Output, Truth

TALL_AND_WIDE = ((1, 1), (1, 16), (2, 3), (16, 16), (31, 5), (5, 33), (32, 32), (33, 65), (64, 64), (1, 520), (70, 1))
MATRICES = tuple({"M": M, "N": N} for M, N in (*TALL_AND_WIDE, (64, 128)))

VECTOR_ADD = Exercise(
    name="vector_add",
    task="Add two vectors of any length.",
    signature="vector_add(x, y, out)",
    details="x, y and out are float32 [N]. Write x + y into out.",
    sizes=tuple({"N": N} for N in (1, 2, 3, 16, 31, 64, 65, 128, 257, 1000, 1024, 1025, 2048, 4096)),
    largest={"N": 4000},
    inputs=lambda rng, s: {name: torch.randn(s["N"], generator=rng) for name in ("x", "y")},
    outputs=lambda s: {"out": Output((s["N"],), torch.float32)},
    truth=lambda i: {"out": Truth(i["x"].double() + i["y"].double(), i["x"].double().abs() + i["y"].double().abs())},
    hints=(
        "Each program adds one block of numbers. How many programs does a vector of N numbers need?",
        "tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) are a program's places. The last block may end past N.",
        "Pass mask=cols < N to both loads and to the store, and launch triton.cdiv(N, BLOCK) programs.",
    ),
)

COPY_COALESCED = Exercise(
    name="copy_coalesced",
    task="Copy a matrix so that no byte is fetched in vain.",
    signature="copy_coalesced(x, out)",
    details=(
        "x and out are float32 [M, N]; the numbers of a row are neighbours in memory, its rows any stride apart, "
        "another in out than in x. The lanes of a warp must read and write whole 32-byte sectors."
    ),
    sizes=MATRICES,
    largest={"M": 20, "N": 200},
    inputs=lambda rng, s: {"x": torch.randn(s["M"], s["N"], generator=rng)},
    outputs=lambda s: {"out": Output((s["M"], s["N"]), torch.float32)},
    truth=lambda i: {"out": Truth(i["x"].double(), torch.zeros_like(i["x"]).double())},
    hints=(
        "A warp's 32 lanes hold neighbouring elements of tl.arange. Which way through the matrix should those go?",
        "Let the lanes go along a row, where x.stride(1) is 1; each row begins x.stride(0) numbers after the last.",
        "Give a program one row and a block of columns: x_ptr + row * stride_xm + cols, with mask=cols < N.",
    ),
    strided=("x", "out"),
    demands=(Demand("load", "bytes_moved_per_byte_asked", 1.1), Demand("store", "bytes_moved_per_byte_asked", 1.1)),
    example={"M": 64, "N": 1024},
)

TRANSPOSE_TILE = Exercise(
    name="transpose_tile",
    task="Transpose a matrix, tile by tile.",
    signature="transpose_tile(x, out)",
    details=(
        "x is float32 [M, N], out [N, M]; rows of both may lie any stride apart. Read a tile, transpose it, write it."
    ),
    sizes=MATRICES,
    largest={"M": 90, "N": 90},
    inputs=lambda rng, s: {"x": torch.randn(s["M"], s["N"], generator=rng)},
    outputs=lambda s: {"out": Output((s["N"], s["M"]), torch.float32)},
    truth=lambda i: {"out": Truth(i["x"].double().T.contiguous(), torch.zeros_like(i["x"].T).double())},
    hints=(
        "A tile of x at (row, column) becomes the tile of out at (column, row).",
        "The mask of the store is that of the load, transposed: rows of out are columns of x.",
        "x_ptr + rows[:, None] * stride_xm + cols[None, :] reads [rows, cols]; tl.trans makes it [cols, rows].",
    ),
    strided=("x", "out"),
)


def _dequant_inputs(rng, s):
    N = s["N"]
    return {
        "packed": torch.randint(0, 256, (-(-N // 2),), generator=rng, dtype=torch.uint8),
        "scales": torch.rand(-(-N // 32), generator=rng) + 0.5,
        "_N": N,
    }


def _dequant_truth(i):
    codes = torch.stack([i["packed"] & 15, i["packed"] >> 4], -1).flatten()[: i["_N"]]
    scales = i["scales"].double().repeat_interleave(32)[: i["_N"]]
    value = (codes.double() - 8) * scales
    return {"out": Truth(value, value.abs())}


DEQUANT_4BIT = Exercise(
    name="dequant_4bit",
    task="Unpack 4-bit weights, two in a byte.",
    signature="dequant_4bit(packed, scales, out)",
    details=(
        "out is float16 [N], N odd or even. packed is uint8 [ceil(N / 2)]: numbers 2i and 2i + 1 lie in the low and "
        "the high half of byte i. scales is float32 [ceil(N / 32)], one for each 32 numbers. "
        "A number is (code - 8) * scale, computed in float32."
    ),
    sizes=tuple({"N": N} for N in (1, 2, 3, 16, 31, 32, 33, 64, 65, 127, 256, 1000, 1024, 1025, 2048)),
    largest={"N": 3000},
    inputs=_dequant_inputs,
    outputs=lambda s: {"out": Output((s["N"],), torch.float16)},
    truth=_dequant_truth,
    hints=(
        "Let each lane make one number. Its byte is number i // 2; which half of it, i % 2 says.",
        "Shift the byte right by 4 for odd places, then keep the low 4 bits: & 15. uint8 - 8 wraps: use floats.",
        "The scale is at i // 32. Mask all three accesses with i < N, and convert to the output's dtype last.",
    ),
)
