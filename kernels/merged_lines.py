"""`merged_dequantize` on NVIDIA's tensor cores, in whole lines: W [N, K] = dequantize(weight) + scaling * B @ A.

The maths, the casts and the bits are those of `kernels/merged_dequantize.py`, whose plain Triton kernel runs wherever
this one does not (see `takes`). What that kernel pays for beside the bytes, and what this one does about it:

delta's layout  A tensor core leaves a lane columns 2 t and 2 t + 1 of each 8, where the store wants 8 neighbours, so
                delta is dealt out anew through shared memory, behind a barrier. But rows of a product may stand in any
                order. Here the product is A.T @ B.T, and the columns of A are dealt such that a lane gets 8 neighbours
                in each of its rows of W: reshape and permute, and nothing moves between lanes.
lines           So the lanes stand in the tensor core's order, which Triton leaves to no one: hence Gluon. A store of a
                warp covers 128 bytes in each of 4 rows, whole lines; words come in whole sectors of 32 bytes.
words           A word is 8 numbers, 16 bytes of W, one store: each lane loads the words of the numbers that it stores.
codebook        It stands in the registers of a warp's lanes, and a shuffle looks an index up. A shuffle among 16 lanes
                reads 4 bits of the index, which spares a mask. No table in shared memory, no barrier.
absmax          A warp's turn has 32 blocks of 64 numbers: a lane finds the absmax of one, and shuffles show it around.
addresses       Half of the instructions came once a program: divisions, 64-bit addresses, masks. A program walks down
                `turns` tiles with A's columns held. K and the strides are constants (a model has few of them), so that
                the distances between a lane's addresses stand in the instructions: one pointer a lane advances.

Measured on an NVIDIA H200 with triton 3.6, rank 16, bfloat16, ms:

    shape          plain dequantization   _merge_kernel   this
    14336 x 4096   0.0393                 0.0570          0.0470
    4096 x 14336   0.0396                 0.0584          0.0474
    28672 x 8192   0.1501                 0.2198          0.1791

It is compiled for sm_90 to 5.6 instructions a number in a turn, 72 registers and no barrier; _merge_kernel to 11.9, 128
and 10. Rank 32 (5.9 and 114, against 12.9 and 164) and FP8 (96 registers, as many as there) are yet to be measured.
Asking for words and absmax a turn or two ahead, by registers or the L2 cache, was tried too: without was the fastest.

Casts: those of merged_dequantize.py. Were the tensor core's sums of 16 products rounded otherwise here (mma.sync) than
there (wgmma, on sm_90), a few numbers would differ in their last place; on the H200 none did.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastkit.kernels.common import architecture, device_of, sm_count
from fastkit.kernels.fp8_scale import FP8, check_fp8, lacks_fp8
from fastkit.kernels.ladders.rung import GLUON_MISSING, gl, gluon
from fastkit.kernels.nf4 import NF4Weight, empty_nf4, kernel_arguments

try:
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2
except ImportError:
    mma_v2 = None

W = 4  # warps side by side
BLOCK_N, BLOCK_K = 32, 64 * W  # of 32 rows and a warp's 64 columns each lane has the absmax of one block


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
def _asked(pointers, mask, MASKED: gl.constexpr):
    """A load, without a mask where none is needed."""
    if MASKED:
        return gl.load(pointers, mask=mask, other=0)
    else:
        return gl.load(pointers)


@gluon.jit
def _shown(x, lane):
    """x of the lane whose number is the low 5 bits of `lane`."""
    x, lane = gl.broadcast(x, lane)
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, -1;", "=f,f,r", [x, lane], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _code_values(code, index):
    """CODE[index % 16] of `code`, CODE[lane % 16]: x of another lane in the same half of a warp."""
    code, index = gl.broadcast(code, index)
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x101f, -1;", "=f,f,r", [code, index], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _as_words(x, TILE: gl.constexpr):
    """x [W, 4, 8], one number a lane, as words [1, W, 4, 8] have it; nothing moves."""
    return gl.convert_layout(gl.reshape(x, [1, TILE.W, 4, 8]), TILE.words)


@gluon.jit
def _places(TILE: gl.constexpr):
    """j, warp, t and g of words [8, W, 4, 8], see Tile, and c of numbers."""
    j = gl.set_auto_layout(gl.arange(0, 8)[:, None, None, None], TILE.words)
    warp = gl.set_auto_layout(gl.arange(0, TILE.W)[None, :, None, None], TILE.words)
    t = gl.set_auto_layout(gl.arange(0, 4)[None, None, :, None], TILE.words)
    g = gl.set_auto_layout(gl.arange(0, 8)[None, None, None, :], TILE.words)
    return j, warp, t, g, gl.set_auto_layout(gl.arange(0, TILE.C)[None, None, None, None, :], TILE.numbers)


@gluon.jit
def _dealt_a(a_ptr, part, stride_ar: gl.constexpr, RANK: gl.constexpr, BLOCK_R: gl.constexpr, TILE: gl.constexpr):
    """A.T [8 W C, BLOCK_R] of a part: A's columns dealt to the tensor core's rows, its rows to the sum's numbers."""
    C: gl.constexpr = TILE.C
    COLUMNS: gl.constexpr = 8 * TILE.W * C
    k = gl.arange(0, BLOCK_R, gl.SliceLayout(1, TILE.a_loaded))[:, None]
    r = k // 16 * 16 + k // 2 % 4 * 4 + k // 8 % 2 * 2 + k % 2
    col = gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE.a_loaded))[None, :]
    a = _asked(a_ptr + (r * stride_ar + 8 * (col // C) + C * part + col % C), r < RANK, RANK != BLOCK_R)
    a = gl.permute(gl.reshape(a, [BLOCK_R, TILE.W, 8, C // 2, 2]), [3, 1, 4, 2, 0])  # m, warp, p, g, k
    return gl.convert_layout(gl.reshape(a, [COLUMNS, BLOCK_R]), TILE.a_operand)


@gluon.jit
def _b_operand(b, BLOCK_R: gl.constexpr, TILE: gl.constexpr):
    """B.T [BLOCK_R, 32], of B as it is loaded; nothing moves."""
    b = gl.permute(gl.reshape(b, [BLOCK_R // 16, 4, 2, 2, 4, 8]), [0, 2, 1, 3, 4, 5])  # s, p, t, i, r, g
    return gl.convert_layout(gl.reshape(b, [BLOCK_R, 32]), TILE.b_operand)


@gluon.jit
def _delta(a, b, TILE: gl.constexpr):
    """A part's B @ A as numbers, of `_dealt_a` and `_b_operand`; nothing moves."""
    C: gl.constexpr = TILE.C
    W: gl.constexpr = TILE.W
    delta = mma_v2(a, b, gl.full([8 * W * C, 32], 0.0, gl.float32, TILE.mma))
    delta = gl.permute(gl.reshape(delta, [C // 2, W, 2, 8, 4, 4, 2]), [4, 6, 1, 5, 3, 0, 2])  # r, i, warp, t, g, m, p
    return gl.convert_layout(gl.reshape(delta, [8, W, 4, 8, C]), TILE.numbers)


@gluon.jit
def _of_columns(ptr, part, TILE: gl.constexpr):
    """What stands at `ptr` for each of a tile's columns, of a part: [1, W, 1, 8, C]."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, TILE.numbers)
    warp = gl.set_auto_layout(gl.arange(0, TILE.W)[:, None, None, None], LAYOUT)
    g = gl.set_auto_layout(gl.arange(0, 8)[None, None, :, None], LAYOUT)
    c = gl.set_auto_layout(gl.arange(0, TILE.C)[None, None, None, :], LAYOUT)
    return gl.expand_dims(gl.load(ptr + (64 * warp + 8 * g + TILE.C * part + c)), 0)


@gluon.jit
def _b_places(stride_bn: gl.constexpr, BLOCK_R: gl.constexpr, TILE: gl.constexpr):
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
def _lane_blocks(TILE: gl.constexpr):
    """Of lanes, which are t + 4 j: each one's number, and the row and the block in it whose absmax it asks for."""
    LAYOUT: gl.constexpr = TILE.lanes
    warp = gl.set_auto_layout(gl.arange(0, TILE.W)[:, None, None], LAYOUT)
    t = gl.set_auto_layout(gl.arange(0, 4)[None, :, None], LAYOUT) + 0 * warp
    j = gl.set_auto_layout(gl.arange(0, 8)[None, None, :], LAYOUT)
    return t + 4 * j, 8 * t + j, warp


@gluon.jit
def _absmax(
    block, mask, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset,
    UNITS: gl.constexpr, DOUBLE_QUANT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """absmax, in fp32, of blocks of 64 numbers, UNITS of which share one."""
    absmax = _asked(absmax_ptr + block // UNITS, mask, MASKED)
    if DOUBLE_QUANT:
        nested_absmax = _asked(nested_absmax_ptr + block // (256 * UNITS), mask, MASKED)
        absmax = gl.load(nested_code_ptr + absmax.to(gl.int32)) * nested_absmax + offset
    return absmax


@gluon.jit(do_not_specialize=["turns"])
def _lines_kernel(
    words_ptr, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, code_ptr, a_ptr, b_ptr, w_ptr, inverse_ptr,
    N, scaling, turns,
    K: gl.constexpr, stride_ar: gl.constexpr, stride_bn: gl.constexpr, stride_wn: gl.constexpr, stride_wk: gl.constexpr,
    UNITS: gl.constexpr, DOUBLE_QUANT: gl.constexpr, RANK: gl.constexpr, BLOCK_R: gl.constexpr, FP8: gl.constexpr,
    EVEN: gl.constexpr, TRANSPOSED: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """One program writes `turns` tiles [32, 64 W] of W, one below the other; programs of a row are neighbours."""
    BLOCK_N: gl.constexpr = 32
    BLOCK_K: gl.constexpr = 64 * TILE.W
    words_k: gl.constexpr = K // 8
    PARTS: gl.constexpr = 8 // TILE.C
    first_row = (gl.program_id(0) // (K // BLOCK_K) * (BLOCK_N * turns)).to(gl.int64)  # * K can pass 2**31
    first_col = gl.program_id(0) % (K // BLOCK_K) * BLOCK_K
    left = (N - first_row).to(gl.int32)  # rows
    turns = gl.minimum(turns, (left + BLOCK_N - 1) // BLOCK_N)

    j, warp, t, g, c = _places(TILE)
    row = 8 * t + j
    # One pointer a lane; what its registers differ by is a constant, and stands in the instruction.
    word_ptrs = words_ptr + first_row * words_k + first_col // 8 + (8 * t * words_k + 8 * warp + g)
    word = j * words_k
    w_ptrs = w_ptr + first_row * stride_wn + first_col.to(gl.int64) * stride_wk
    w_ptrs += gl.expand_dims(8 * t * stride_wn + (64 * warp + 8 * g) * stride_wk, 4)
    number = gl.expand_dims(j * stride_wn, 4) + c * stride_wk
    owner, shift = t + 4 * j, 4 * (c ^ 1)  # the lane that has a row's absmax; a byte's high half comes first
    lane, lane_row, lane_block = _lane_blocks(TILE)
    block = (first_row * (K // 64)).to(gl.int32) + first_col // 64 + (lane_row * (K // 64) + lane_block)
    b_lane, b_beyond, b_row, b_number = _b_places(stride_bn, BLOCK_R, TILE)
    b_ptrs = b_ptr + first_row * stride_bn + b_lane

    a = ()
    for part in gl.static_range(PARTS):
        a += (_dealt_a(a_ptr + first_col, part, stride_ar, RANK, BLOCK_R, TILE),)
    code = gl.expand_dims(_as_words(gl.load(code_ptr + lane % 16), TILE), 4)
    offset = gl.load(offset_ptr) if DOUBLE_QUANT else 0.0
    for _ in range(0, turns):
        in_rows = lane_row < left
        absmax = _absmax(
            block, in_rows, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset, UNITS, DOUBLE_QUANT, not EVEN
        )
        packed = _asked(word_ptrs + word, row < left, not EVEN)
        b = _asked(b_ptrs + b_beyond, (b_row < left) & (b_number < RANK), not EVEN or RANK != BLOCK_R)
        b = _b_operand(b, BLOCK_R, TILE)
        absmax = gl.expand_dims(_shown(_as_words(absmax, TILE), owner), 4)
        if FP8 and not TRANSPOSED:
            inverse = _asked(inverse_ptr + first_row + lane_row, in_rows, not EVEN)
            inverse = gl.expand_dims(_shown(_as_words(inverse, TILE), owner), 4)
            inverse_ptr += BLOCK_N
        for part in gl.static_range(PARTS):
            w = _code_values(code, gl.expand_dims(packed, 4) >> (shift + 4 * TILE.C * part)) * absmax
            delta = _delta(a[part], b, TILE)
            w = gl.fma(delta, gl.full(delta.shape, scaling, gl.float32, TILE.numbers), w)
            if FP8 and TRANSPOSED:
                inverse = _of_columns(inverse_ptr + first_col, part, TILE)
            if FP8:
                w *= inverse
            w, to_ptrs = w.to(w_ptr.dtype.element_ty), w_ptrs + (number + TILE.C * part * stride_wk)
            if EVEN:
                gl.store(to_ptrs, w)
            else:
                gl.store(to_ptrs, w, mask=gl.expand_dims(row < left, 4))
        word_ptrs += BLOCK_N * words_k
        w_ptrs += BLOCK_N * stride_wn
        b_ptrs += BLOCK_N * stride_bn
        block += BLOCK_N * (K // 64)
        left -= BLOCK_N


def takes(weight: NF4Weight, A, B, w, arch: str) -> bool:
    """Whether `launch` can write w on `arch`, of `architecture`; where not, merged_dequantize's own kernel does.

    It cannot in graphs of torch.compile, which know no Gluon, nor on CPU tensors, which only Triton's interpreter runs.
    Of the ranks above 16 it takes 32: those between, whose B is masked, and higher ones pass 128 registers a lane.
    """
    if GLUON_MISSING or mma_v2 is None or torch.compiler.is_compiling():
        return False
    if not arch.startswith("sm_") or int(arch[3:]) < 80 or (w.dtype == FP8 and lacks_fp8(arch)):
        return False
    if A is None or w.device.type == "cpu":
        return False
    dtype = torch.bfloat16 if w.dtype == FP8 else w.dtype
    return (
        dtype in (torch.bfloat16, torch.float16)
        and A.dtype == B.dtype == dtype
        and (A.shape[0] <= 16 or A.shape[0] == 32)
        and weight.shape[1] % BLOCK_K == 0
        and weight.blocksize % 64 == 0
        and BLOCK_K * max(A.stride(0), B.stride(0), w.stride(0)) < 2**31  # a lane's offsets have 32 bits
    )


def _resident(BLOCK_R: int, double_quant: bool, fp8: bool, masked: bool, transposed: bool, arch: str) -> int:
    """Programs that an SM holds, by registers: from sm_80 on it has 65,536, and room for 48 warps or more.

    Registers a lane are the most that Triton 3.6 and 3.8 compile ranks 8, 16 and 32 to for sm_80 to sm_90, and rank 16
    for newer cards. Other cases may take more; the last of their programs then wait for a second wave.
    """
    newer = transposed and int(arch[3:]) >= 100
    if BLOCK_R == 32:
        registers = 160 if newer else 128
    elif fp8 or masked or newer:
        registers = 96
    else:
        registers = 72 if double_quant and not transposed and int(arch[3:]) < 100 else 80
    return 65536 // (32 * W * registers)


def launch(weight: NF4Weight, A, B, scaling, w, transposed: bool = False, inverse=None) -> None:
    """Write w of what it `takes`; see `merged_dequantize.launch`."""
    (N, K), rank, double_quant, fp8 = weight.shape, A.shape[0], weight.offset is not None, w.dtype == FP8
    BLOCK_R = 16 if rank <= 16 else 32
    even = N % BLOCK_N == 0
    # Programs walk down so many tiles that all run at once, in one wave.
    tall, wide = -(-N // BLOCK_N), K // BLOCK_K
    masked = not even or rank not in (8, 16, 32)
    programs = sm_count(w.device) * _resident(BLOCK_R, double_quant, fp8, masked, transposed, architecture(w.device))
    turns = -(-tall // max(1, programs // wide))
    with device_of(w):
        _lines_kernel[(-(-tall // turns) * wide,)](
            *kernel_arguments(weight), weight.code, A, B, w, inverse, N, scaling, turns,
            K=K, stride_ar=A.stride(0), stride_bn=B.stride(0), UNITS=weight.blocksize // 64,
            stride_wn=1 if transposed else w.stride(0), stride_wk=w.stride(0) if transposed else 1,
            DOUBLE_QUANT=double_quant, RANK=rank, BLOCK_R=BLOCK_R, FP8=fp8, EVEN=even, TRANSPOSED=transposed,
            TILE=tile(BLOCK_R, transposed),
            num_warps=W, enable_fp_fusion=False,
        )  # fmt: skip


def _launch_where_taken(weight, A, B, w, transposed=False, inverse=None) -> None:
    if w.dtype == FP8:
        check_fp8("merged_lines", w.device)
    if not takes(weight, A, B, w, arch := architecture(w.device)):
        raise NotImplementedError(f"merged_lines needs NVIDIA's sm_80 and this is {arch}: use merged_dequantize")
    launch(weight, A, B, 2.0, w, transposed, inverse)


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    N, K = 14336, 4096  # Mistral-7B's gate and up
    empty = functools.partial(torch.empty, device="meta")
    weight = empty_nf4((N, K), dtype, device="meta")
    found = {}
    for r in (16, 32):
        launch_to = functools.partial(_launch_where_taken, weight, empty(r, K, dtype=dtype), empty(N, r, dtype=dtype))
        for name, kind in (("", dtype), (" FP8", FP8)):
            inverse = {True: empty(K), False: empty(N)} if kind == FP8 else {True: None, False: None}
            for turned, transposed in (("", False), (" transposed", True)):
                shape = (K, N) if transposed else (N, K)
                found[f"lines{name}{turned} {N}x{K}, rank {r}"] = functools.partial(
                    launch_to, empty(*shape, dtype=kind), transposed, inverse[transposed]
                )
    return found
