"""What lora_hopper.py's kernels are made of: what is known when they are compiled, and tiles that come in rings.

A strip is what a ring's place holds: 128 rows and 128 columns, as four quarters [64, 64], row half by row half.
"""

import functools
from dataclasses import dataclass

import torch

from fastkit.kernels.common import triton
from fastkit.kernels.hopper_parts import new_barriers
from fastkit.kernels.ladders.rung import gl, gluon

try:
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
except ImportError:
    mbarrier = tma = None

STRIP = 128  # rows and columns
STRIP_BYTES = 2 * STRIP * STRIP
ROWS = 8192  # that a plan is made for; it shall not hang on their number, or each would need a binary of its own
SHARED_BYTES = 227 * 1024 - 2048  # a program's on sm_90, but for barriers and what the compiler adds


@dataclass(frozen=True)
class Plan:
    """What is known when a kernel is compiled.

    R, PADDED  rank, and the power of two that it is padded to in z
    TENSORS    that share a launch, three at most
    STRIPS     side by side, whose sums over the rows a program keeps in registers
    Z          columns of a tile of z; 0: none
    F          columns of f; 0: none
    F_ROWS     f lies as [columns of t, F], such as B; else as [F, columns of t], such as A
    TRANSPOSED the sums over the rows go out as [R, columns of t]
    STAGES     strips in shared memory; Z_STAGES: tiles of z
    sums       layout of t.T @ z of a strip's half; products: of t @ f of its rows' half; written: of what is written
    """

    R: int
    PADDED: int
    TENSORS: int
    STRIPS: int
    Z: int
    F: int
    F_ROWS: bool
    TRANSPOSED: bool
    STAGES: int
    Z_STAGES: int
    sums: object
    products: object
    written: object


@functools.cache
def rows_plan(
    R: int, adapters: int, columns: tuple[int, ...], f_rows: bool, project: bool, transposed: bool, sms: int,
    strips: int | None = None,
) -> Plan:  # fmt: skip
    """For the pass that sums over the rows, of tensors of so many `columns` and of `adapters` to each; with t @ f if
    `project`. `strips` overrides the choice."""
    padded = padded_rank(R)
    Z = triton.next_power_of_2(2 * adapters * padded)
    F = max(16, padded) if project else 0
    most = min(256 // Z, 8, -(-max(columns) // STRIP))  # 128 registers of a thread
    cost = functools.partial(_bytes, columns, R * adapters, project, sms)
    strips = strips or min(range(most, 0, -1), key=cost)
    stages = _stages(strips, SHARED_BYTES - 2 * STRIP * strips * F, 2 * STRIP * Z)
    layouts = (_layout(n) for n in (Z, F or 16, Z // 2))
    return Plan(R, padded, len(columns), strips, Z, F, f_rows, transposed, *stages, *layouts)


def _stages(strips: int, room: int, z_bytes: int) -> tuple[int, int]:
    """(STAGES, Z_STAGES) for `strips` to a tile of z, as many strips under way as there is room for: one of z is in
    use, and each other lets the strips of its tile come."""
    found = [(min(6, (room - z_stages * z_bytes) // STRIP_BYTES), z_stages) for z_stages in (2, 3, 4)]
    return max(found, key=lambda stages: (min(stages[0], (stages[1] - 1) * strips), stages[0]))


def _bytes(columns: tuple[int, ...], ranks: int, project: bool, sms: int, strips: int) -> float:
    """What a pass over ROWS rows moves with so many strips to a program: few make many parts of t @ f, which are
    written and read, and read z often, half as dear, from the L2 cache; many make many parts of t.T @ z. The time of
    SMs that are left without work counts as bytes of t."""
    blocks = sum(-(-size // (strips * STRIP)) for size in columns)
    splits = max(1, sms // blocks)
    waves = -(-blocks * splits // sms)
    busy = sum(columns) / (STRIP * strips) * splits / (waves * sms)
    products = blocks * 8 * ROWS * ranks if project else 0
    return 2 * ROWS * sum(columns) / busy + splits * 8 * sum(columns) * ranks + products + blocks * 2 * ROWS * ranks


@functools.cache
def columns_plan(R: int, adapters: int, f_rows: bool) -> Plan:
    """For t @ f alone, of all `adapters`."""
    F = max(16, triton.next_power_of_2(adapters * R))
    stages = min(6, SHARED_BYTES // (STRIP_BYTES + 2 * STRIP * F))
    return Plan(R, 0, 1, 0, 0, F, f_rows, False, stages, 0, None, _layout(F), None)


def padded_rank(R: int) -> int:
    return triton.next_power_of_2(R)


def _layout(columns: int):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


def shares(units: int, most: int, at_once: int) -> int:
    """Into how many shares to cut each of `units`, `at_once` of whose shares run at once: the fewest, up to `most`,
    that take no more than 5% longer than the best."""
    times = [-(-units * n // at_once) / n for n in range(1, most + 1)]
    return next(n for n, time in enumerate(times, 1) if time <= 1.05 * min(times))


def readable(t: torch.Tensor) -> bool:
    """By TMA: neighbours in a row in memory, 16-byte addresses and strides."""
    return t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.stride(0) > 0 and t.data_ptr() % 16 == 0


def f_box(PLAN: Plan) -> list[int]:
    """Of f, what 64 columns of t are multiplied with."""
    return [64, PLAN.F] if PLAN.F_ROWS else [PLAN.F, 64]


@gluon.jit
def new_boxes(desc, COUNT: gl.constexpr):
    """Room for COUNT boxes of a descriptor."""
    ROWS: gl.constexpr = desc.block_type.shape[0]
    COLUMNS: gl.constexpr = desc.block_type.shape[1]
    return gl.allocate_shared_memory(desc.dtype, [COUNT, ROWS, COLUMNS], desc.layout)


@gluon.jit
def new_ring(desc, STAGES: gl.constexpr, BOXES: gl.constexpr):
    """(room for STAGES tiles of BOXES boxes, barriers: tile has come, barriers: tile was read by both warp groups)."""
    return new_boxes(desc, STAGES * BOXES), new_barriers(STAGES, 1), new_barriers(STAGES, 2)


@gluon.jit
def claim(ring, count, nbytes: gl.constexpr, STAGES: gl.constexpr):
    """(stage, its barrier) of tile number `count` of a ring, once its place is free; `nbytes` will come."""
    _, full, empty = ring
    stage = count % STAGES
    mbarrier.wait(empty.index(stage), (count // STAGES % 2) ^ 1)
    mbarrier.expect(full.index(stage), nbytes)
    return stage, full.index(stage)


@gluon.jit
def wait_for(ring, count, STAGES: gl.constexpr):
    """The stage of tile number `count` of a ring, once it has come."""
    _, full, _ = ring
    mbarrier.wait(full.index(count % STAGES), count // STAGES % 2)
    return count % STAGES


@gluon.jit
def release(ring, count, STAGES: gl.constexpr):
    """This warp group has read tile number `count` of a ring."""
    _, _, empty = ring
    mbarrier.arrive(empty.index(count % STAGES))


@gluon.jit
def load_strip(desc, row, col, to, bar, first):
    """Ask for a strip's quarters: number 2 a + b is row half a, column half b."""
    for a in gl.static_range(2):
        for b in gl.static_range(2):
            at = [row + 64 * a, col + 64 * b]
            tma.async_copy_global_to_shared(desc, at, bar, to.index(first + 2 * a + b))


@gluon.jit
def load_f(desc, col, to, bar, first, PLAN: gl.constexpr):
    """Ask for what a strip's two column halves are multiplied with."""
    for b in gl.static_range(2):
        if PLAN.F_ROWS:
            tma.async_copy_global_to_shared(desc, [col + 64 * b, 0], bar, to.index(first + b))
        else:
            tma.async_copy_global_to_shared(desc, [0, col + 64 * b], bar, to.index(first + b))


@gluon.jit
def _load_rows_of(t_desc, f_desc, z_desc, shared, place, PLAN: gl.constexpr):
    t_ring, z_ring, f_smem, f_full = shared
    tensor, first, split, splits, turns = place
    if PLAN.F:
        mbarrier.expect(f_full.index(0), 2 * PLAN.STRIPS * f_desc.block_type.nbytes)
        for j in range(PLAN.STRIPS):
            load_f(f_desc, first + 128 * j, f_smem, f_full.index(0), 2 * j, PLAN)
    for turn in range(turns):
        tile = split + turn * splits
        stage, bar = claim(z_ring, turn, 2 * z_desc.block_type.nbytes, PLAN.Z_STAGES)
        for a in gl.static_range(2):
            at = [128 * tile + 64 * a, tensor * 2 * PLAN.PADDED]
            tma.async_copy_global_to_shared(z_desc, at, bar, z_ring[0].index(2 * stage + a))
        for j in range(PLAN.STRIPS):
            stage, bar = claim(t_ring, turn * PLAN.STRIPS + j, 4 * t_desc.block_type.nbytes, PLAN.STAGES)
            load_strip(t_desc, 128 * tile, first + 128 * j, t_ring[0], bar, 4 * stage)


@gluon.jit
def load_rows(t_descs, f_descs, z_desc, shared, place, PLAN: gl.constexpr):
    """What _rows_kernel's loading warp does: f once, then for each tile of 128 rows z and the strips of t."""
    TENSORS: gl.constexpr = PLAN.TENSORS
    for i in gl.static_range(TENSORS):
        if place[0] == i:
            _load_rows_of(t_descs[i], f_descs[i], z_desc, shared, place, PLAN)


@gluon.jit
def load_columns(t_desc, f_desc, rings, numbers, PLAN: gl.constexpr):
    """What _columns_kernel's loading warp does: strips of t, and what they are multiplied with."""
    ring, f_smem = rings
    splits, units, each, C = numbers
    count = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        first = unit % splits * each
        for j in range((gl.minimum(each, C - first) + 127) // 128):
            nbytes: gl.constexpr = 4 * t_desc.block_type.nbytes + 2 * f_desc.block_type.nbytes
            stage, bar = claim(ring, count, nbytes, PLAN.STAGES)
            load_strip(t_desc, unit // splits * 128, first + 128 * j, ring[0], bar, 4 * stage)
            load_f(f_desc, first + 128 * j, f_smem, bar, 2 * stage, PLAN)
            count += 1


@gluon.jit
def factor(f_smem, index, PLAN: gl.constexpr):
    """[64, F], the right factor of 64 columns of t."""
    f = f_smem.index(index)
    if PLAN.F_ROWS:
        return f
    else:
        return f.permute((1, 0))


@gluon.jit
def store_products(tf, yb_ptr, part, step, width, row, M, PLAN: gl.constexpr):
    """Write the rows of tf [64, F] that lie before M into yb [parts, M, R], as its part number `part`.

    Of tf's first `width` columns each R belong to an adapter; the next one's part is `step` further on.
    """
    rows = gl.arange(0, 64, gl.SliceLayout(1, PLAN.products))[:, None]
    cols = gl.arange(0, PLAN.F, gl.SliceLayout(0, PLAN.products))[None, :]
    yb_ptr += (gl.cast(part, gl.int64) * M + row) * PLAN.R
    if PLAN.F > PLAN.R:
        at = gl.cast(cols // PLAN.R * step, gl.int64) * M * PLAN.R + cols % PLAN.R
    else:
        at = cols
    gl.store(yb_ptr + at + rows * PLAN.R, tf, mask=(rows < M - row) & (cols < width))


@gluon.jit
def store_sums(tz, yz_ptr, row, rows, base, total, width, PLAN: gl.constexpr):
    """Write tz [64, Z], sums of columns row, row + 1, ... of t, those before `rows`, both terms added.

    To yz [total, R] from row `base` on or, if TRANSPOSED, to yz [adapters * R, total] from column `base` on. `width` is
    how many columns all adapters have together, each padded.
    """
    terms = gl.reshape(tz, [64, PLAN.Z // (2 * PLAN.PADDED), 2, PLAN.PADDED])
    tz = gl.convert_layout(gl.reshape(gl.sum(terms, 2), [64, PLAN.Z // 2]), PLAN.written, assert_trivial=True)
    row = row + gl.arange(0, 64, gl.SliceLayout(1, PLAN.written))[:, None]
    cols = gl.arange(0, PLAN.Z // 2, gl.SliceLayout(0, PLAN.written))[None, :]
    mask = (row < rows) & (cols < width) & (cols % PLAN.PADDED < PLAN.R)
    cols = cols // PLAN.PADDED * PLAN.R + cols % PLAN.PADDED
    if PLAN.TRANSPOSED:
        gl.store(yz_ptr + base + cols * total + row, tz, mask=mask)
    else:
        gl.store(yz_ptr + base * PLAN.R + row * PLAN.R + cols, tz, mask=mask)
