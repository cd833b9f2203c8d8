"""What merged_lines.py is made of: how a tile stands on its lanes, and what they ask for, look up and multiply."""

import functools
from dataclasses import dataclass

from fastkit.kernels.ladders.rung import gl, gluon

try:
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2
except ImportError:
    mma_v2 = None

W = 4  # warps side by side


@dataclass(frozen=True)
class Tile:
    """How a program's tile stands on its lanes; constants of the kernel.

    A tile is [8, W, 4, 8, 8]: row 8 t + j, column 64 warp + 8 g + c, on lane t + 4 g. It is computed in parts of C of
    a lane's 8 columns: all, or 2 at a time where the transpose is written, of which 8 rows make a store. The tensor
    core's row g + 8 p of its block m of 16 is column 2 m + p of g's, and column 2 t + i of its block r of 8 is row
    8 t + 2 r + i: so lane t + 4 g gets the columns of its g in all 8 rows of its t. Its sum's number 16 s + 8 p + 2 t
    + i is the rank's 16 s + 4 t + 2 p + i, so that a lane's four stand side by side in B.

    numbers    a part [8, W, 4, 8, C], what is stored together foremost; words: without c, a word of the weight each
    lanes      [W, 4, 8], one number a lane
    mma        delta's transpose as the tensor core leaves it; a_operand, b_operand: its factors, A.T and B.T
    a_loaded   a part's columns of A [BLOCK_R, 8 W C] as they are loaded
    b_loaded   B [BLOCK_R / 16, 4, 4, 4, 8], the rank's number 16 s + 4 t + q of row 8 (g // 2) + 2 r + g % 2
    """

    W: int
    C: int
    numbers: object
    words: object
    lanes: object
    mma: object
    a_operand: object
    b_operand: object
    a_loaded: object
    b_loaded: object


@functools.cache
def tile(BLOCK_R: int, transposed: bool) -> Tile:
    C, order = (2, [0, 2, 3, 4, 1]) if transposed else (8, [4, 2, 3, 0, 1])
    numbers = gl.BlockedLayout([8, 1, 1, 1, C], [1, 1, 4, 8, 1], [1, W, 1, 1, 1], order)
    mma = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1], instr_shape=[16, 8])
    b_loaded = gl.DistributedLinearLayout(  # the element of each bit of a register's, a lane's, a warp's number
        [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0]]  # q: i, p
        + [[1, 0, 0, 0, 0]] * (BLOCK_R // 32)  # s
        + [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0]],  # r
        [[0, 1, 0, 0, 0], [0, 2, 0, 0, 0], *([0, 0, 0, 0, 1 << bit] for bit in range(3))],  # t, g
        [[0] * 5] * 2,  # each warp has all of it
        [],
        [BLOCK_R // 16, 4, 4, 4, 8],
    )
    return Tile(
        W, C, numbers, gl.SliceLayout(4, numbers), gl.BlockedLayout([1, 1, 1], [1, 4, 8], [W, 1, 1], [1, 2, 0]), mma,
        gl.DotOperandLayout(0, mma, 2), gl.DotOperandLayout(1, mma, 2),
        gl.BlockedLayout([1, C], [4, 8], [1, W], [1, 0]), b_loaded,
    )  # fmt: skip


@gluon.jit
def asked(pointers, mask, MASKED: gl.constexpr):
    """A load, without a mask where none is needed."""
    if MASKED:
        return gl.load(pointers, mask=mask, other=0)
    else:
        return gl.load(pointers)


@gluon.jit
def shown(x, lane):
    """x of the lane whose number is the low 5 bits of `lane`."""
    x, lane = gl.broadcast(x, lane)
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, -1;", "=f,f,r", [x, lane], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def looked_up(code, index):
    """CODE[index % 16] of `code`, CODE[lane % 16]: x of another lane in the same half of a warp."""
    code, index = gl.broadcast(code, index)
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x101f, -1;", "=f,f,r", [code, index], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def as_words(x, TILE: gl.constexpr):
    """x [W, 4, 8], one number a lane, as words [1, W, 4, 8] have it; nothing moves."""
    return gl.convert_layout(gl.reshape(x, [1, TILE.W, 4, 8]), TILE.words)


@gluon.jit
def places(TILE: gl.constexpr):
    """j, warp, t and g of words [8, W, 4, 8], see Tile, and c of numbers."""
    j = gl.set_auto_layout(gl.arange(0, 8)[:, None, None, None], TILE.words)
    warp = gl.set_auto_layout(gl.arange(0, TILE.W)[None, :, None, None], TILE.words)
    t = gl.set_auto_layout(gl.arange(0, 4)[None, None, :, None], TILE.words)
    g = gl.set_auto_layout(gl.arange(0, 8)[None, None, None, :], TILE.words)
    return j, warp, t, g, gl.set_auto_layout(gl.arange(0, TILE.C)[None, None, None, None, :], TILE.numbers)


@gluon.jit
def dealt_a(a_ptr, part, stride_ar: gl.constexpr, RANK: gl.constexpr, BLOCK_R: gl.constexpr, TILE: gl.constexpr):
    """A.T [8 W C, BLOCK_R] of a part: A's columns dealt to the tensor core's rows, its rows to the sum's numbers."""
    C: gl.constexpr = TILE.C
    COLUMNS: gl.constexpr = 8 * TILE.W * C
    k = gl.arange(0, BLOCK_R, gl.SliceLayout(1, TILE.a_loaded))[:, None]
    r = k // 16 * 16 + k // 2 % 4 * 4 + k // 8 % 2 * 2 + k % 2
    col = gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE.a_loaded))[None, :]
    a = asked(a_ptr + (r * stride_ar + 8 * (col // C) + C * part + col % C), r < RANK, RANK != BLOCK_R)
    a = gl.permute(gl.reshape(a, [BLOCK_R, TILE.W, 8, C // 2, 2]), [3, 1, 4, 2, 0])  # m, warp, p, g, k
    return gl.convert_layout(gl.reshape(a, [COLUMNS, BLOCK_R]), TILE.a_operand)


@gluon.jit
def dealt_parts(a_ptr, stride_ar: gl.constexpr, RANK: gl.constexpr, BLOCK_R: gl.constexpr, TILE: gl.constexpr):
    """`dealt_a` of all parts."""
    a = ()
    for part in gl.static_range(8 // TILE.C):
        a += (dealt_a(a_ptr, part, stride_ar, RANK, BLOCK_R, TILE),)
    return a


@gluon.jit
def b_operand(b, BLOCK_R: gl.constexpr, TILE: gl.constexpr):
    """B.T [BLOCK_R, 32], of B as it is loaded; nothing moves."""
    b = gl.permute(gl.reshape(b, [BLOCK_R // 16, 4, 2, 2, 4, 8]), [0, 2, 1, 3, 4, 5])  # s, p, t, i, r, g
    return gl.convert_layout(gl.reshape(b, [BLOCK_R, 32]), TILE.b_operand)


@gluon.jit
def delta_of(a, b, TILE: gl.constexpr):
    """A part's B @ A as numbers, of `dealt_a` and `b_operand`; nothing moves."""
    C: gl.constexpr = TILE.C
    W: gl.constexpr = TILE.W
    delta = mma_v2(a, b, gl.full([8 * W * C, 32], 0.0, gl.float32, TILE.mma))
    delta = gl.permute(gl.reshape(delta, [C // 2, W, 2, 8, 4, 4, 2]), [4, 6, 1, 5, 3, 0, 2])  # r, i, warp, t, g, m, p
    return gl.convert_layout(gl.reshape(delta, [8, W, 4, 8, C]), TILE.numbers)


@gluon.jit
def of_columns(ptr, part, TILE: gl.constexpr):
    """What stands at `ptr` for each of a tile's columns, of a part: [1, W, 1, 8, C]."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, TILE.numbers)
    warp = gl.set_auto_layout(gl.arange(0, TILE.W)[:, None, None, None], LAYOUT)
    g = gl.set_auto_layout(gl.arange(0, 8)[None, None, :, None], LAYOUT)
    c = gl.set_auto_layout(gl.arange(0, TILE.C)[None, None, None, :], LAYOUT)
    return gl.expand_dims(gl.load(ptr + (64 * warp + 8 * g + TILE.C * part + c)), 0)


@gluon.jit
def b_places(stride_bn: gl.constexpr, BLOCK_R: gl.constexpr, TILE: gl.constexpr):
    """B's tile as b_loaded: a lane's offset, those of its numbers beyond it, their rows and their numbers in a row."""
    s = gl.arange(0, BLOCK_R // 16)[:, None, None, None, None]
    t = gl.arange(0, 4)[None, :, None, None, None]
    q = gl.arange(0, 4)[None, None, :, None, None]
    r = gl.arange(0, 4)[None, None, None, :, None]
    g = gl.arange(0, 8)[None, None, None, None, :]
    LAYOUT: gl.constexpr = TILE.b_loaded
    row = 8 * (g // 2) + g % 2
    lane = gl.set_auto_layout(row * stride_bn + 4 * t, LAYOUT)
    beyond = gl.set_auto_layout(2 * r * stride_bn + 16 * s + q, LAYOUT)
    return lane, beyond, gl.set_auto_layout(row + 2 * r, LAYOUT), gl.set_auto_layout(16 * s + 4 * t + q, LAYOUT)


@gluon.jit
def lane_blocks(TILE: gl.constexpr):
    """Of lanes, which are t + 4 j: each one's number, and the row and the block in it whose absmax it asks for."""
    LAYOUT: gl.constexpr = TILE.lanes
    warp = gl.set_auto_layout(gl.arange(0, TILE.W)[:, None, None], LAYOUT)
    t = gl.set_auto_layout(gl.arange(0, 4)[None, :, None], LAYOUT) + 0 * warp
    j = gl.set_auto_layout(gl.arange(0, 8)[None, None, :], LAYOUT)
    return t + 4 * j, 8 * t + j, warp


@gluon.jit
def absmax_of(index, nested_absmax, tables):
    """absmax in fp32, of its code."""
    nested_code_ptr, offset = tables
    return gl.load(nested_code_ptr + index.to(gl.int32)) * nested_absmax + offset


@gluon.jit
def lane_pointers(w_ptr, first_row, first_col, stride_wn: gl.constexpr, stride_wk: gl.constexpr, TILE: gl.constexpr):
    """(where a lane's part of W stands; how far its numbers lie beyond; their rows).

    One pointer a lane: what its registers differ by is a constant, and stands in the instruction.
    """
    j, warp, t, g, c = places(TILE)
    w_ptrs = w_ptr + first_row * stride_wn + first_col.to(gl.int64) * stride_wk
    w_ptrs += gl.expand_dims(8 * t * stride_wn + (64 * warp + 8 * g) * stride_wk, 4)
    return w_ptrs, gl.expand_dims(j * stride_wn, 4) + c * stride_wk, 8 * t + j


@gluon.jit
def loaded(
    pointers, tables, first_row, first_col, left,
    K: gl.constexpr, stride_bn: gl.constexpr, UNITS: gl.constexpr, RANK: gl.constexpr, EVEN: gl.constexpr,
    RING: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """What a turn from `first_row` on takes, in the place of merged_lines_ring's `taken`: by loads, there and then."""
    words_ptr, b_ptr, absmax_ptr, nested_absmax_ptr, inverse_ptr = pointers
    _, lane_row, lane_block = lane_blocks(TILE)
    mask, inverse = lane_row < left, 1.0
    block = ((first_row * (K // 64)).to(gl.int32) + first_col // 64 + (lane_row * (K // 64) + lane_block)) // UNITS
    absmax = asked(absmax_ptr + block, mask, not EVEN)
    if RING.DOUBLE_QUANT:
        nested_absmax = asked(nested_absmax_ptr + block // 256, mask, not EVEN)
        absmax = absmax_of(absmax, nested_absmax, tables)
    j, warp, t, g, _ = places(TILE)
    word_ptrs = words_ptr + first_row * (K // 8) + first_col // 8 + (8 * t * (K // 8) + 8 * warp + g)
    words = asked(word_ptrs + j * (K // 8), 8 * t + j < left, not EVEN)
    lane, beyond, row, number = b_places(stride_bn, RING.BLOCK_R, TILE)
    b_ptrs = b_ptr + first_row * stride_bn + lane + beyond
    b = asked(b_ptrs, (row < left) & (number < RANK), not EVEN or RANK != RING.BLOCK_R)
    if RING.SCALED_ROWS:
        inverse = asked(inverse_ptr + first_row + lane_row, mask, not EVEN)
    return words, b, absmax, inverse


@gluon.jit
def rows_shown(x, TILE: gl.constexpr):
    """Of x [W, 4, 8], a number for each of `lane_blocks`, the one of their row for words: [8, W, 4, 8, 1]."""
    j, _, t, _, _ = places(TILE)
    return gl.expand_dims(shown(as_words(x, TILE), t + 4 * j), 4)


@gluon.jit
def numbers_of(part, packed, absmax, a, b, code, scaling, TILE: gl.constexpr):
    """A part of W [8, W, 4, 8, C] in fp32, given its words, their absmax, the factors of delta and CODE."""
    _, _, _, _, c = places(TILE)
    shift = 4 * (c ^ 1) + 4 * TILE.C * part  # a byte's high half comes first
    w = looked_up(code, gl.expand_dims(packed, 4) >> shift) * absmax
    delta = delta_of(a, b, TILE)
    return gl.fma(delta, gl.full(delta.shape, scaling, gl.float32, TILE.numbers), w)
