"""Attention, backward, on sm_90 (H100, H200): what attention_backward.py computes, in one kernel for dq, dk and dv.

There each of two kernels computes the scores anew, 7 products where 5 do. Here, as in FlashAttention-3 (Shah et al.
2024, arXiv:2407.08608), whoever has dk and dv of some keys adds to dq of all queries that see them, in memory, in fp32.

tiles     A program has 128 keys of a key head and walks over the queries that see them, 64 at a time, from the last
          ones to the first, of all heads that share the keys. dk and dv never leave its registers. All programs of a
          key head come to a block of queries at about the same time, so q, do and dq are found in the L2 cache.
roles     One warp does nothing but ask the copy engine (TMA) for tiles; k comes twice, as the rows and as the halves of
          columns that are multiplied. Two warp groups have 64 of the keys each: of
          k qᵀ and v doᵀ, transposed scores, so that p and ds leave one product in the registers where the next wants
          them. Only for dq, a sum over keys, each needs the other's ds, by way of shared memory. Each computes half of
          dq's columns, of all keys: tensor cores take no fewer than 64 rows, which are all that there are.
overlap   Of the next block q kᵀ runs while dq is added to memory, v doᵀ while exp2 is computed, p do while ds is.
          With two tiles of ds either group may be ahead of the other by almost a block.
delta     is what the sums of v doᵀ start from, negative: so it takes neither registers nor time afterwards.
dq        By atomic additions in any order, whose last bits differ from run to run; or, DETERMINISTIC, which is for
          torch.use_deterministic_algorithms(True), each block of queries takes what its keys add in their order, and a
          program waits for its turn. It waits for tiles before its own alone: since programs start in the order of
          tiles, one of them can always go on.

Registers: a thread of a group has 240, of which dk and dv take 128, p and dp 64. No product is under way from one turn
of the loop to the next: ptxas would let each wait for the one before. Nor are the addresses of what is multiplied kept.

H200, causal, 4 x 2048 tokens, 32/8 heads of 128: 0.851 ms, of which this kernel 0.770; the two of attention_backward.py
1.178; in one order 1.092. Heads of 64: 0.504, 0.875, 0.667. 1 x 8192 tokens: 2.876 and 3.972; 1 x 512: 0.104 and 0.112.

Casts: those of attention_backward.py. dq is summed in fp32, and rounded at the end by a kernel of its own, which can
turn it back by RoPE's angles on its way; another before it writes zeros there, delta, and lse in powers of 2: see
attention_backward_ends.py.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels.attention_backward_ends import launch_prepare, launch_round
from fastkit.kernels.attention_backward_parts import (
    add_dq,
    load,
    mask,
    matrix,
    new_ring,
    numbers_of,
    operand,
    pass_turn,
    plan,
    section_heads,
    steps_of,
    tile_of,
    wait_for,
    whole_steps,
)
from fastkit.kernels.attention_forward import LOG2_E, takes_tma
from fastkit.kernels.common import architecture, device_of, sm_count, triton
from fastkit.kernels.hopper_parts import descriptor, new_barriers
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
MOST_HEADS = 65535  # of the batch: a grid's second dimension


@gluon.jit
def _load_tiles(descs, shared, place, PLAN: gl.constexpr):
    """What the loading warp does: keys and values, then queries and do, block by block from the last one to the first,
    of a block all heads that share the keys."""
    k_desc, columns_desc, v_desc, q_desc, do_desc, numbers_desc = descs
    fixed, q_ring, do_ring, empty, _ = shared
    k_smem, columns_smem, v_smem, full = fixed
    kv, key = tile_of(gl.program_id(0), place, PLAN)
    blocks, seeing = steps_of(key, place, PLAN)
    batch, kv_head = kv // (PLAN.H // PLAN.GROUP), kv % (PLAN.H // PLAN.GROUP)
    for count in range(seeing * PLAN.GROUP):
        block, head = blocks - 1 - count // PLAN.GROUP, kv_head * PLAN.GROUP + count % PLAN.GROUP
        at = [batch, head, block * PLAN.BLOCK_M, 0]
        number = ((batch * PLAN.H + head) * blocks + block) * 2 * PLAN.BLOCK_M
        stage = count % PLAN.STAGES
        mbarrier.wait(empty.index(stage), (count // PLAN.STAGES % 2) ^ 1)
        load(q_desc, numbers_desc, at, number, q_ring, stage)
        if count == 0:
            mbarrier.expect(full.index(0), 2 * k_desc.block_type.nbytes)
            for a in gl.static_range(2):
                at_key = [batch, kv_head, key + 64 * a, 0]
                tma.async_copy_global_to_shared(k_desc, at_key, full.index(0), k_smem.index(a))
            mbarrier.expect(full.index(1), 2 * v_desc.block_type.nbytes)
            for a in gl.static_range(2):
                at_key = [batch, kv_head, key + 64 * a, 0]
                tma.async_copy_global_to_shared(v_desc, at_key, full.index(1), v_smem.index(a))
        load(do_desc, numbers_desc, at, number + PLAN.BLOCK_M, do_ring, stage)
        if count == 0:
            mbarrier.expect(full.index(2), 4 * columns_desc.block_type.nbytes)
            for i in gl.static_range(4):
                at_key = [batch, kv_head, key + 64 * (i // 2), PLAN.D // 2 * (i % 2)]
                tma.async_copy_global_to_shared(columns_desc, at_key, full.index(2), columns_smem.index(i))


@gluon.jit
def _scores(k_smem, q_ring, count, me, PLAN: gl.constexpr):
    """k qᵀ of block `count` of queries, once it has come, begun."""
    wait_for(q_ring, count, PLAN)
    zeros = gl.full([64, PLAN.BLOCK_M], 0.0, gl.float32, PLAN.scores)
    k = k_smem.index(me + (count >> 30)).reshape([64, PLAN.D])
    return warpgroup_mma(k, matrix(q_ring, count, PLAN).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _dp(v_smem, do_ring, count, me, PLAN: gl.constexpr):
    """v doᵀ - delta of block `count` of queries, which has come, begun."""
    sums = gl.full([64, PLAN.BLOCK_M], 0.0, gl.float32, PLAN.scores) + numbers_of(do_ring, count, PLAN)
    v = v_smem.index(me + (count >> 30)).reshape([64, PLAN.D])
    return warpgroup_mma(v, matrix(do_ring, count, PLAN).permute((1, 0)), sums, is_async=True)


@gluon.jit
def _probabilities(s, q_ring, count, inner, scale_log2, PLAN: gl.constexpr):
    """p of the scores s of block `count`."""
    _, _, _, _, whole, first, left = inner
    lse = numbers_of(q_ring, count, PLAN)
    if count >= whole * PLAN.GROUP:
        s = mask(s, first + count // PLAN.GROUP * PLAN.BLOCK_M, left, PLAN)
    return gl.exp2(s * scale_log2 - lse)


@gluon.jit
def _sum_dq(ds_smem, columns_smem, count, me, PLAN: gl.constexpr):
    """This warp group's half of a block's dq, half of its columns, not yet scaled, begun."""
    dq = gl.full([PLAN.BLOCK_M, PLAN.D // 2], 0.0, gl.float32, PLAN.dq)
    for a in gl.static_range(2):
        ds = ds_smem.index(2 * (count % PLAN.DS_STAGES) + a + (count >> 30)).permute((1, 0))
        k = columns_smem.index(2 * a + me + (count >> 30)).reshape([64, PLAN.D // 2])
        dq = warpgroup_mma(ds, k, dq, use_acc=a > 0, is_async=True)
    return dq


@gluon.jit
def _attend_block(dk, dv, p, dp, pointers, shared, inner, scales, count, me, PLAN: gl.constexpr):
    """(dk, dv, p, dp): dk and dv after block `count` of queries as well, whose dq is added to what is in memory.

    p, dp  the block's, dp less delta; returned are those of the next block, of the last one its own once more
    """
    fixed, q_ring, do_ring, empty, exchange = shared
    k_smem, columns_smem, v_smem, _ = fixed
    ds_smem, ds_full, ds_empty = exchange
    last_tile, turn, blocks, seeing, _, _, _ = inner
    dq_ptr, turns_ptr = pointers
    zero = count >> 30  # which the compiler cannot know: it would keep all addresses in registers
    tile = last_tile + count % PLAN.GROUP * blocks - count // PLAN.GROUP
    following = gl.minimum(count + 1, seeing * PLAN.GROUP - 1)
    q, do = matrix(q_ring, count, PLAN), matrix(do_ring, count, PLAN)
    dv = warpgroup_mma(operand(p.to(q.dtype), PLAN), do, dv, is_async=True)
    ds = (p * dp).to(q.dtype)
    ds_smem.index(2 * (count % PLAN.DS_STAGES) + me + zero).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(0))
    dk = warpgroup_mma(operand(ds, PLAN), q, dk, is_async=True)
    mbarrier.wait(ds_full.index(0), count % 2)
    dq = _sum_dq(ds_smem, columns_smem, count, me, PLAN)
    dk, dv = warpgroup_mma_wait(2, [dk, dv])
    mbarrier.arrive(empty.index(count % PLAN.STAGES))
    s = _scores(k_smem, q_ring, following, me, PLAN)
    dq = warpgroup_mma_wait(1, [dq])
    mbarrier.arrive(ds_empty.index(count % PLAN.DS_STAGES))
    add_dq(dq * scales[0], dq_ptr, turns_ptr, tile, turn, me, PLAN)
    wait_for(do_ring, following, PLAN)
    dp = _dp(v_smem, do_ring, following, me, PLAN)
    s = warpgroup_mma_wait(1, [s])
    p = _probabilities(s, q_ring, following, inner, scales[1], PLAN)
    # This waits by branches, across which no instruction is moved: exp2 stays before the wait for dp.
    mbarrier.wait(ds_empty.index((count + 1) % PLAN.DS_STAGES), ((count + 1) // PLAN.DS_STAGES % 2) ^ 1)
    dp = warpgroup_mma_wait(0, [dp])
    if PLAN.DETERMINISTIC:
        pass_turn(turns_ptr + 2 * tile + me)
    return dk, dv, p, dp


@gluon.jit
def _write(x, desc, smem, at, PLAN: gl.constexpr):
    """Write x [64, D] by way of shared memory."""
    smem.reshape([64, PLAN.D]).store(x.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, at, smem)


@gluon.jit
def _attend_tile(descs, pointers, shared, place, scales, me, PLAN: gl.constexpr):
    """What warp group `me`, 0 or 1, does: its 64 keys."""
    dk_desc, dv_desc = descs
    fixed, q_ring, do_ring, _, _ = shared
    k_smem, _, v_smem, full = fixed
    _, T_q, T_k = place
    kv, key = tile_of(gl.program_id(0), place, PLAN)
    blocks, seeing = steps_of(key, place, PLAN)
    turn = key // PLAN.BLOCK_N  # as many blocks of keys are seen by all queries that see these, and have added theirs
    key += 64 * me
    last_tile = (kv * PLAN.GROUP + 1) * blocks - 1
    first = key - (T_k - T_q) - (blocks - 1) * PLAN.BLOCK_M  # query of the last block to see these keys
    inner = (last_tile, turn, blocks, seeing, whole_steps(key, place, PLAN), first, T_k - key)
    dk = gl.full([64, PLAN.D], 0.0, gl.float32, PLAN.sums)
    dv = gl.full([64, PLAN.D], 0.0, gl.float32, PLAN.sums)
    mbarrier.wait(full.index(0), 0)
    s = _scores(k_smem, q_ring, 0, me, PLAN)
    mbarrier.wait(full.index(1), 0)
    wait_for(do_ring, 0, PLAN)
    dp = _dp(v_smem, do_ring, 0, me, PLAN)
    s = warpgroup_mma_wait(1, [s])
    p = _probabilities(s, q_ring, 0, inner, scales[1], PLAN)
    mbarrier.wait(full.index(2), 0)
    dp = warpgroup_mma_wait(0, [dp])
    for count in range(seeing * PLAN.GROUP):
        dk, dv, p, dp = _attend_block(dk, dv, p, dp, pointers, shared, inner, scales, count, me, PLAN)
    at = [kv // (PLAN.H // PLAN.GROUP), kv % (PLAN.H // PLAN.GROUP), key, 0]
    _write(dv, dv_desc, v_smem.index(me), at, PLAN)  # no one else reads these keys and values
    _write(dk * scales[0], dk_desc, k_smem.index(me), at, PLAN)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["section", "T_q", "T_k"])
def _backward_hopper_kernel(
    k_desc, columns_desc, v_desc, q_desc, do_desc, numbers_desc, dk_desc, dv_desc, dq_ptr, turns_ptr,
    section, T_q, T_k, scale, scale_log2, PLAN: gl.constexpr,
):  # fmt: skip
    """One program writes dk and dv of 128 keys of a key head, and adds to dq of all queries that see them."""
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [2, 1, 1, 64, PLAN.D], k_desc.layout)
    columns_smem = gl.allocate_shared_memory(k_desc.dtype, [4, 1, 1, 64, PLAN.D // 2], columns_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [2, 1, 1, 64, PLAN.D], v_desc.layout)
    ds_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * PLAN.DS_STAGES, 64, PLAN.BLOCK_M], PLAN.ds)
    q_ring, do_ring = new_ring(q_desc, numbers_desc, PLAN), new_ring(do_desc, numbers_desc, PLAN)
    fixed = (k_smem, columns_smem, v_smem, new_barriers(3, 1))
    exchange = (ds_smem, new_barriers(1, 2), new_barriers(PLAN.DS_STAGES, 2))
    shared = (fixed, q_ring, do_ring, new_barriers(PLAN.STAGES, 2), exchange)
    fence_async_shared()
    place, scales, pointers = (section, T_q, T_k), (scale, scale_log2), (dq_ptr, turns_ptr)
    loaded = (k_desc, columns_desc, v_desc, q_desc, do_desc, numbers_desc)
    gl.warp_specialize(
        [
            (_attend_tile, ((dk_desc, dv_desc), pointers, shared, place, scales, 0, PLAN)),
            (_attend_tile, ((dk_desc, dv_desc), pointers, shared, place, scales, 1, PLAN)),
            (_load_tiles, (loaded, shared, place, PLAN)),
        ],
        [4, 1],  # warps of the second and the third
        [240, 24],  # registers of a thread; the first gets what is left of 12 warps' 168, as many as the second
    )


def takes(arch: str, do, q, k, v, dk, dv) -> bool:
    """Whether `launch` can compute such tensors, [B, H, T, D] and in any strides that TMA takes, on `arch`.

    No windows and no packed batches. Not while torch.compile traces, which knows no Gluon.
    """
    if GLUON_MISSING or mbarrier is None or arch != "sm_90":
        return False
    return q.shape[3] in HEADS and q.shape[0] * q.shape[1] <= MOST_HEADS and takes_tma(arch, do, q, k, v, dk, dv)


def _launch(do, q, k, v, o, lse, dk, dv, chosen, scale: float) -> torch.Tensor:
    """dq in fp32, [B, H, blocks, BLOCK_M * D], in tiles as `add_dq` says; dk and dv are written."""
    (B, H, T_q, D), (_, H_k, T_k, _) = q.shape, k.shape
    M, blocks, key_blocks = chosen.BLOCK_M, triton.cdiv(T_q, chosen.BLOCK_M), triton.cdiv(T_k, chosen.BLOCK_N)
    numbers = torch.empty(B * H * blocks * 2 * M, device=q.device)
    dq = torch.empty(B, H, blocks, M * D, device=q.device)
    turns = torch.empty(B * H * blocks * 2, dtype=torch.int32, device=q.device) if chosen.DETERMINISTIC else None
    section = section_heads(B * H_k, key_blocks, sm_count(q.device))
    keys, queries = [1, 1, 64, D], [1, 1, M, D]
    launch_prepare(do, o, lse, numbers, dq, turns)
    with device_of(q):
        _backward_hopper_kernel[(key_blocks * B * H_k,)](
            descriptor(k, keys), descriptor(k, [1, 1, 64, D // 2]), descriptor(v, keys),
            descriptor(q, queries), descriptor(do, queries), descriptor(numbers, [M]),
            descriptor(dk, keys), descriptor(dv, keys), dq, turns,
            section, T_q, T_k, scale, scale * LOG2_E, PLAN=chosen, num_warps=4, maxnreg=168,
        )  # fmt: skip
    return dq


def launch(
    do, q, k, v, o, lse, dq, dk, dv, *, causal: bool, scale: float, deterministic: bool = False, cos=None, sin=None
) -> None:
    """Write dq, dk and dv, as attention_backward.launch_backward, lse contiguous, of what `takes` accepts.

    deterministic  dq has the same bits every time; dk and dv have anyway
    cos, sin       [T_q, D], [1, T_q, D] or [B, T_q, D], as rope.launch takes them: dq is turned back by them before it
                   is rounded
    """
    H, D = q.shape[1], q.shape[3]
    chosen = plan(H, H // k.shape[1], causal, D, deterministic)
    launch_round(_launch(do, q, k, v, o, lse, dk, dv, chosen, scale), dq, cos, sin)


def _launch_where_taken(do, q, k, v, o, lse, dq, dk, dv, **options) -> None:
    if not takes(arch := architecture(q.device), do, q, k, v, dk, dv):
        raise NotImplementedError(f"attention_backward_hopper needs sm_90 and this is {arch}: use attention_backward")
    launch(do, q, k, v, o, lse, dq, dk, dv, causal=True, scale=q.shape[3] ** -0.5, **options)


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    found = {}
    for D in HEADS:
        q, do, o, dq = (torch.empty(4, 2048, 32, D, dtype=dtype, device="meta").transpose(1, 2) for _ in range(4))
        k, v, dk, dv = (torch.empty(4, 2048, 8, D, dtype=dtype, device="meta").transpose(1, 2) for _ in range(4))
        tensors = (do, q, k, v, o, torch.empty(4, 32, 2048, device="meta"), dq, dk, dv)
        cos, sin = (torch.empty(1, 2048, D, dtype=dtype, device="meta") for _ in range(2))
        for how, options in (
            ("", {}),
            (", in one order", {"deterministic": True}),
            (", turned back", {"cos": cos, "sin": sin}),
        ):
            found[f"32/8 heads of {D}, 4x2048{how}"] = functools.partial(_launch_where_taken, *tensors, **options)
    return found
