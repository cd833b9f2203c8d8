"""Attention, forward, on sm_90 (H100, H200): what attention_forward.py computes, on tensor cores that seldom wait.

There each warp multiplies, then takes the softmax, and while it does the one it leaves idle what does the other. Here,
as in FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), it is said by hand who does what and when; hence Gluon.

roles     One warp does nothing but ask the copy engine (TMA) for tiles, as far ahead as shared memory goes. Two warp
          groups multiply, 64 of a tile's 128 queries each, and take the registers that the loading warp can spare.
          Barriers in shared memory (mbarrier) say that a tile has come and that both have read it.
overlap   A warp group begins q kᵀ of a block of keys and p v of the block before, and takes the softmax of the one
          while the other runs.
tiles     There is one program an SM, and it takes tile after tile: what the next one needs comes while this one is
          computed, and this one is written while the next is computed. All programs get as much to do: see tile_of.

Registers: a thread of a group has 240, of which acc, the scores and p take 160. For them to be enough, p goes from
block to block in 16 bits, and a block that needs a mask, but the first, takes its softmax after both products.

Casts: those of attention_forward.py.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels.attention_parts import (
    index_of,
    load,
    mask,
    masked_blocks,
    matrix,
    new_ring,
    operand,
    packed,
    plan,
    release,
    scaled,
    section_sizes,
    softmax,
    tile_of,
    turns_of,
    wait_for,
)
from fastkit.kernels.common import architecture, device_of, sm_count, triton
from fastkit.kernels.hopper_parts import descriptor
from fastkit.kernels.ladders.rung import GLUON_MISSING, gl, gluon

try:
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError:
    mbarrier = None

HEADS = (64, 128)  # numbers of a head
LOG2_E = 1.4426950408889634


@gluon.jit
def _load_tiles(q_desc, k_desc, v_desc, shared, numbers, PLAN: gl.constexpr):
    """What the loading warp does: queries, then keys and values from the last block to the first, as they are used."""
    queries, k_ring, v_ring, _ = shared
    q_smem, q_full, q_empty = queries
    sizes, tiles, _ = numbers
    count = 0
    for turn in range(turns_of(tiles)):
        head, row, n = tile_of(index_of(turn), sizes, PLAN)
        batch, head = head // PLAN.H, head % PLAN.H
        kv_head = head // PLAN.GROUP
        stage = turn % 2
        mbarrier.wait(q_empty.index(stage), (turn // 2 % 2) ^ 1)
        mbarrier.expect(q_full.index(stage), 2 * q_desc.block_type.nbytes)
        for i in gl.static_range(2):
            to = q_smem.index(2 * stage + i)
            tma.async_copy_global_to_shared(q_desc, [batch, head, row + 64 * i, 0], q_full.index(stage), to)
        load(k_desc, batch, kv_head, (n - 1) * PLAN.BLOCK_N, k_ring, count, PLAN)
        for j in range(1, n):
            load(k_desc, batch, kv_head, (n - 1 - j) * PLAN.BLOCK_N, k_ring, count + j, PLAN)
            load(v_desc, batch, kv_head, (n - j) * PLAN.BLOCK_N, v_ring, count + j - 1, PLAN)
        count += n
        load(v_desc, batch, kv_head, 0, v_ring, count - 1, PLAN)


@gluon.jit
def _scores(q, k_ring, count, PLAN: gl.constexpr):
    """q kᵀ of key block `count`, begun."""
    zeros = gl.full([64, PLAN.BLOCK_N], 0.0, gl.float32, PLAN.scores)
    return warpgroup_mma(q, matrix(k_ring, count, PLAN).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _attend_block(
    acc, row_sum, row_max, p, q, k_ring, v_ring, count, more, row, col, T_q, T_k, scale_log2,
    MASKED: gl.constexpr, PLAN: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of key block `count`, which has come, beside p v of the one before.

    p  of the block before, packed; more: whether another block follows
    """
    s = _scores(q, k_ring, count, PLAN)
    wait_for(v_ring, count - 1, True, PLAN)
    acc = warpgroup_mma(operand(p, q.dtype, PLAN), matrix(v_ring, count - 1, PLAN), acc, is_async=True)
    if MASKED:
        s, acc = warpgroup_mma_wait(0, [s, acc])
        release(v_ring, count - 1, PLAN)
        s = mask(s, row, col, T_q, T_k, PLAN)
    else:
        s = warpgroup_mma_wait(1, [s])
    release(k_ring, count, PLAN)
    p, decay, row_sum, row_max = softmax(s, row_sum, row_max, scale_log2, PLAN)
    # This waits by branches, across which no instruction is moved: the softmax stays before the wait for p v.
    wait_for(k_ring, count + 1, more, PLAN)
    if not MASKED:
        acc, p = warpgroup_mma_wait(0, [acc, p])
        release(v_ring, count - 1, PLAN)
    return scaled(acc, decay, PLAN), row_sum, row_max, packed(p, q.dtype, PLAN)


@gluon.jit
def _write(acc, row_sum, row_max, o_desc, o_smem, lse_ptr, head, row, T_q, PLAN: gl.constexpr):
    """Write lse, and o by way of shared memory, from where it is copied while the next tile is computed."""
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, PLAN.scores))
    none = row_sum == 0.0  # a query before all keys
    row_sum = gl.where(none, 1.0, row_sum)
    lse = gl.where(none, float("-inf"), (row_max + gl.log2(row_sum)) * 0.6931471805599453)  # ln 2
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, PLAN.scores))
    gl.store(lse_ptr + gl.cast(head, gl.int64) * T_q + rows, lse, mask=rows < T_q)
    o = scaled(acc, 1.0 / row_sum, PLAN)
    tma.store_wait(0)  # the last tile's o has left
    o_smem.reshape([64, PLAN.D]).store(o.to(o_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [head // PLAN.H, head % PLAN.H, row, 0], o_smem)


@gluon.jit
def _attend_tiles(o_desc, lse_ptr, shared, numbers, me, PLAN: gl.constexpr):
    """What warp group `me`, 0 or 1, does: its 64 queries of each tile."""
    queries, k_ring, v_ring, o_smem = shared
    q_smem, q_full, q_empty = queries
    sizes, tiles, scale_log2 = numbers
    T_q, T_k = sizes[2], sizes[3]
    count = 0  # blocks of keys so far
    head, row, n = tile_of(index_of(0), sizes, PLAN)
    for turn in range(turns_of(tiles)):
        row += 64 * me
        col = (n - 1) * PLAN.BLOCK_N
        masked = masked_blocks(n, row, T_q, T_k, PLAN)
        row_sum = gl.full([64, 4], 0.0, gl.float32, PLAN.lanes)
        row_max = gl.full([64], -3.0e38, gl.float32, gl.SliceLayout(1, PLAN.scores))  # for -inf - -inf is nan
        acc = gl.full([64, PLAN.D], 0.0, gl.float32, PLAN.outputs)
        q = q_smem.index(2 * (turn % 2) + me).reshape([64, PLAN.D])
        mbarrier.wait(q_full.index(turn % 2), turn // 2 % 2)
        wait_for(k_ring, count, True, PLAN)
        s = _scores(q, k_ring, count, PLAN)
        s = mask(warpgroup_mma_wait(0, [s]), row, col, T_q, T_k, PLAN)
        release(k_ring, count, PLAN)
        p, _, row_sum, row_max = softmax(s, row_sum, row_max, scale_log2, PLAN)
        p = packed(p, q.dtype, PLAN)
        wait_for(k_ring, count + 1, n > 1, PLAN)
        for j in range(1, masked):
            acc, row_sum, row_max, p = _attend_block(
                acc, row_sum, row_max, p, q, k_ring, v_ring, count + j, j + 1 < n,
                row, col - j * PLAN.BLOCK_N, T_q, T_k, scale_log2, True, PLAN,
            )  # fmt: skip
        for j in range(masked, n):
            acc, row_sum, row_max, p = _attend_block(
                acc, row_sum, row_max, p, q, k_ring, v_ring, count + j, j + 1 < n,
                row, 0, T_q, T_k, scale_log2, False, PLAN,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(turn % 2))
        count += n
        wait_for(v_ring, count - 1, True, PLAN)
        acc = warpgroup_mma(operand(p, q.dtype, PLAN), matrix(v_ring, count - 1, PLAN), acc, is_async=True)
        next_head, next_row, n = tile_of(index_of(turn + 1), sizes, PLAN)  # divisions, while the product runs
        acc = warpgroup_mma_wait(0, [acc])
        release(v_ring, count - 1, PLAN)
        _write(acc, row_sum, row_max, o_desc, o_smem.index(me), lse_ptr, head, row, T_q, PLAN)
        head, row = next_head, next_row
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["section", "sections", "T_q", "T_k", "tiles"])
def _hopper_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, section, sections, T_q, T_k, tiles, scale_log2, PLAN: gl.constexpr
):
    """One program writes o and lse of tiles of 128 queries of a head, in turn."""
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [4, 1, 1, 64, PLAN.D], q_desc.layout)  # the next tile's too
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [2, 1, 1, 64, PLAN.D], o_desc.layout)
    k_ring, v_ring = new_ring(k_desc, PLAN), new_ring(v_desc, PLAN)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    fence_async_shared()
    shared = ((q_smem, q_full, q_empty), k_ring, v_ring, o_smem)
    numbers = ((section, sections, T_q, T_k), tiles, scale_log2)
    gl.warp_specialize(
        [
            (_attend_tiles, (o_desc, lse_ptr, shared, numbers, 0, PLAN)),
            (_attend_tiles, (o_desc, lse_ptr, shared, numbers, 1, PLAN)),
            (_load_tiles, (q_desc, k_desc, v_desc, shared, numbers, PLAN)),
        ],
        [4, 1],  # warps of the second and the third
        [240, 24],  # registers of a thread; the first gets what is left of 12 warps' 168, as many as the second
    )


def takes(arch: str, q, k) -> bool:
    """Whether `launch` can compute such tensors, [B, H, T, D] and in any strides that TMA takes, on `arch`.

    No windows and no packed batches. Not while torch.compile traces, which knows no Gluon.
    """
    if GLUON_MISSING or mbarrier is None or arch != "sm_90" or torch.compiler.is_compiling():
        return False
    return q.shape[3] in HEADS and q.element_size() == 2 and k.shape[2] > 0


def launch(q, k, v, o, lse, causal: bool, scale: float) -> None:
    """Write o and lse, as attention_forward.launch_forward, lse contiguous, of what attention_forward.on_hopper
    accepts."""
    (B, H, T_q, D), (_, H_k, T_k, _) = q.shape, k.shape
    chosen = plan(H, H // H_k, causal, D)
    tiles = triton.cdiv(T_q, chosen.BLOCK_M) * B * H
    q, o = (descriptor(x, [1, 1, 64, D]) for x in (q, o))
    k_desc, v_desc = (descriptor(x, [1, 1, chosen.BLOCK_N, D]) for x in (k, v))
    with device_of(lse):
        _hopper_kernel[(min(tiles, sm_count(lse.device)),)](
            q, k_desc, v_desc, o, lse, *section_sizes(k), T_q, T_k, tiles, scale * LOG2_E, PLAN=chosen,
            num_warps=4, maxnreg=168,
        )  # fmt: skip


def _launch_where_taken(q, k, v, o, lse) -> None:
    if not takes(arch := architecture(q.device), q, k):
        raise NotImplementedError(f"attention_hopper needs sm_90 and this is {arch}: use attention_forward")
    launch(q, k, v, o, lse, True, q.shape[3] ** -0.5)


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    found = {}
    for D in HEADS:
        q, o = (torch.empty(4, 2048, 32, D, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
        k, v = (torch.empty(4, 2048, 8, D, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
        tensors = (q, k, v, o, torch.empty(4, 32, 2048, device="meta"))
        found[f"32/8 heads of {D}, 4x2048"] = functools.partial(_launch_where_taken, *tensors)
    return found
