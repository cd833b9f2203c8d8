"""`merged_dequantize` on NVIDIA's tensor cores, in whole lines: W [N, K] = dequantize(weight) + scaling * B @ A.

The maths, the casts and the bits are those of `kernels/merged_dequantize.py`, whose plain Triton kernel runs wherever
this one does not (see `takes`). What that kernel pays for beside the bytes, and what this one does about it:

delta's layout  A tensor core leaves a lane columns 2 t and 2 t + 1 of each 8, where the store wants 8 neighbours, so
                delta is dealt out anew through shared memory, behind a barrier. But rows of a product may stand in any
                order. Here the product is A.T @ B.T, and the columns of A are dealt such that a lane gets 8 neighbours
                in each of its rows of W: reshape and permute, and nothing moves between lanes.
lines           So the lanes stand in the tensor core's order, which Triton leaves to no one: hence Gluon. A store of a
                warp covers 128 bytes in each of 4 rows, whole lines.
words           A word is 8 numbers, 16 bytes of W, one store: each lane loads the words of the numbers that it stores.
codebook        It stands in the registers of a warp's lanes, and a shuffle looks an index up. A shuffle among 16 lanes
                reads 4 bits of the index, which spares a mask. No table in shared memory, no barrier.
absmax          A warp's turn has 32 blocks of 64 numbers: a lane finds the absmax of one, and shuffles show it around.
asked ahead     A warp's loads were awaited twice a turn: the code of its absmax, then B and the words. Asked for a turn
                ahead they take registers, and a lane that has more of them leaves room for fewer warps. So all that a
                turn reads is copied into shared memory a turn ahead (see merged_lines_ring.py): that takes none, and
                copies go by whole lines of 128 bytes, where a lane's own words are sectors of 32. What cannot be so
                copied, of another block size than 64 or a rank that is no multiple of 8, is loaded there and then.
transposed      A lane has 8 rows of its 8 columns. So where W.T is written it has 8 neighbours as well, and moves
                nothing either; a store of a warp covers whole sectors of 8 lines.
addresses       Half of the instructions came once a program: divisions, 64-bit addresses, masks. A program walks down
                `turns` tiles with A's columns held. K and the strides are constants (a model has few of them), so that
                the distances between a lane's addresses stand in the instructions: one pointer a lane advances.

Measured on an NVIDIA H200 with triton 3.6, rank 16, us, 14336 x 4096. In one run: as it was before anything was asked
for ahead, and this. By `fastkit bench kernels`: the plain dequantization, and this.

                      before   this     plain   this
    bfloat16          50.5     49.4     41.4    48.7
    FP8               42.1     34.6             39.4
    FP8, transposed   47.2     44.3             53.9

Before, its warps waited for memory in half of their time (FP8: 42%) by Nsight Compute, and for shuffles in a fifth.
Now it is compiled for sm_90, given 64 registers (transposed 80), to 6.3 instructions a number in a turn (FP8: 7.6,
transposed 7.3), two barriers and 10.5 KiB of shared memory; _merge_kernel to 11.9, 128 registers and 10 barriers. By 56
registers in bfloat16, 64 in FP8 and 96 transposed an SM runs 9, 8 and 5 programs. For rank 32 they are 6.8 instructions
(FP8: 7.7 and 7.5) and 80 registers (96 and 128), against 12.9 and 164.

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
    as_words,
    b_operand,
    dealt_parts,
    lane_blocks,
    lane_pointers,
    loaded,
    mma_v2,
    numbers_of,
    of_columns,
    rows_shown,
    tile,
)
from fastkit.kernels.merged_lines_ring import Ring, allocated, arrived, ask, async_copy, ended, ring, ring_bytes, taken
from fastkit.kernels.nf4 import NF4Weight, empty_nf4, kernel_arguments

STAGES = 2  # turns of the ring
BLOCK_N, BLOCK_K = 32, 64 * W  # of 32 rows and a warp's 64 columns each lane has the absmax of one block


@gluon.jit(do_not_specialize=["turns"])
def _lines_kernel(
    words_ptr, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, code_ptr, a_ptr, b_ptr, w_ptr, inverse_ptr,
    N, scaling, turns,
    K: gl.constexpr, stride_ar: gl.constexpr, stride_bn: gl.constexpr, stride_wn: gl.constexpr, stride_wk: gl.constexpr,
    UNITS: gl.constexpr, RANK: gl.constexpr, FP8: gl.constexpr, EVEN: gl.constexpr, TRANSPOSED: gl.constexpr,
    TILE: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """One program writes `turns` tiles [32, 64 W] of W, one below the other; programs of a row are neighbours."""
    BLOCK_N: gl.constexpr = 32
    BLOCK_K: gl.constexpr = 64 * TILE.W
    AHEAD: gl.constexpr = RING.STAGES - 1  # turns
    first_row = (gl.program_id(0) // (K // BLOCK_K) * (BLOCK_N * turns)).to(gl.int64)  # * K can pass 2**31
    first_col = gl.program_id(0) % (K // BLOCK_K) * BLOCK_K
    left = gl.minimum(N - first_row, BLOCK_N * turns).to(gl.int32)  # rows
    turns = (left + BLOCK_N - 1) // BLOCK_N
    pointers = (words_ptr, b_ptr, absmax_ptr, nested_absmax_ptr, inverse_ptr)
    if AHEAD > 0:
        memory = allocated(absmax_ptr, b_ptr, RING, TILE)
        for n in gl.static_range(AHEAD):
            ask(memory, n, pointers, first_row, first_col, left, n, K, stride_bn, RANK, EVEN, RING, TILE)
    w_ptrs, number, row = lane_pointers(w_ptr, first_row, first_col, stride_wn, stride_wk, TILE)
    a = dealt_parts(a_ptr + first_col, stride_ar, RANK, RING.BLOCK_R, TILE)
    lane, _, _ = lane_blocks(TILE)
    code = gl.expand_dims(as_words(gl.load(code_ptr + lane % 16), TILE), 4)
    tables = (nested_code_ptr, gl.load(offset_ptr) if RING.DOUBLE_QUANT else 0.0)
    for turn in range(0, turns):
        if AHEAD > 0:
            arrived(RING)
            ask(memory, turn + AHEAD, pointers, first_row, first_col, left, AHEAD, K, stride_bn, RANK, EVEN, RING, TILE)
            packed, b, absmax, inverse = taken(memory, turn, tables, RING, TILE)
        else:
            packed, b, absmax, inverse = loaded(
                pointers, tables, first_row, first_col, left, K, stride_bn, UNITS, RANK, EVEN, RING, TILE
            )
        b = b_operand(b, RING.BLOCK_R, TILE)
        absmax = rows_shown(absmax, TILE)
        if RING.SCALED_ROWS:
            inverse = rows_shown(inverse, TILE)
        for part in gl.static_range(8 // TILE.C):
            w = numbers_of(part, packed, absmax, a[part], b, code, scaling, TILE)
            if FP8 and TRANSPOSED:
                inverse = of_columns(inverse_ptr + first_col, part, TILE)
            if FP8:
                w *= inverse
            w, to_ptrs = w.to(w_ptr.dtype.element_ty), w_ptrs + (number + TILE.C * part * stride_wk)
            if EVEN:
                gl.store(to_ptrs, w)
            else:
                gl.store(to_ptrs, w, mask=gl.expand_dims(row < left, 4))
        first_row += BLOCK_N
        w_ptrs += BLOCK_N * stride_wn
        left -= BLOCK_N
    if AHEAD > 0:
        ended()


def takes(weight: NF4Weight, A, B, w, transposed: bool, arch: str) -> bool:
    """Whether `launch` can write w on `arch`, of `architecture`; where not, merged_dequantize's own kernel does.

    It cannot in graphs of torch.compile, which know no Gluon, nor on CPU tensors, which only Triton's interpreter runs.
    Of the ranks above 16 it takes 32: those between, whose B is masked, and higher ones pass 128 registers a lane.
    """
    if GLUON_MISSING or mma_v2 is None or async_copy is None or torch.compiler.is_compiling():
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


def _stages(weight: NF4Weight, B) -> int:
    """Turns of the ring, 1 for none: its copies take at least 4 bytes that lie together, and start at a multiple."""
    aligned = all(each.data_ptr() % 16 == 0 for each in (weight.words, weight.absmax, B))
    return STAGES if weight.blocksize == 64 and B.shape[1] % 8 == 0 == B.stride(0) % 8 and aligned else 1


def _registers(made: Ring, transposed: bool, wide: bool, arch: str) -> tuple[int, bool]:
    """(registers of a lane, whether the compiler has to be told), by Triton 3.6 and 3.8.

    Told, they are as few as spill nothing, but for 24 bytes of masked rank 32 on sm_120; and, transposed, 96 where 80
    would do: 44.3 us and 46.9, 14336x4096, H200. Untold, as many as it takes for rank 16, more where that is `wide`:
    FP8 or masked. Other cases may take more yet; the last of their programs then wait for a second wave.
    """
    ring, old = made.STAGES > 1, int(arch[3:]) < 100
    if ring and old:
        return (
            96 if transposed else 64 if wide else 56
        ) if made.BLOCK_R == 16 else 128 if transposed else 96 if wide else 80, True
    return 128 if made.BLOCK_R == 32 else 80 if not wide else 96 if ring else 112, ring and made.BLOCK_R == 32


def _resident(made: Ring, registers: int, arch: str) -> int:
    """Programs that an SM holds: from sm_80 on it has 65,536 registers, and room for 48 warps or more."""
    kib = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_103": 228}.get(arch, 100)  # shared memory
    return min(65536 // (32 * W * registers), kib * 1024 // (ring_bytes(made) + 1024))  # 1 KiB goes to the system


def launch(weight: NF4Weight, A, B, scaling, w, transposed: bool = False, inverse=None) -> None:
    """Write w of what it `takes`; see `merged_dequantize.launch`."""
    (N, K), rank, fp8 = weight.shape, A.shape[0], w.dtype == FP8
    BLOCK_R = 16 if rank <= 16 else 32
    even = N % BLOCK_N == 0
    made = ring(_stages(weight, B), BLOCK_R, weight.offset is not None, fp8 and not transposed)
    # Programs walk down so many tiles that all run at once, in one wave.
    tall, wide = -(-N // BLOCK_N), K // BLOCK_K
    arch = architecture(w.device)
    registers, told = _registers(made, transposed, fp8 or not even or rank % 8 > 0, arch)
    programs = sm_count(w.device) * _resident(made, registers, arch)
    turns = -(-tall // max(1, programs // wide))
    with device_of(w):
        _lines_kernel[(-(-tall // turns) * wide,)](
            *kernel_arguments(weight), weight.code, A, B, w, inverse, N, scaling, turns,
            K=K, stride_ar=A.stride(0), stride_bn=B.stride(0), UNITS=weight.blocksize // 64,
            stride_wn=1 if transposed else w.stride(0), stride_wk=w.stride(0) if transposed else 1,
            RANK=rank, FP8=fp8, EVEN=even, TRANSPOSED=transposed, TILE=tile(BLOCK_R, transposed), RING=made,
            num_warps=W, enable_fp_fusion=False, **({"maxnreg": registers} if told else {}),
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
