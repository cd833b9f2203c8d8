"""What attention_backward_hopper.py is made of: its plan, the order of its tiles, tiles that come in rings, the mask,
the sum of dq.
"""

import functools
from dataclasses import dataclass

from fastkit.kernels.attention_backward_ends import BLOCK_M
from fastkit.kernels.hopper_parts import new_barriers
from fastkit.kernels.ladders.rung import barrier, gl, gluon

try:
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
except ImportError:
    mbarrier = tma = None


@dataclass(frozen=True)
class Plan:
    """What is known when the kernel is compiled.

    DETERMINISTIC  dq is summed in the same order every time
    scores         layout of k qᵀ and v doᵀ; sums: of dk and dv; operand: of p and ds as their factors; dq: of dq
    lanes          layout of dq in the order in which lanes hold it
    ds             layout of ds in shared memory
    """

    H: int
    GROUP: int
    CAUSAL: bool
    D: int
    DETERMINISTIC: bool
    scores: object
    sums: object
    operand: object
    dq: object
    lanes: object
    ds: object
    BLOCK_M: int = BLOCK_M  # queries
    BLOCK_N: int = 128  # keys: two warp groups' 64
    STAGES: int = 2  # tiles of q, and of do, in shared memory; DS_STAGES: of ds. 3 and 2, or 2 and 1, are no faster
    DS_STAGES: int = 2


@functools.cache
def plan(H: int, GROUP: int, CAUSAL: bool, D: int, DETERMINISTIC: bool) -> Plan:
    scores, sums, dq = (gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16]) for n in (Plan.BLOCK_M, D, D // 2))
    ds = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    operand = gl.DotOperandLayout(0, sums, 2)
    of_register = [[1], [2], *([n] for n in (512, 1024, 2048) if n < 32 * D)]
    of_lane, of_warp = [[4], [8], [16], [32], [64]], [[128], [256]]
    lanes = gl.DistributedLinearLayout(of_register, of_lane, of_warp, [], [32 * D])
    return Plan(H, GROUP, CAUSAL, D, DETERMINISTIC, scores, sums, operand, dq, lanes, ds)


def section_heads(heads: int, blocks: int, sms: int) -> int:
    """Key heads, of `heads`, in a section: as many as have no more tiles together than there are SMs, and divide them
    all.

    So the keys of a head all start at once. Causal, 4 x 2048 tokens, 32/8 heads, 132 SMs: the busiest SM has 272 blocks
    of queries of a head, of 263.8 in the mean, in sections of 8 heads and of 16 and 32; of 4, 320. One program an SM,
    its tiles chosen beforehand, would have 272 in sections of 32 heads, and 368 and more in smaller ones.
    """
    return next(n for n in range(max(1, min(heads, sms // blocks)), 0, -1) if heads % n == 0)


@gluon.jit
def tile_of(index, place, PLAN: gl.constexpr):
    """(key head of the batch, first key) of tile `index`: section by section of key heads; in a section block of keys
    by block, from the first one, which most queries see; for a block all of the section's heads."""
    section, _, T_k = place
    blocks = (T_k + PLAN.BLOCK_N - 1) // PLAN.BLOCK_N
    part = index // section
    return part // blocks * section + index % section, part % blocks * PLAN.BLOCK_N


@gluon.jit
def steps_of(key, place, PLAN: gl.constexpr):
    """(blocks of queries, how many of them, the last ones, see a key from `key` on)."""
    _, T_q, T_k = place
    blocks = (T_q + PLAN.BLOCK_M - 1) // PLAN.BLOCK_M
    seeing = blocks
    if PLAN.CAUSAL:
        seeing -= gl.maximum(key - (T_k - T_q), 0) // PLAN.BLOCK_M
    return blocks, seeing


@gluon.jit
def whole_steps(key, place, PLAN: gl.constexpr):
    """How many blocks of queries, the last ones, see all of the 64 keys from `key` on."""
    _, T_q, T_k = place
    blocks = (T_q + PLAN.BLOCK_M - 1) // PLAN.BLOCK_M
    if PLAN.CAUSAL:
        hidden = (gl.maximum(key + 63 - (T_k - T_q), 0) + PLAN.BLOCK_M - 1) // PLAN.BLOCK_M
        blocks = gl.maximum(blocks - hidden, 0)
    return gl.where(key + 64 <= T_k, blocks, 0)


@gluon.jit
def mask(s, first, left, PLAN: gl.constexpr):
    """The scores s of 64 keys and a block of queries, -inf where a query does not see a key.

    first  the query that is the first to see the first key; left: how many of the keys there are

    Query 8 a + 2 b + c is lane b's, of four: what it is compared with then stands in the instruction.
    """
    a = gl.arange(0, PLAN.BLOCK_M // 8)[None, :, None, None]
    b = gl.arange(0, 4)[None, None, :, None]
    c = gl.arange(0, 2)[None, None, None, :]
    keys = gl.arange(0, 64)[:, None, None, None]
    seen_from = 0
    if PLAN.CAUSAL:
        seen_from = first + keys
    seen_from = gl.where(keys < left, seen_from, PLAN.BLOCK_M)
    s = gl.reshape(s, [64, PLAN.BLOCK_M // 8, 4, 2])
    s = gl.where(8 * a + c >= seen_from - 2 * b, s, float("-inf"))
    return gl.convert_layout(gl.reshape(s, [64, PLAN.BLOCK_M]), PLAN.scores, assert_trivial=True)


@gluon.jit
def new_ring(desc, numbers_desc, PLAN: gl.constexpr):
    """(room for STAGES tiles, for a number of each of their rows, barriers: tile and numbers have come)."""
    STAGES: gl.constexpr = PLAN.STAGES
    smem = gl.allocate_shared_memory(desc.dtype, [STAGES, 1, 1, PLAN.BLOCK_M, PLAN.D], desc.layout)
    numbers = gl.allocate_shared_memory(numbers_desc.dtype, [STAGES, PLAN.BLOCK_M], numbers_desc.layout)
    return smem, numbers, new_barriers(STAGES, 1)


@gluon.jit
def load(desc, numbers_desc, at, number, ring, stage):
    """Ask for a tile and its rows' numbers."""
    smem, numbers, full = ring
    bar = full.index(stage)
    mbarrier.expect(bar, desc.block_type.nbytes + numbers_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, at, bar, smem.index(stage))
    tma.async_copy_global_to_shared(numbers_desc, [number], bar, numbers.index(stage))


@gluon.jit
def wait_for(ring, count, PLAN: gl.constexpr):
    """Until tile number `count` of a ring has come."""
    _, _, full = ring
    mbarrier.wait(full.index(count % PLAN.STAGES), count // PLAN.STAGES % 2)


@gluon.jit
def matrix(ring, count, PLAN: gl.constexpr):
    """Tile number `count` of a ring: [BLOCK_M, D] in shared memory."""
    smem, _, _ = ring
    return smem.index(count % PLAN.STAGES).reshape([PLAN.BLOCK_M, PLAN.D])


@gluon.jit
def numbers_of(ring, count, PLAN: gl.constexpr):
    """The numbers of tile number `count`'s rows: [1, BLOCK_M]."""
    _, numbers, _ = ring
    return numbers.index(count % PLAN.STAGES).load(gl.SliceLayout(0, PLAN.scores))[None, :]


@gluon.jit
def operand(x, PLAN: gl.constexpr):
    """x as a first factor: nothing moves between lanes."""
    return gl.convert_layout(x, PLAN.operand, assert_trivial=True)


@gluon.jit
def turn_now(turn_ptr):
    """Whose turn it is, and what the one before wrote is seen."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [turn_ptr], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def pass_turn(turn_ptr):
    """The next one's turn, once all that this warp group has added can be seen."""
    barrier()
    gl.atomic_add(turn_ptr, 1, sem="release")  # one thread's


@gluon.jit
def add_dq(dq, dq_ptr, turns_ptr, tile, turn, me, PLAN: gl.constexpr):
    """Add dq [BLOCK_M, D / 2], this warp group's columns of tile number `tile`; if DETERMINISTIC, after `turn` others.

    A tile lies in memory in the order in which lanes hold it: so four numbers of a lane are neighbours, and a warp's
    are 512 bytes. In rows they would be two, and a warp's 32 bytes of each of eight rows: then the kernel took 0.904 ms
    instead of 0.770 (H200, 4 x 2048 tokens, 32/8 heads of 128).
    """
    if PLAN.DETERMINISTIC:
        while turn_now(turns_ptr + 2 * tile + me) < turn:
            pass
    HALF: gl.constexpr = PLAN.D // 2
    dq_ptr += gl.cast(tile, gl.int64) * PLAN.BLOCK_M * PLAN.D
    # warp, 8 rows, row; 8 columns, lane of four, column
    dq = gl.permute(gl.reshape(dq, [4, 2, 8, HALF // 8, 4, 2]), (3, 0, 2, 4, 1, 5))
    dq = gl.convert_layout(gl.reshape(dq, [PLAN.BLOCK_M * HALF]), PLAN.lanes, assert_trivial=True)
    numbers = gl.arange(0, PLAN.BLOCK_M * HALF, PLAN.lanes)
    gl.atomic_add(dq_ptr + me * PLAN.BLOCK_M * HALF + numbers, dq, sem="relaxed")
