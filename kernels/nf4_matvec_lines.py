"""`nf4_matvec` on NVIDIA's tensor cores, in whole lines: y [M, N] = x @ W.T for 1 to 8 rows of x in 16 bits.

The maths is that of `nf4_matvec`, whose own kernels run wherever this one does not (see `takes`). What they pay for
beside the bytes, and what this one does about it:

waiting     The whole takes ten times as long as memory takes to answer. So a warp asks for its words `depth` turns
            ahead, the first before all else, by copies (cp.async) into its part of a ring in shared memory, and waits
            for the oldest alone: a loop's loads into registers have one counter for all. Warps meet to add up.
decoding    A number took a shift, a mask and a load from shared memory, and came as two, a product each. Here a byte is
            looked up: two numbers, as a tensor core takes them. The table has 256 entries, 32 times: lane l reads the
            copy in bank l, and no two lanes want the same bank. The address, 128 * byte + 4 * lane, is one instruction:
            a dot product of a word's bytes with 128 in one place.
precision   fp16 has 11 bits, and CODE may be scaled: by SCALE all 16 values lie near numbers of fp16, 20 times nearer
            than weights dequantized to bfloat16 to theirs. So x in bfloat16 is turned into fp16, a block at a time by
            a power of two, which absmax takes back, as y takes SCALE.
layout      A product may take k in any order. So a lane reads the words that belong to its place in the tensor core, x
            in the same order, and nothing moves between lanes. Triton leaves that order to no one: hence Gluon.
absmax      It comes with the words; a lane finds that of one of 4 blocks, in both its rows. Of a product's 8 columns
            1 or 2 rows of x leave most empty: so x of all 4 blocks stands there side by side, and a lane has the sums
            of its own block. Up to 4 rows leave room for 2 blocks; shuffles then show absmax around.
programs    One runs on an SM, or two: a table serves many rows. A warp takes 128 bytes of 16 rows, its x in registers;
            where warps do not cover all columns, a program takes its rows for one stretch of them after another.

What is left: an SM's shared memory moves 128 bytes a clock, and a turn of a warp, 2 KB of words, takes it about 112
clocks, 64 of them for looking up, 32 for the words to arrive and be read; an H200's memory takes 113. There 14336 x
4096 and one row in bfloat16 take 12.5 us from a graph (15.3, 12.7, 13.7 with depths of 1, 3, 4); bitsandbytes 38.8,
nf4_matvec's own kernel 33.2. Launched alone 18.5, and a kernel that only reads the bytes 9.6; at a copy's speed 7.2.
Nsight Compute, launched alone: shared memory moves something in 59% of the clocks, the schedulers issue in 45% and DRAM
answers in 42%, start and tail counted in; the table and 87 registers leave 16 warps to an SM.

Casts: CODE * SCALE is rounded to fp16; absmax, sums and products of both are fp32; y is rounded once.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels.common import architecture, device_of, sm_count
from fastkit.kernels.ladders.rung import GLUON_MISSING, barrier, gl, gluon
from fastkit.kernels.nf4 import NF4Weight, empty_nf4, kernel_arguments
from fastkit.kernels.nf4_matvec_parts import most_tiles, plan


@gluon.jit
def _shown(x, lane):
    """x of another lane, there and then: what is pure may be moved before a loop, and takes registers in it."""
    return gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=f,f,r", [x, lane], gl.float32, False, 1)


@gluon.jit
def _pairs(x, PLAN: gl.constexpr):
    """x [W, 4, 8], or 1 for any of these, of lanes, for what each has two of: [1, W, 4, 8]."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([2, 1, 1, 1], [1, 1, 4, 8], [1, PLAN.W, 1, 1], [0, 2, 3, 1])
    return gl.convert_layout(gl.reshape(x, [1, x.shape[0], x.shape[1], x.shape[2]]), LAYOUT)


@gluon.jit
def _two(PLAN: gl.constexpr):
    """0 and 1, of what a lane has two of."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([2, 1, 1, 1], [1, 1, 4, 8], [1, PLAN.W, 1, 1], [0, 2, 3, 1])
    return gl.set_auto_layout(gl.arange(0, 2)[:, None, None, None], LAYOUT)


@gluon.jit
def _fours(x, PLAN: gl.constexpr, of_columns: gl.constexpr = False):
    """x [W, 4, 8], or [2, W, 4, 8] of rows or of columns, for what a lane has four of: [2, 2, W, 4, 8]."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([2, 2, 1, 1, 1], [1, 1, 1, 4, 8], [1, 1, PLAN.W, 1, 1], [1, 0, 3, 4, 2])
    if len(x.shape) == 3:
        x = gl.reshape(x, [1, 1, x.shape[0], x.shape[1], x.shape[2]])
    elif of_columns:
        x = gl.reshape(x, [1, x.shape[0], x.shape[1], x.shape[2], x.shape[3]])
    else:
        x = gl.reshape(x, [x.shape[0], 1, x.shape[1], x.shape[2], x.shape[3]])
    return gl.convert_layout(x, LAYOUT)


@gluon.jit
def _row(tile, N):
    """A tile's first row; the last tile is moved up to be whole."""
    return gl.minimum(16 * (gl.program_id(0) + tile * gl.num_programs(0)), N - 16)


@gluon.jit
def _asking(absmax_ptr, nested_absmax_ptr, base, warp, lane, PLAN: gl.constexpr):
    """Of a lane: where its part of absmax is, by which power of 2 it is rarer; where what it asks for goes."""
    absmax, rarer, ring = absmax_ptr.to(gl.int64, bitcast=True), 0, base + PLAN.ring + warp * PLAN.stage
    if PLAN.double_quant:  # no branch, of which a loop might make two
        absmax = gl.where(lane < 16, absmax, nested_absmax_ptr.to(gl.int64, bitcast=True))
        rarer, absmax_to = gl.where(lane < 16, 0, 6), ring + (2048 + 4 * lane)
    else:
        absmax_to = ring + (2048 + 16 * (lane % 16))
    return absmax, rarer, absmax_to, ring + (lane // 8) * 128 + 16 * ((lane % 8) ^ (2 * (lane // 8)))


@gluon.jit
def _ask(words_ptr, asked, tiles, slot, N, warp, lane, asking, PLAN: gl.constexpr):
    """Ask for a turn: words of 4 blocks in 16 rows, and absmax of each, or nothing beyond the last turn.

    Lane l asks for 16 bytes of words of rows l // 8 + 4 n, and for absmax of row l % 16: one lane for those of 4 units,
    or one for 4 indices and another for what they are multiplied by. Returns (stretch, tile) of the next turn.
    """
    stretch, tile = asked
    absmax, rarer, absmax_to, words_to = asking
    row, chunk, to = _row(tile, N), stretch * PLAN.W + warp, slot * (PLAN.W * PLAN.stage)
    words = words_ptr + row.to(gl.int64) * (PLAN.K // 8)  # numbers can pass 2**31
    words += (lane // 8) * (PLAN.K // 8) + 4 * (lane % 8) + 32 * chunk
    unit = ((row + lane % 16) * (PLAN.K // 64) + 4 * chunk) // PLAN.units
    absmax += ((unit >> rarer) & -4) if PLAN.double_quant else 4 * (unit & -4)
    wanted = ((stretch < PLAN.stretches) & (chunk < PLAN.K // 256)).to(gl.int32)
    if not PLAN.double_quant:  # one lane of the two that would write the same
        wanted += wanted & (lane < 16).to(gl.int32)
    operands = (words, words_to + to, absmax, absmax_to + to, wanted)
    gl.inline_asm_elementwise(PLAN.ask, "=r,l,r,l,r,r", operands, gl.int32, False, 1)
    last = (tile + 1 == tiles).to(gl.int32)
    return stretch + last, (tile + 1) * (1 - last)


@gluon.jit
def _x_loaded(x_ptr, stretch, group: gl.constexpr, M, PLAN: gl.constexpr):
    """Pairs of x that a lane's words meet, of blocks side by side: [8, W, 4, 8]."""
    LOADED: gl.constexpr = gl.BlockedLayout([8, 1, 1, 1], [1, 1, 4, 8], [1, PLAN.W, 1, 1], [0, 2, 3, 1])
    ROWS: gl.constexpr = 8 // PLAN.beside
    pair = gl.set_auto_layout(gl.arange(0, 8)[:, None, None, None], LOADED)
    warp = gl.set_auto_layout(gl.arange(0, PLAN.W)[None, :, None, None], LOADED)
    t = gl.set_auto_layout(gl.arange(0, 4)[None, None, :, None], LOADED)
    g = gl.set_auto_layout(gl.arange(0, 8)[None, None, None, :], LOADED)
    row = gl.minimum(g % ROWS, M - 1)  # what comes out beyond M is nobody's
    ptrs = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + stretch * (128 * PLAN.W) + 32 * PLAN.beside * group
    ptrs += row * (PLAN.K // 2) + (128 * warp + 32 * (g // ROWS) + 8 * t + pair)
    if PLAN.even:
        return gl.load(ptrs)
    return gl.load(ptrs, mask=stretch * PLAN.W + warp < PLAN.K // 256, other=0)


@gluon.jit
def _x_in_fp16(x, bf16: gl.constexpr, t, PLAN: gl.constexpr):
    """x for each of two words. Of bfloat16 it is scaled by a power of two, for each block; what takes that back for the
    lane's columns comes third."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([2, 2, 1, 1, 1], [1, 1, 1, 4, 8], [1, 1, PLAN.W, 1, 1], [1, 0, 3, 4, 2])
    inverse = 1.0
    if bf16:
        low, high = (x << 16).to(gl.float32, bitcast=True), (x & -65536).to(gl.float32, bitcast=True)
        top = gl.max(gl.max(gl.maximum(gl.abs(low), gl.abs(high)), 0), 1)  # [W, 8]
        power = gl.minimum(268 - (top.to(gl.int32, bitcast=True) >> 23), 253)  # to 2**15, and the inverse is normal
        scale = gl.expand_dims(gl.expand_dims((power << 23).to(gl.float32, bitcast=True), 1), 0)
        into: gl.constexpr = "cvt.rn.f16x2.f32 $0, $1, $2;"
        x = gl.inline_asm_elementwise(into, "=r,f,f", [high * scale, low * scale], gl.int32, is_pure=True, pack=1)
        inverse = _pairs(gl.reshape(((254 - power) << 23).to(gl.float32, bitcast=True), [PLAN.W, 1, 8]), PLAN)
        if PLAN.beside > 1:
            inverse = _of_columns(inverse, t, PLAN)
    one, two = gl.split(gl.permute(gl.reshape(x, [2, 2, 2, PLAN.W, 4, 8]), [1, 2, 3, 4, 5, 0]))
    return gl.convert_layout(one, LAYOUT, True), gl.convert_layout(two, LAYOUT, True), inverse  # trivial ones


@gluon.jit
def _of_columns(inverse, t, PLAN: gl.constexpr):
    """What x was divided by, for a lane's two columns, of that for its g."""
    return _fours(_shown(inverse, 8 * _pairs(t, PLAN) + 4 * _two(PLAN)), PLAN, True)


@gluon.jit
def _x_of_stretch(x_ptr, stretch, M, t, PLAN: gl.constexpr):
    GROUPS: gl.constexpr = 4 // PLAN.beside
    x = ()
    for group in gl.static_range(GROUPS):
        loaded = _x_loaded(x_ptr, stretch, group, M, PLAN)
        x += (_x_in_fp16(loaded, x_ptr.dtype.element_ty == gl.bfloat16, t, PLAN),)
    return x


@gluon.jit
def _absmax(at, stretch, tile, offset, codes, N, lanes, PLAN: gl.constexpr):
    """[2, W, 4, 8]: of one of 4 blocks, in both of a lane's rows, of the turn at `at`."""
    warp, t, g = lanes
    rows, chunk, member = 8 * _two(PLAN) + _pairs(g, PLAN), _pairs(stretch * PLAN.W + warp, PLAN), _pairs(t, PLAN)
    if PLAN.units > 1:
        member = ((_row(tile, N) + rows) * (PLAN.K // 64) + 4 * chunk + member) // PLAN.units % 4
    at = _pairs(at, PLAN) + 2048
    if PLAN.double_quant:
        at += 4 * rows
        absmax = gl.inline_asm_elementwise(
            PLAN.find, "=f,r,r", [at + member, _pairs(codes, PLAN)], gl.float32, False, 1
        )
        nested: gl.constexpr = "ld.shared.f32 $0, [$1+64];"
        absmax = absmax * gl.inline_asm_elementwise(nested, "=f,r", [at], gl.float32, False, 1) + offset
    else:
        at += 16 * rows + 4 * member
        absmax = gl.inline_asm_elementwise(PLAN.find, "=f,r", [at], gl.float32, False, 1)
    return absmax if PLAN.even else gl.where(chunk < PLAN.K // 256, absmax, 0.0)


@gluon.jit
def _turn(stretch, tile, slot, x, bf16: gl.constexpr, offset, base, N, lanes, PLAN: gl.constexpr):
    """The products of 16 rows of W with a stretch of x: what warps have of them is left in shared memory."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([2, 2, 1, 1, 1], [1, 1, 1, 4, 8], [1, 1, PLAN.W, 1, 1], [1, 0, 3, 4, 2])
    GROUPS: gl.constexpr = 4 // PLAN.beside
    warp, t, g = lanes
    lane = 4 * (t + 4 * g)
    at = base + (PLAN.ring + warp * PLAN.stage + slot * (PLAN.W * PLAN.stage))  # [W, 4, 8]
    at = gl.inline_asm_elementwise(PLAN.arrived, "=r,r", [at], gl.int32, False, 1)
    absmax = _absmax(at, stretch, tile, offset, base + PLAN.codes, N, lanes, PLAN)
    words = _fours(at + 128 * g + 32 * (g % 4) + 8 * t, PLAN)
    table, by_t = _fours(base + lane, PLAN), _fours(t, PLAN)
    y = gl.full([2, 2, PLAN.W, 4, 8], 0.0, gl.float32, LAYOUT)
    for group in gl.static_range(GROUPS):
        one, two, inverse = x[group]
        if PLAN.beside == 1 and bf16:  # for want of registers not before
            inverse = _of_columns(inverse, t, PLAN)
        shown = absmax
        if GROUPS > 1:
            shown = _shown(absmax, _pairs(4 * g + PLAN.beside * group + t * PLAN.beside // 4, PLAN))
        scale = _fours(shown, PLAN) * inverse
        operands = (y, one, two, scale, words ^ (32 * PLAN.beside * group), table, by_t)
        y = gl.inline_asm_elementwise(PLAN.products, PLAN.operands, operands, gl.float32, False, 4)
    place = base + lane + (PLAN.sums + (tile * PLAN.W + warp) * (512 // PLAN.beside))
    kinds: gl.constexpr = "=r,=r,=r,=r,f,f,f,f,r,r,r,r,r,r,r,r,r,r,r,r"
    operands = (y, _fours(place, PLAN), by_t, 0 * by_t + stretch)
    gl.inline_asm_elementwise(PLAN.leave, kinds, operands, gl.int32, False, 4)


@gluon.jit
def _written(y_ptr, M, N, base, warp, t, g, PLAN: gl.constexpr):
    """y of what the warps have left: warp n adds up tile n of the program's."""
    KEPT: gl.constexpr = 4 // PLAN.beside
    mine = 16 * (gl.program_id(0) + warp * gl.num_programs(0)) < N
    place = base + (PLAN.sums + 4 * (t + 4 * g) + warp * (PLAN.W * KEPT * 128))
    for r in gl.static_range(KEPT):
        y = gl.zeros_like(place).to(gl.float32)
        for other in gl.static_range(warp.shape[0]):
            y += gl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.u32 p, $2, 0; mov.f32 $0, 0f00000000; @p ld.shared.f32 $0, [$1]; }",
                "=&f,r,r", [place + (other * KEPT + r) * 128, mine.to(gl.int32)], gl.float32, False, 1,
            )  # fmt: skip
        p, m = (r // 2, 2 * t + r % 2) if PLAN.beside == 1 else (t // 2, KEPT * (t % 2) + r)
        n = _row(warp, N) + 8 * p + g
        gl.store(y_ptr + (m * N + n), (y * (1.0 / PLAN.scale)).to(y_ptr.dtype.element_ty), mask=mine & (m < M))


@gluon.jit
def _decoding(smem, base, code_ptr, nested_code_ptr, warp, t, g, PLAN: gl.constexpr):
    """Fill the tables: of a byte's two numbers, 32 times, and of what indices of absmax mean."""
    TABLE: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [PLAN.W, 1], [1, 0])
    byte, copy = gl.arange(0, 256, gl.SliceLayout(1, TABLE)), gl.arange(0, 32, gl.SliceLayout(0, TABLE))
    first, second = gl.load(code_ptr + byte // 16), gl.load(code_ptr + byte % 16)  # a byte's high half comes first
    if PLAN.double_quant:
        index = (32 * warp + t + 4 * g) % 256
        code = gl.load(nested_code_ptr + index)
    low, high = (first * PLAN.scale).to(gl.float16), (second * PLAN.scale).to(gl.float16)
    pair = low.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF | high.to(gl.int16, bitcast=True).to(gl.int32) << 16
    smem.index(0).store(pair[:, None] + 0 * copy[None, :])
    if PLAN.double_quant:
        put: gl.constexpr = "st.shared.f32 [$1], $2; mov.b32 $0, 0;"
        gl.inline_asm_elementwise(put, "=r,r,f", [base + PLAN.codes + 4 * index, code], gl.int32, False, 1)


@gluon.jit(do_not_specialize=["M", "most", "depth"])
def _few_rows_kernel(
    words_ptr, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, code_ptr, x_ptr, y_ptr,
    M, N, most, depth,
    PLAN: gl.constexpr,
):  # fmt: skip
    """One program writes 16 columns of y, then those as many tiles further as there are programs: `most` or 1 less."""
    LANES: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 4, 8], [PLAN.W, 1, 1], [1, 2, 0])
    bf16: gl.constexpr = x_ptr.dtype.element_ty == gl.bfloat16
    tiles = most - (16 * (gl.program_id(0) + (most - 1) * gl.num_programs(0)) >= N).to(gl.int32)
    smem = gl.allocate_shared_memory(gl.int32, [PLAN.buffers, 256, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    here: gl.constexpr = "{ .reg .b32 a; mov.b32 a, global_smem; add.s32 $0, a, $1; }"  # shared memory: one allocation
    warp = gl.set_auto_layout(gl.arange(0, PLAN.W)[:, None, None], LANES)
    t = gl.set_auto_layout(gl.arange(0, 4)[None, :, None], LANES)
    g = gl.set_auto_layout(gl.arange(0, 8)[None, None, :], LANES)
    lane = t + 4 * g
    base = gl.inline_asm_elementwise(here, "=r,r", [0 * lane], gl.int32, is_pure=True, pack=1)
    asking = _asking(absmax_ptr, nested_absmax_ptr, base, warp, lane, PLAN)
    asked, slot = (0 * tiles, 0 * tiles), 0 * tiles  # asked: stretch and tile
    for n in range(depth):  # no constant: unrolled, it would have all addresses found before the first is used
        asked = _ask(words_ptr, asked, tiles, n, N, warp, lane, asking, PLAN)
    _decoding(smem, base, code_ptr, nested_code_ptr, warp, t, g, PLAN)
    x = _x_of_stretch(x_ptr, 0, M, t, PLAN)
    offset = gl.load(offset_ptr) if PLAN.double_quant else 0.0
    barrier()
    AHEAD: gl.constexpr = PLAN.stretches > 1 and PLAN.beside == 4  # for 4 or 8 rows registers do not last
    if AHEAD:
        loaded = _x_loaded(x_ptr, 1, 0, M, PLAN)
    for stretch in range(PLAN.stretches):
        for tile in range(tiles):
            _turn(stretch, tile, slot, x, bf16, offset, base, N, (warp, t, g), PLAN)
            asked = _ask(words_ptr, asked, tiles, slot, N, warp, lane, asking, PLAN)
            slot = (slot + 1) % PLAN.depth
        if AHEAD:
            x = (_x_in_fp16(loaded, bf16, t, PLAN),)
            loaded = _x_loaded(x_ptr, (stretch + 2) % PLAN.stretches, 0, M, PLAN)
        elif PLAN.stretches > 1:
            x = _x_of_stretch(x_ptr, (stretch + 1) % PLAN.stretches, M, t, PLAN)
    barrier()
    _written(y_ptr, M, N, base, warp, t, g, PLAN)
    smem._keep_alive()


def takes(weight: NF4Weight, x, y, arch: str) -> bool:
    """Whether `launch` can write y on `arch`: not in graphs of torch.compile, which know no Gluon, nor on a CPU."""
    if GLUON_MISSING or barrier is None or torch.compiler.is_compiling() or x.device.type == "cpu":
        return False
    (M, K), N, blocksize = x.shape, weight.shape[0], weight.blocksize
    return (
        arch.startswith("sm_") and int(arch[3:]) >= 80 and x.dtype in (torch.bfloat16, torch.float16)
        and 1 <= M <= 8 and K % 256 == 0 < K and N >= 16 and N * max(K // 64, M) < 2**31
        and blocksize % 64 == 0 and blocksize & (blocksize - 1) == 0 and weight.absmax.numel() % 4 == 0  # it is so read
        and x.is_contiguous() and y.is_contiguous()
        and all(each.data_ptr() % 16 == 0 for each in (x, weight.words, weight.absmax))  # what is loaded at once
    )  # fmt: skip


def launch(x, weight: NF4Weight, y, num_warps=0, programs=0, depth=2) -> None:
    """Write y [M, N], given x [M, K], both contiguous, of what it `takes`. Keywords that are not 0 override the tiling.

    An SM has room for 16 warps, by registers: one program's, or two's of 8, fewer of which may idle in a last turn."""
    (M, K), N, arch = x.shape, weight.shape[0], architecture(x.device)
    beside, chunks, tiles = 4 if M <= 2 else 2 if M <= 4 else 1, K // 256, -(-N // 16)
    room = {"sm_80": 5, "sm_90": 7, "sm_100": 7, "sm_103": 7}.get(arch, 3)  # an SM's shared memory, in 32 KiB
    num_warps = num_warps or (8 if room == 3 or -(-chunks // 8) < 0.9 * 2 * -(-chunks // 16) else 16)
    shared = 2 if num_warps == 8 and room == 7 else 1  # programs of an SM
    room = room // shared * 32768
    most = most_tiles(num_warps, beside, room)
    if not programs:
        programs = sm_count(x.device) * shared
        programs *= -(-tiles // (programs * most))
    programs = max(min(tiles, programs), -(-tiles // most))
    most, form = -(-tiles // programs), (K, weight.blocksize // 64, weight.offset is not None, beside)
    made = plan(*form, num_warps, most, room, depth)
    with device_of(x):
        _few_rows_kernel[(programs,)](
            *kernel_arguments(weight), weight.code, x, y, M, N, most, made.depth,
            PLAN=made, num_warps=num_warps, maxnreg=128,
        )  # fmt: skip


def _launch_where_taken(x, weight: NF4Weight, y) -> None:
    if not takes(weight, x, y, arch := architecture(x.device)):
        raise NotImplementedError(f"nf4_matvec_lines needs NVIDIA's sm_80 and this is {arch}: use nf4_matvec")
    launch(x, weight, y)


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, of Mistral-7B's gate, up and down, by name; meta tensors have a shape and no memory."""
    found = {}
    for N, K, M in ((14336, 4096, 1), (14336, 4096, 4), (14336, 4096, 8), (4096, 14336, 1), (4096, 14336, 8)):
        x, y = (torch.empty(M, columns, dtype=dtype, device="meta") for columns in (K, N))
        weight = empty_nf4((N, K), dtype, device="meta")
        found[f"lines {N}x{K}, M {M}"] = functools.partial(_launch_where_taken, x, weight, y)
    return found
