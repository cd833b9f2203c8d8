"""What attention_hopper.py is made of: its plan, the order of its tiles, tiles that come in rings, the softmax."""

import functools
from dataclasses import dataclass

from fastkit.kernels.ladders.rung import gl, gluon

try:
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
except ImportError:
    mbarrier = tma = None

CACHED_BYTES = 32 * 2**20  # of K and V that programs running at once may want: the L2 cache has 50 MB


@dataclass(frozen=True)
class Plan:
    """What is known when the kernel is compiled.

    scores  layout of q kᵀ; outputs: of acc; operand: of p as a factor of p v
    lanes   of [64, 4], what each lane has summed of its rows of p
    """

    H: int
    GROUP: int
    CAUSAL: bool
    D: int
    scores: object
    outputs: object
    operand: object
    lanes: object
    BLOCK_M: int = 128  # two warp groups' 64
    BLOCK_N: int = 128
    STAGES: int = 2  # tiles of K, and of V, in shared memory


@functools.cache
def plan(H: int, GROUP: int, CAUSAL: bool, D: int) -> Plan:
    scores, outputs = (gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16]) for n in (Plan.BLOCK_N, D))
    of_lane, of_warp = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]]
    lanes = gl.DistributedLinearLayout([[8, 0]], of_lane, of_warp, [], [64, 4])
    return Plan(H, GROUP, CAUSAL, D, scores, outputs, gl.DotOperandLayout(0, outputs, 2), lanes)


def section_sizes(k) -> tuple[int, int]:
    """(key heads in a section, sections): as many as fit CACHED_BYTES with their values, and divide them all."""
    B, H_k, T_k, D = k.shape
    most = min(B * H_k, max(1, CACHED_BYTES // (2 * T_k * D * k.element_size())))
    section = next(n for n in range(most, 0, -1) if B * H_k % n == 0)
    return section, B * H_k // section


@gluon.jit
def tile_of(index, sizes, PLAN: gl.constexpr):
    """(head of the batch, first query, blocks of keys) of tile `index`.

    Section by section of key heads that fit the L2 cache together; in a section block of queries by block, and for a
    block all of the section's heads. The last section goes from the block with most to do to that with least, the one
    before it the other way, and so on: so neighbouring tiles have as much to do.
    """
    section, sections, T_q, T_k = sizes
    blocks = (T_q + PLAN.BLOCK_M - 1) // PLAN.BLOCK_M
    kv = index // PLAN.GROUP
    part = kv // section
    block = part % blocks
    head = (part // blocks * section + kv % section) * PLAN.GROUP + index % PLAN.GROUP
    last = T_k
    if PLAN.CAUSAL:
        block = gl.where((sections - part // blocks) % 2 == 0, block, blocks - 1 - block)
        last = gl.minimum(gl.maximum((block + 1) * PLAN.BLOCK_M + T_k - T_q, 1), T_k)  # 1: a block, if all hidden
    return head, block * PLAN.BLOCK_M, (last + PLAN.BLOCK_N - 1) // PLAN.BLOCK_N


@gluon.jit
def index_of(turn):
    """The tile of this program's turn.

    Turns go forwards and backwards over the programs, and after both the programs' halves change places: what one turn
    gives a program too much the next ones give it less. Of 4 x 2048 tokens and 32/8 heads the longest of 132 programs
    has 0.1% more blocks than they have in the mean.
    """
    program, programs = gl.program_id(0), gl.num_programs(0)
    place = gl.where(turn % 2 == 0, program, programs - 1 - program)
    return turn * programs + (place + turn // 2 % 2 * (programs // 2)) % programs


@gluon.jit
def turns_of(tiles):
    """How many tiles this program takes."""
    whole = tiles // gl.num_programs(0)
    return whole + gl.where(index_of(whole) < tiles, 1, 0)


@gluon.jit
def masked_blocks(n, row, T_q, T_k, PLAN: gl.constexpr):
    """How many of n blocks of keys, the last ones, are not seen whole by the queries from row on; at least one."""
    whole = T_k // PLAN.BLOCK_N
    if PLAN.CAUSAL:
        whole = gl.maximum(gl.minimum(row + T_k - T_q + 1, T_k), 0) // PLAN.BLOCK_N
    return gl.maximum(n - whole, 1)


@gluon.jit
def new_ring(desc, PLAN: gl.constexpr):
    """(room for STAGES tiles, barriers: tile has come, barriers: tile was read by both warp groups)."""
    STAGES: gl.constexpr = PLAN.STAGES
    smem = gl.allocate_shared_memory(desc.dtype, [STAGES, 1, 1, PLAN.BLOCK_N, PLAN.D], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return smem, full, empty


@gluon.jit
def load(desc, batch, head, row, ring, count, PLAN: gl.constexpr):
    """Ask for tile number `count` of a ring, once its place is free."""
    smem, full, empty = ring
    stage = count % PLAN.STAGES
    mbarrier.wait(empty.index(stage), (count // PLAN.STAGES % 2) ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, head, row, 0], full.index(stage), smem.index(stage))


@gluon.jit
def wait_for(ring, count, more, PLAN: gl.constexpr):
    """Until tile number `count` of a ring has come, if `more`."""
    _, full, _ = ring
    mbarrier.wait(full.index(count % PLAN.STAGES), count // PLAN.STAGES % 2, pred=more)


@gluon.jit
def release(ring, count, PLAN: gl.constexpr):
    """This warp group has read tile number `count` of a ring."""
    _, _, empty = ring
    mbarrier.arrive(empty.index(count % PLAN.STAGES))


@gluon.jit
def matrix(ring, count, PLAN: gl.constexpr):
    """Tile number `count` of a ring: [BLOCK_N, D] in shared memory."""
    smem, _, _ = ring
    return smem.index(count % PLAN.STAGES).reshape([PLAN.BLOCK_N, PLAN.D])


@gluon.jit
def mask(s, row, col, T_q, T_k, PLAN: gl.constexpr):
    """The scores s of queries from row on and keys from col on, -inf where a query does not see a key.

    Key 8 a + 2 b + c is lane b's, of four: what it is compared with then stands in the instruction.
    """
    a = gl.arange(0, PLAN.BLOCK_N // 8)[None, :, None, None]
    b = gl.arange(0, 4)[None, None, :, None]
    c = gl.arange(0, 2)[None, None, None, :]
    last = T_k - 1 - col  # the last key that is seen, from col on
    if PLAN.CAUSAL:
        last = (row + T_k - T_q - col) + gl.arange(0, 64)[:, None, None, None]
    s = gl.reshape(s, [64, PLAN.BLOCK_N // 8, 4, 2])
    s = gl.where(8 * a + c <= last - 2 * b, s, float("-inf"))
    return gl.convert_layout(gl.reshape(s, [64, PLAN.BLOCK_N]), PLAN.scores, assert_trivial=True)


@gluon.jit
def softmax(s, row_sum, row_max, scale_log2, PLAN: gl.constexpr):
    """(p, decay, row_sum, row_max) after the scores s [64, BLOCK_N] as well."""
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale_log2)
    p = gl.exp2(s * scale_log2 - new_max[:, None])  # one multiply-add and one exp2 a score
    decay = gl.exp2(row_max - new_max)
    sums = gl.sum(gl.sum(gl.reshape(p, [64, PLAN.BLOCK_N // 8, 4, 2]), 3), 1)  # within a lane, see `mask`
    decays = gl.convert_layout(decay, gl.SliceLayout(1, PLAN.lanes))[:, None]
    return p, decay, row_sum * decays + gl.convert_layout(sums, PLAN.lanes), new_max


@gluon.jit
def scaled(acc, factor, PLAN: gl.constexpr):
    """acc [64, D] * factor [64]"""
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, PLAN.outputs))[:, None]


@gluon.jit
def packed(p, dtype: gl.constexpr, PLAN: gl.constexpr):
    """p, rounded, two neighbours in an integer: a loop hands 16-bit numbers on in a register each."""
    p = gl.cast(p.to(dtype), gl.int16, bitcast=True)
    low, high = gl.split(gl.reshape(p, [64, PLAN.BLOCK_N // 2, 2]))
    return gl.inline_asm_elementwise("mov.b32 $0, {$1, $2};", "=r,h,h", [low, high], gl.int32, is_pure=True, pack=1)


@gluon.jit
def operand(p, dtype: gl.constexpr, PLAN: gl.constexpr):
    """What `packed` packed as a factor of p v: nothing moves between lanes."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [p], (gl.int16, gl.int16), is_pure=True, pack=1
    )
    p = gl.cast(gl.reshape(gl.join(low, high), [64, PLAN.BLOCK_N]), dtype, bitcast=True)
    return gl.convert_layout(p, PLAN.operand, assert_trivial=True)
