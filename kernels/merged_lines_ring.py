"""What merged_lines.py asks for ahead: some turns' words, B and absmax, copied into shared memory (cp.async).

A load into registers takes them from the time it is asked for; a copy takes none. And a copy may go by whole lines, a
lane reading afterwards what others have copied:

words    [32, 8 W]: a warp's copy, 16 bytes a lane, takes 4 lines of 128 bytes whole, where a load by TILE.words takes
         32 bytes of each. A row's chunks of 8 words change places by the row's t: lanes t + 4 g read 8 words of each of
         4 chunks, and so all 32 banks.
B        [32, BLOCK_R]. Row 8 r + g holds B's row 8 (g // 2) + 2 r + g % 2, the r-th that lanes of g read, so that half
         a warp reads 128 bytes that lie together, and its copy still takes whole lines.
absmax   [4, 8, W], of row 8 t + j that of W blocks side by side, or their codes: a lane copies a row's.
scales   [4, 8] of rows: nested_absmax, which 256 blocks share and so W side by side, and what FP8's rows are
         multiplied by.
"""

import functools
from dataclasses import dataclass

from fastkit.kernels.ladders.rung import barrier, gl, gluon
from fastkit.kernels.merged_lines_parts import W, absmax_of

try:
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
except ImportError:
    async_copy = None


@dataclass(frozen=True)
class Ring:
    """A ring of STAGES turns, 1 for none; its layouts: in shared memory, of the copies, of what reads them.

    BLOCK_R       the rank, rounded up to a multiple of 16
    DOUBLE_QUANT  absmax is a code, see kernels/nf4.py
    SCALED_ROWS   there is a scale for each row
    """

    STAGES: int
    BLOCK_R: int
    DOUBLE_QUANT: bool
    SCALED_ROWS: bool
    words: object
    words_copied: object
    words_read: object
    b: object
    b_copied: object
    b_read: object
    absmax: object
    absmax_copied: object
    absmax_read: object
    rows: object


@functools.cache
def ring(stages: int, BLOCK_R: int, double_quant: bool, scaled_rows: bool) -> Ring:
    words_read = gl.DistributedLinearLayout(  # the element of each bit of a register's, a lane's, a warp's number
        [[1, 0], [2, 0], [4, 0]],  # j
        [[8, 0], [16, 0], [0, 1], [0, 2], [0, 4]],  # t, g
        [[0, 8], [0, 16]],
        [],
        [32, 8 * W],
    )
    words_copied = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [4, 0]],  # the rows of a lane's second copy have the same t: one address for both
        [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]],
        [[8, 0], [16, 0]],
        [],
        [32, 8 * W],
    )
    b_read = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], *[[0, 16]] * (BLOCK_R // 32), [8, 0], [16, 0]],  # q, s, r
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],  # t, g
        [[0, 0]] * 2,  # each warp reads all of it
        [],
        [32, BLOCK_R],
    )
    chunks = BLOCK_R // 8  # of 16 bytes in a row of B
    return Ring(
        stages, BLOCK_R, double_quant, scaled_rows,
        gl.SwizzledSharedLayout(8, 8, 4, [1, 0]), words_copied, words_read,
        gl.SwizzledSharedLayout(16, 2, BLOCK_R // 16, [1, 0]),
        gl.BlockedLayout([1, 8], [32 // chunks, chunks], [W, 1], [1, 0]), b_read,
        gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]), gl.BlockedLayout([1, 1, W], [4, 8, 1], [W, 1, 1], [2, 1, 0]),
        gl.BlockedLayout([1, 1, 1], [4, 8, 1], [1, 1, W], [0, 1, 2]),
        gl.SwizzledSharedLayout(1, 1, 1, [1, 0]),
    )  # fmt: skip


def ring_bytes(ring: Ring) -> int:
    """Shared memory that a program takes."""
    absmax = 32 * W + 4 * 32 if ring.DOUBLE_QUANT else 4 * 32 * W
    stage = 4 * 32 * 8 * W + 2 * 32 * ring.BLOCK_R + absmax + 4 * 32 * ring.SCALED_ROWS
    return ring.STAGES * stage if ring.STAGES > 1 else 0


@gluon.jit
def allocated(absmax_ptr, b_ptr, RING: gl.constexpr, TILE: gl.constexpr):
    """The ring's memory: words, B, absmax, nested_absmax where there is one, scales of rows where there are."""
    S: gl.constexpr = RING.STAGES
    words = gl.allocate_shared_memory(gl.int32, [S, 32, 8 * TILE.W], RING.words)
    b = gl.allocate_shared_memory(b_ptr.dtype.element_ty, [S, 32, RING.BLOCK_R], RING.b)
    absmax = gl.allocate_shared_memory(absmax_ptr.dtype.element_ty, [S, 4, 8, TILE.W], RING.absmax)
    made = (words, b, absmax)
    for _ in gl.static_range(RING.DOUBLE_QUANT + RING.SCALED_ROWS):
        made += (gl.allocate_shared_memory(gl.float32, [S, 4, 8], RING.rows),)
    return made


@gluon.jit
def ask(
    memory, turn, pointers, first_row, first_col, left, ahead: gl.constexpr,
    K: gl.constexpr, stride_bn: gl.constexpr, RANK: gl.constexpr, EVEN: gl.constexpr, RING: gl.constexpr,
    TILE: gl.constexpr,
):  # fmt: skip
    """Ask for `turn`, `ahead` turns beyond the one that starts at first_row: a group of copies.

    `left` rows there are from first_row on; for those beyond, nothing is read and zeros come.
    """
    words_ptr, b_ptr, absmax_ptr, nested_absmax_ptr, inverse_ptr = pointers
    first_row += 32 * ahead
    left -= 32 * ahead
    block = (first_row * (K // 64)).to(gl.int32) + first_col // 64
    slot = turn % RING.STAGES
    W: gl.constexpr = TILE.W
    first = _nought()
    row = first + gl.arange(0, 32, gl.SliceLayout(1, RING.words_copied))[:, None]
    col = gl.arange(0, 8 * W, gl.SliceLayout(0, RING.words_copied))[None, :]
    words_ptr += first_row * (K // 8) + first_col // 8
    _copy(memory[0].index(slot), words_ptr + (row * (K // 8) + col), _within(row, left, EVEN))

    place = gl.arange(0, 32, gl.SliceLayout(1, RING.b_copied))[:, None]
    row = first + place % 8 // 2 * 8 + place // 8 * 2 + place % 2
    k = gl.arange(0, RING.BLOCK_R, gl.SliceLayout(0, RING.b_copied))[None, :]
    mask = _within(row, left, EVEN)
    if RANK != RING.BLOCK_R:
        mask &= k < RANK
    _copy(memory[1].index(slot), b_ptr + first_row * stride_bn + (row * stride_bn + k), mask)

    t = gl.set_auto_layout(gl.arange(0, 4)[:, None, None], RING.absmax_copied)
    j = gl.set_auto_layout(gl.arange(0, 8)[None, :, None], RING.absmax_copied)
    beside = gl.set_auto_layout(gl.arange(0, W)[None, None, :], RING.absmax_copied)
    row = first + 8 * t + j
    _copy(memory[2].index(slot), absmax_ptr + block + (row * (K // 64) + beside), _within(row, left, EVEN))

    LANES: gl.constexpr = gl.SliceLayout(0, TILE.lanes)
    row = first + gl.set_auto_layout(8 * gl.arange(0, 4)[:, None] + gl.arange(0, 8)[None, :], LANES)
    if RING.DOUBLE_QUANT:
        _copy(memory[3].index(slot), nested_absmax_ptr + ((block + row * (K // 64)) >> 8), _within(row, left, EVEN))
    if RING.SCALED_ROWS:
        _copy(memory[3 + RING.DOUBLE_QUANT].index(slot), inverse_ptr + first_row + row, _within(row, left, EVEN))
    async_copy.commit_group()


@gluon.jit
def _nought():
    """0, there and then: what does not change from turn to turn would be found before the loop, and take registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _within(row, left, EVEN: gl.constexpr):
    """Which rows there are: if EVEN, all of a tile or none."""
    return left > 0 if EVEN else row < left


@gluon.jit
def _copy(to, pointers, mask):
    async_copy.async_copy_global_to_shared(to, pointers, mask=mask)


@gluon.jit
def arrived(RING: gl.constexpr):
    """Wait for the oldest turn asked for, of STAGES - 1, and for all warps: its slot may be read, the last one written.

    Between a copy and the reads that follow, into another slot, the compiler puts a second barrier, of its own.
    """
    async_copy.wait_group(RING.STAGES - 2)
    barrier()


@gluon.jit
def ended():
    """No copy outlasts its program."""
    async_copy.wait_group(0)


@gluon.jit
def taken(memory, turn, tables, RING: gl.constexpr, TILE: gl.constexpr):
    """A turn's words as TILE.words, B as TILE.b_loaded, absmax and its rows' scales as TILE.lanes."""
    slot = turn % RING.STAGES
    W: gl.constexpr = TILE.W
    words = gl.permute(gl.reshape(memory[0].index(slot).load(RING.words_read), [4, 8, W, 8]), [1, 2, 0, 3])
    words = gl.convert_layout(words, TILE.words, assert_trivial=True)
    b = memory[1].index(slot).load(RING.b_read)
    S: gl.constexpr = b.shape[1] // 16
    b = gl.permute(gl.reshape(b, [4, 8, S, 4, 4]), [2, 3, 4, 0, 1])  # s, t, q, r, g
    b = gl.convert_layout(b, TILE.b_loaded, assert_trivial=True)
    absmax = gl.permute(memory[2].index(slot).load(RING.absmax_read), [2, 0, 1])
    absmax = gl.convert_layout(absmax, TILE.lanes, assert_trivial=True)
    if RING.DOUBLE_QUANT:
        absmax = absmax_of(absmax, _of_rows(memory[3], slot, TILE), tables)
    scales = 1.0
    if RING.SCALED_ROWS:
        scales, _ = gl.broadcast(_of_rows(memory[3 + RING.DOUBLE_QUANT], slot, TILE), absmax)
    return words, b, absmax, scales


@gluon.jit
def _of_rows(memory, slot, TILE: gl.constexpr):
    return gl.expand_dims(memory.index(slot).load(gl.SliceLayout(0, TILE.lanes)), 0)
