"""What attention_backward_hopper.py is made of: its plan, the order of its tiles, tiles that come in rings, the mask,
the sum of dq; and the kernels before and after it.
"""

import functools
from dataclasses import dataclass

from fastkit.kernels.common import tl, triton
from fastkit.kernels.ladders.rung import gl, gluon

try:
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
except ImportError:
    mbarrier = tma = None

try:
    from triton.experimental.gluon.language import barrier
except ImportError:  # before Triton 3.7, or there is no Gluon
    barrier = getattr(gl, "thread_barrier", None)


@dataclass(frozen=True)
class Plan:
    """What is known when the kernel is compiled.

    DETERMINISTIC  dq is summed in the same order every time
    LANES          dq lies in memory as lanes hold it, see `add_dq`
    scores         layout of k qᵀ and v doᵀ; sums: of dk and dv; operand: of p and ds as their factors; dq: of dq
    lanes          layout of dq in the order in which lanes hold it
    ds             layout of ds in shared memory
    """

    H: int
    GROUP: int
    CAUSAL: bool
    D: int
    DETERMINISTIC: bool
    STAGES: int  # tiles of q, and of do, in shared memory; DS_STAGES: of ds
    DS_STAGES: int
    LANES: bool
    scores: object
    sums: object
    operand: object
    dq: object
    lanes: object
    ds: object
    BLOCK_M: int = 64  # queries
    BLOCK_N: int = 128  # keys: two warp groups' 64


@functools.cache
def plan(
    H: int, GROUP: int, CAUSAL: bool, D: int, DETERMINISTIC: bool, STAGES: int = 2,
    DS_STAGES: int = 2, LANES: bool = False,
) -> Plan:  # fmt: skip
    scores, sums, dq = (gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16]) for n in (Plan.BLOCK_M, D, D // 2))
    ds = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    operand = gl.DotOperandLayout(0, sums, 2)
    of_register = [[1], [2], *([n] for n in (512, 1024, 2048) if n < 32 * D)]
    of_lane, of_warp = [[4], [8], [16], [32], [64]], [[128], [256]]
    lanes = gl.DistributedLinearLayout(of_register, of_lane, of_warp, [], [32 * D])
    return Plan(H, GROUP, CAUSAL, D, DETERMINISTIC, STAGES, DS_STAGES, LANES, scores, sums, operand, dq, lanes, ds)


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
def new_barriers(COUNT: gl.constexpr, readers: gl.constexpr):
    """COUNT barriers on which `readers` arrive."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=readers)
    return barriers


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

    A tile is [BLOCK_M, D] or, with LANES, in the order in which lanes hold it: four numbers a lane then are neighbours,
    and a warp's are 512 bytes. Rows have but two such, and a warp's are 32 bytes of each of eight rows.
    """
    if PLAN.DETERMINISTIC:
        while turn_now(turns_ptr + 2 * tile + me) < turn:
            pass
    HALF: gl.constexpr = PLAN.D // 2
    dq_ptr += gl.cast(tile, gl.int64) * PLAN.BLOCK_M * PLAN.D
    if PLAN.LANES:
        # warp, 8 rows, row; 8 columns, lane of four, column
        dq = gl.permute(gl.reshape(dq, [4, 2, 8, HALF // 8, 4, 2]), (3, 0, 2, 4, 1, 5))
        dq = gl.convert_layout(gl.reshape(dq, [PLAN.BLOCK_M * HALF]), PLAN.lanes, assert_trivial=True)
        numbers = gl.arange(0, PLAN.BLOCK_M * HALF, PLAN.lanes)
        gl.atomic_add(dq_ptr + me * PLAN.BLOCK_M * HALF + numbers, dq, sem="relaxed")
    else:
        rows = gl.arange(0, PLAN.BLOCK_M, gl.SliceLayout(1, PLAN.dq))[:, None]
        cols = gl.arange(0, HALF, gl.SliceLayout(0, PLAN.dq))[None, :]
        gl.atomic_add(dq_ptr + me * HALF + (rows * PLAN.D + cols), dq, sem="relaxed")


@triton.jit
def _rows_of(x_ptr, batch, head, rows, cols, stride_b, stride_h, stride_t):
    """Where numbers of x [B, H, T, D] lie: [rows, cols]."""
    return x_ptr + batch * stride_b + head * stride_h + rows.to(tl.int64)[:, None] * stride_t + cols[None, :]


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    do_ptr, o_ptr, lse_ptr, numbers_ptr, dq_ptr, turns_ptr,
    T, H, stride_dob, stride_doh, stride_dot, stride_ob, stride_oh, stride_ot,
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program writes of BLOCK_M queries of a head lse in powers of 2, inf where there is no query or it sees no
    key, and -delta = -sum of do * o: numbers [B * H, blocks, 2, BLOCK_M]; and zeros to dq and, if given, turns."""
    block, blocks, index = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    batch, head = (index // H).to(tl.int64), (index % H).to(tl.int64)
    rows, cols = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)  # [BLOCK_M], [D]
    inside = (rows < T)[:, None]
    do = tl.load(_rows_of(do_ptr, batch, head, rows, cols, stride_dob, stride_doh, stride_dot), mask=inside, other=0.0)
    o = tl.load(_rows_of(o_ptr, batch, head, rows, cols, stride_ob, stride_oh, stride_ot), mask=inside, other=0.0)
    lse = tl.load(lse_ptr + index.to(tl.int64) * T + rows, mask=rows < T, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)  # log2(e)
    tile = index.to(tl.int64) * blocks + block
    numbers_ptr += tile * 2 * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(numbers_ptr, lse)
    tl.store(numbers_ptr + BLOCK_M, -tl.sum(do.to(tl.float32) * o.to(tl.float32), 1))
    dq_ptr += tile * BLOCK_M * D + tl.arange(0, BLOCK_M)[:, None] * D + cols[None, :]
    tl.store(dq_ptr, tl.zeros([BLOCK_M, D], tl.float32))
    if turns_ptr is not None:
        tl.store(turns_ptr + 2 * tile + tl.arange(0, 2), tl.zeros([2], tl.int32))


@triton.jit(do_not_specialize=["T"])
def round_kernel(
    dq_ptr, y_ptr, T, H, stride_yb, stride_yh, stride_yt,
    D: tl.constexpr, BLOCK_M: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_M rows of a head of y [B, H, T, D], in y's dtype: a tile of dq [.., BLOCK_M * D]."""
    block, blocks, index = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    batch, head = (index // H).to(tl.int64), (index % H).to(tl.int64)
    rows, cols = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)  # [BLOCK_M], [D]
    dq = tl.load(dq_ptr + (index.to(tl.int64) * blocks + block) * BLOCK_M * D + tl.arange(0, BLOCK_M * D))
    if LANES:  # warp group, 8 columns, warp, row, lane of four, 8 rows, column: to rows and columns, see `add_dq`
        dq = tl.permute(tl.reshape(dq, [2, D // 16, BLOCK_M // 16, 8, 4, 2, 2]), [2, 5, 3, 0, 1, 4, 6])
    y_ptr = _rows_of(y_ptr, batch, head, rows, cols, stride_yb, stride_yh, stride_yt)
    tl.store(y_ptr, tl.reshape(dq, [BLOCK_M, D]).to(y_ptr.dtype.element_ty), mask=(rows < T)[:, None])
