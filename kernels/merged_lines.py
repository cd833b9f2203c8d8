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
                Its code, by which a table has to be read, is best asked for a turn ahead. (Words, too, take registers:
                rank 16 in bfloat16 then took 0.0590 ms in place of 0.0497.)
transposed      A lane has 8 rows of its 8 columns. So where W.T is written it has 8 neighbours as well, and moves
                nothing either; a store of a warp covers whole sectors of 8 lines.
addresses       Half of the instructions came once a program: divisions, 64-bit addresses, masks. A program walks down
                `turns` tiles with A's columns held. K and the strides are constants (a model has few of them), so that
                the distances between a lane's addresses stand in the instructions: one pointer a lane advances.

Measured on an NVIDIA H200 with triton 3.6, rank 16, ms:

    14336 x 4096      plain dequantization   _merge_kernel   this
    bfloat16          0.0393                 0.0570          0.0470
    FP8                                                      0.0425
    FP8, transposed                          0.0642          0.0480

It is compiled for sm_90 to 5.6 instructions a number in a turn, 72 registers and no barrier; _merge_kernel to 11.9, 128
and 10. By Nsight Compute its warps wait for memory in half of their time (FP8: 42%), and for shuffles in a fifth.
Rank 32 (5.9 instructions and 110 registers, against 12.9 and 164) is yet to be measured.

Casts: those of merged_dequantize.py. Were the tensor core's sums of 16 products rounded otherwise here (mma.sync) than
there (wgmma, on sm_90), a few numbers would differ in their last place; on the H200 none did.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels.common import architecture, device_of, sm_count
from fastkit.kernels.fp8_scale import FP8, check_fp8, lacks_fp8
from fastkit.kernels.ladders.rung import GLUON_MISSING, gl, gluon
from fastkit.kernels.merged_lines_parts import (
    W,
    absmax_asked,
    absmax_of,
    as_words,
    asked,
    b_operand,
    b_places,
    lane_blocks,
    lane_pointers,
    mma_v2,
    numbers_of,
    of_columns,
    parts_of_a,
    rows_shown,
    stored,
    tile,
)
from fastkit.kernels.nf4 import NF4Weight, empty_nf4, kernel_arguments

BLOCK_N, BLOCK_K = 32, 64 * W  # of 32 rows and a warp's 64 columns each lane has the absmax of one block


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
    AHEAD: gl.constexpr = FP8 and EVEN and BLOCK_R == 16  # elsewhere it takes registers, or gains nothing
    first_row = (gl.program_id(0) // (K // BLOCK_K) * (BLOCK_N * turns)).to(gl.int64)  # * K can pass 2**31
    first_col = gl.program_id(0) % (K // BLOCK_K) * BLOCK_K
    left = (N - first_row).to(gl.int32)  # rows
    turns = gl.minimum(turns, (left + BLOCK_N - 1) // BLOCK_N)

    word_ptrs, w_ptrs, word, number, row = lane_pointers(
        words_ptr, w_ptr, first_row, first_col, words_k, stride_wn, stride_wk, TILE
    )
    lane, lane_row, lane_block = lane_blocks(TILE)
    block = (first_row * (K // 64)).to(gl.int32) + first_col // 64 + (lane_row * (K // 64) + lane_block)
    b_lane, b_beyond, b_row, b_number = b_places(stride_bn, BLOCK_R, TILE)
    b_ptrs = b_ptr + first_row * stride_bn + b_lane

    a = parts_of_a(a_ptr + first_col, stride_ar, RANK, BLOCK_R, TILE)
    code = gl.expand_dims(as_words(gl.load(code_ptr + lane % 16), TILE), 4)
    offset = gl.load(offset_ptr) if DOUBLE_QUANT else 0.0
    if AHEAD:
        absmax_parts = absmax_asked(block, True, absmax_ptr, nested_absmax_ptr, UNITS, DOUBLE_QUANT, False)
    for turn in range(0, turns):
        in_rows = lane_row < left
        if not AHEAD:
            absmax_parts = absmax_asked(block, in_rows, absmax_ptr, nested_absmax_ptr, UNITS, DOUBLE_QUANT, not EVEN)
        absmax = absmax_of(absmax_parts, nested_code_ptr, offset, DOUBLE_QUANT)
        packed = asked(word_ptrs + word, row < left, not EVEN)
        block += gl.where(turn + 1 < turns, BLOCK_N * (K // 64), 0)
        if AHEAD:
            absmax_parts = absmax_asked(block, True, absmax_ptr, nested_absmax_ptr, UNITS, DOUBLE_QUANT, False)
        b = asked(b_ptrs + b_beyond, (b_row < left) & (b_number < RANK), not EVEN or RANK != BLOCK_R)
        b = b_operand(b, BLOCK_R, TILE)
        absmax = rows_shown(absmax, TILE)
        if FP8 and not TRANSPOSED:
            inverse = rows_shown(asked(inverse_ptr + first_row + lane_row, in_rows, not EVEN), TILE)
            inverse_ptr += BLOCK_N
        for part in gl.static_range(PARTS):
            w = numbers_of(part, packed, absmax, a[part], b, code, scaling, TILE)
            if FP8 and TRANSPOSED:
                inverse = of_columns(inverse_ptr + first_col, part, TILE)
            if FP8:
                w *= inverse
            stored(w_ptrs + (number + TILE.C * part * stride_wk), w, gl.expand_dims(row < left, 4), not EVEN)
        word_ptrs += BLOCK_N * words_k
        w_ptrs += BLOCK_N * stride_wn
        b_ptrs += BLOCK_N * stride_bn
        left -= BLOCK_N


def takes(weight: NF4Weight, A, B, w, transposed: bool, arch: str) -> bool:
    """Whether `launch` can write w on `arch`, of `architecture`; where not, merged_dequantize's own kernel does.

    It cannot in graphs of torch.compile, which know no Gluon, nor on CPU tensors, which only Triton's interpreter runs.
    Of the ranks above 16 it takes 32: those between, whose B is masked, and higher ones pass 128 registers a lane.
    """
    if GLUON_MISSING or mma_v2 is None or torch.compiler.is_compiling():
        return False
    if not arch.startswith("sm_") or int(arch[3:]) < 80 or (w.dtype == FP8 and lacks_fp8(arch)):
        return False
    if A is None or w.device.type == "cpu" or (transposed and w.dtype != FP8):  # in 16 bits sm_89 would spill
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


def _resident(BLOCK_R: int, double_quant: bool, fp8: bool, masked: bool, arch: str) -> int:
    """Programs that an SM holds, by registers: from sm_80 on it has 65,536, and room for 48 warps or more.

    Registers a lane are the most that Triton 3.6 and 3.8 compile ranks 8, 16 and 32 to for sm_80 to sm_90, and rank 16
    for newer cards. Other cases may take more; the last of their programs then wait for a second wave.
    """
    if BLOCK_R == 32:
        registers = 128
    elif fp8 or masked:
        registers = 96
    else:
        registers = 72 if double_quant and int(arch[3:]) < 100 else 80
    return 65536 // (32 * W * registers)


def launch(weight: NF4Weight, A, B, scaling, w, transposed: bool = False, inverse=None) -> None:
    """Write w of what it `takes`; see `merged_dequantize.launch`."""
    (N, K), rank, double_quant, fp8 = weight.shape, A.shape[0], weight.offset is not None, w.dtype == FP8
    BLOCK_R = 16 if rank <= 16 else 32
    even = N % BLOCK_N == 0
    # Programs walk down so many tiles that all run at once, in one wave.
    tall, wide = -(-N // BLOCK_N), K // BLOCK_K
    masked = not even or rank not in (8, 16, 32)
    programs = sm_count(w.device) * _resident(BLOCK_R, double_quant, fp8, masked, architecture(w.device))
    turns = -(-tall // max(1, programs // wide))
    limit = {"maxnreg": 96} if fp8 and not transposed and BLOCK_R == 16 else {}  # ptxas for sm_89 takes 80, and spills
    with device_of(w):
        _lines_kernel[(-(-tall // turns) * wide,)](
            *kernel_arguments(weight), weight.code, A, B, w, inverse, N, scaling, turns,
            K=K, stride_ar=A.stride(0), stride_bn=B.stride(0), UNITS=weight.blocksize // 64,
            stride_wn=1 if transposed else w.stride(0), stride_wk=w.stride(0) if transposed else 1,
            DOUBLE_QUANT=double_quant, RANK=rank, BLOCK_R=BLOCK_R, FP8=fp8, EVEN=even, TRANSPOSED=transposed,
            TILE=tile(BLOCK_R, transposed),
            num_warps=W, enable_fp_fusion=False, **limit,
        )  # fmt: skip


def _launch_where_taken(weight, A, B, w, transposed=False, inverse=None) -> None:
    if w.dtype == FP8:
        check_fp8("merged_lines", w.device)
    if not takes(weight, A, B, w, transposed, arch := architecture(w.device)):
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
        for name, kind, transposed in (("", dtype, False), (" FP8", FP8, False), (" FP8 transposed", FP8, True)):
            shape = (K, N) if transposed else (N, K)
            found[f"lines{name} {N}x{K}, rank {r}"] = functools.partial(
                launch_to, empty(*shape, dtype=kind), transposed, empty(shape[0]) if kind == FP8 else None
            )
    return found
