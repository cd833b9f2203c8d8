"""y = x @ W.T straight from 4 bits, for the one or few rows of x that generation has; see `kernels/nf4.py`.

A new token needs each weight once, so its time is that of reading them: 0.52 bytes a weight here, against the 0.52
read, 2 written and 2 read again of a product with dequantized weights.

With W[n, k] = CODE[q] * absmax, and chunks of up to 64 neighbours that share an absmax,

    y[n] = sum over chunks of absmax * (sum over the chunk of CODE[q] * x[k])

`kernels/nf4_matvec_lines.py` does that on NVIDIA's GPUs from sm_80 on, for 1 to 8 rows in 16 bits of a multiple of 256
numbers; here is what runs elsewhere, and in graphs of torch.compile.

Tensor cores take the inner sum, for up to 16 rows of x at once, even for one. They want 16 bits. CODE rounded to 16
bits would be as wrong as any rounded weight; but it goes as a sum of two such numbers, high and low, side by side in
the 32 bits that one load from a table in shared memory gives, and x stands twice beside them:

    CODE[q] * x[k]  =  high * x[k] + low * x[k],   wrong by less than 2**-17 of CODE

What a lane loads is what its tensor core takes, in its registers as they are. So a weight costs a shift, a mask, a load
and an eighth of a product; at 3.35 TB/s an H100 has time for five instructions. absmax costs a chunk a few.

fp32 x goes as three products of TF32 parts; one row of it, and of GPUs without tensor cores, has a kernel of its own,
in which a lane takes the same words of BLOCK_N rows, so that its 8 numbers of x serve them all.

Casts: none but those: absmax, sums and products of both are fp32, y is rounded once.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels import nf4_matvec_lines
from fastkit.kernels.common import Cost, architecture, check_floats, device_of, on_triton, sm_count, tl, triton
from fastkit.kernels.nf4 import (
    NF4Weight,
    dequantize_nf4,
    empty_nf4,
    kernel_arguments,
    stored_bytes,
    word_absmax,
    words_sharing,
)
from fastkit.kernels.nf4 import reference as dequantized

MAX_ROWS = 16


def cost(M: int, N: int, K: int, dtype=torch.bfloat16, blocksize: int = 64, double_quant: bool = True) -> Cost:
    """The least work for x [M, K] of `dtype` and a weight [N, K]."""
    moved = stored_bytes(N * K, blocksize, double_quant) + M * (N + K) * dtype.itemsize
    return Cost(moved, (2 * M + 1) * N * K)


def reference(x: torch.Tensor, weight: NF4Weight) -> torch.Tensor:
    """The same in plain torch, in fp32. With fp64 x nothing is rounded: the tests' truth."""
    accurate = torch.promote_types(x.dtype, torch.float32)
    return (x.to(accurate) @ dequantized(weight, accurate).T).to(x.dtype)


@triton.jit
def _eighths(x):
    """The columns of x [W, 8], each [W]: a lane has a whole row, so nothing moves."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 4, 2]))
    even_low, even_high = tl.split(tl.reshape(even, [x.shape[0], 2, 2]))  # 0 4, 2 6
    odd_low, odd_high = tl.split(tl.reshape(odd, [x.shape[0], 2, 2]))  # 1 5, 3 7
    x0, x4 = tl.split(even_low)
    x2, x6 = tl.split(even_high)
    x1, x5 = tl.split(odd_low)
    x3, x7 = tl.split(odd_high)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _products(packed, SHIFT: tl.constexpr, code, x):
    """CODE[index] * x [BLOCK_N, W] of the index that stands SHIFT bits up in each word."""
    indices = tl.reshape((packed >> SHIFT) & 15, [packed.shape[0] * packed.shape[1]])
    return tl.reshape(tl.gather(code, indices, 0), [packed.shape[0], packed.shape[1]]) * x[None, :]


@triton.jit
def _matvec_kernel(
    words_ptr, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, code_ptr, x_ptr, y_ptr,
    N, words_k,
    BLOCKSIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_N numbers of y. Sums stay with the lane that made them until the row is done."""
    row, first = tl.arange(0, BLOCK_N), tl.program_id(0).to(tl.int64) * BLOCK_N * words_k  # numbers can pass 2**31
    in_rows = tl.program_id(0) * BLOCK_N + row < N  # [BLOCK_N]
    code = tl.load(code_ptr + tl.arange(0, 16))
    y = tl.zeros([BLOCK_N, BLOCK_WORDS], tl.float32)
    for start in range(0, words_k, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)  # [BLOCK_WORDS]
        # "A multiple of 1" hides the alignment, else lanes take four words at once and what they decode moves to x.
        words = tl.multiple_of(row[:, None] * words_k + word[None, :], [1, 1])
        mask = in_rows[:, None] & (word < words_k)[None, :]
        packed = tl.load(words_ptr + first + words, mask=mask, other=0)  # [BLOCK_N, BLOCK_WORDS]
        absmax = word_absmax(
            first, words, mask, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, BLOCKSIZE, DOUBLE_QUANT
        )
        cols = word[:, None] * 8 + tl.arange(0, 8)[None, :]
        x = tl.load(x_ptr + cols, mask=(word < words_k)[:, None], other=0.0).to(tl.float32)  # [BLOCK_WORDS, 8]
        x0, x1, x2, x3, x4, x5, x6, x7 = _eighths(x)
        total = _products(packed, 4, code, x0)  # a byte's high half comes first
        total += _products(packed, 0, code, x1)
        total += _products(packed, 12, code, x2)
        total += _products(packed, 8, code, x3)
        total += _products(packed, 20, code, x4)
        total += _products(packed, 16, code, x5)
        total += _products(packed, 28, code, x6)
        total += _products(packed, 24, code, x7)
        y += absmax * total
    tl.store(y_ptr + tl.program_id(0) * BLOCK_N + row, tl.sum(y, axis=1).to(y_ptr.dtype.element_ty), mask=in_rows)


@triton.jit
def _code_pairs(code, dtype: tl.constexpr):
    """CODE [16] as int32, each of two numbers of `dtype`, of 16 bits, that add up to it: the larger in the low half."""
    high = code.to(dtype)
    low = (code - high.to(tl.float32)).to(dtype)
    return high.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF | low.to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def _operands(packed, x, code, dtype: tl.constexpr):
    """CODE[index] [C, BLOCK_N, columns] of packed [C, BLOCK_N, W], and x [C, BLOCK_M, 8 * W] with as many columns.

    An index is shifted to where it is already the address of a number of 32 bits; else that takes an instruction more.
    """
    C: tl.constexpr = packed.shape[0]
    BLOCK_N: tl.constexpr = packed.shape[1]
    BLOCK_M: tl.constexpr = x.shape[1]
    NUMBERS: tl.constexpr = 8 * packed.shape[2]
    place = 4 * (tl.arange(0, 8) ^ 1)  # of the index in its word: a byte's high half comes first
    bits = packed.to(tl.uint32, bitcast=True).to(tl.uint64)[:, :, :, None] << 32
    indices = ((bits >> (30 + place).to(tl.uint64)[None, None, None, :]).to(tl.int32) & 60) >> 2
    w = tl.reshape(tl.gather(code, tl.reshape(indices, [C * BLOCK_N * NUMBERS]), 0), [C, BLOCK_N, NUMBERS])
    if dtype.primitive_bitwidth == 16:  # columns high and low by turns, each to be multiplied by the same x
        high = w.to(tl.int16).to(dtype, bitcast=True)
        low = (w >> 16).to(tl.int16).to(dtype, bitcast=True)
        w = tl.reshape(tl.join(high, low), [C, BLOCK_N, 2 * NUMBERS])
        x = tl.reshape(tl.join(x, x), [C, BLOCK_M, 2 * NUMBERS])
    return w, x


@triton.jit
def _batch_kernel(
    words_ptr, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, code_ptr, x_ptr, y_ptr,
    M, N, words_k, stride_xm, stride_ym,
    BLOCKSIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_N columns of y for all rows, at most BLOCK_M.

    A turn takes CHUNKS chunks of each row of W, and a chunk is SHARE words that share an absmax. Warps take different
    chunks, and their sums meet only at the end.
    """
    row, first = tl.arange(0, BLOCK_N), tl.program_id(0).to(tl.int64) * BLOCK_N * words_k
    in_rows = tl.program_id(0) * BLOCK_N + row < N  # [BLOCK_N]
    m, number = tl.arange(0, BLOCK_M), tl.arange(0, 8 * SHARE)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    code = tl.load(code_ptr + tl.arange(0, 16))
    if dtype.primitive_bitwidth == 16:
        code = _code_pairs(code, dtype)
    y = tl.zeros([CHUNKS, BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, words_k, CHUNKS * SHARE, num_stages=STAGES):
        chunk = start + tl.arange(0, CHUNKS) * SHARE  # [CHUNKS], the first word of each
        words = row[None, :] * words_k + chunk[:, None]  # [CHUNKS, BLOCK_N]
        mask = in_rows[None, :] & (chunk < words_k)[:, None]
        packed = tl.load(
            words_ptr + first + (words[:, :, None] + tl.arange(0, SHARE)[None, None, :]), mask=mask[:, :, None], other=0
        )  # [CHUNKS, BLOCK_N, SHARE]
        absmax = word_absmax(
            first, words, mask, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, BLOCKSIZE, DOUBLE_QUANT
        )
        cols = chunk[:, None, None] * 8 + number[None, None, :]
        x = tl.load(
            x_ptr + m[None, :, None] * stride_xm + cols, mask=(m < M)[None, :, None] & (cols < words_k * 8), other=0.0
        )  # [CHUNKS, BLOCK_M, 8 * SHARE]
        w, x = _operands(packed, x, code, dtype)
        y += absmax[:, :, None] * tl.dot(w, tl.trans(x, 0, 2, 1), input_precision=PRECISION)
    out = y_ptr + m[None, :] * stride_ym + (tl.program_id(0) * BLOCK_N + row)[:, None]
    tl.store(out, tl.sum(y, axis=0).to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & (m < M)[None, :])


def launch_matvec(x, weight: NF4Weight, y, **tiling) -> None:
    """Write y [N], given x [K], both contiguous. `tiling` overrides BLOCK_N and so on."""
    N, K = weight.shape
    tiling = {"BLOCK_N": 16 if N > 8192 else 8, "BLOCK_WORDS": 128, "num_warps": 4} | tiling  # a word a lane
    with device_of(x):
        _matvec_kernel[(-(-N // tiling["BLOCK_N"]),)](
            *kernel_arguments(weight), weight.code, x, y, N, K // 8,
            BLOCKSIZE=weight.blocksize, DOUBLE_QUANT=weight.offset is not None, **tiling,
        )  # fmt: skip


def launch_batch(x, weight: NF4Weight, y, **tiling) -> None:
    """Write y [M, N], given x [M, K], M from 1 to 16; rows may lie any stride apart. `tiling` overrides BLOCK_N etc.

    Raises NotImplementedError where Triton has no tensor cores.
    """
    arch = architecture(x.device)
    if arch == "sm_75":
        raise NotImplementedError("nf4_matvec of several rows needs Triton's tensor cores, sm_80: use dequantize_nf4")
    (M, K), N = x.shape, weight.shape[0]
    amd = arch.startswith("gfx")
    num_warps = 8 if 64 * sm_count(x.device) > N else 4  # few programs have more warps each
    CHUNKS = num_warps if x.dtype == torch.float32 or amd else 2 * num_warps  # as many as registers last for
    BLOCK_M = 8 if M <= 8 and not amd else 16
    tiling = {"BLOCK_M": BLOCK_M, "BLOCK_N": 16, "CHUNKS": CHUNKS, "STAGES": 3, "num_warps": num_warps} | tiling
    with device_of(x):
        _batch_kernel[(-(-N // tiling["BLOCK_N"]),)](
            *kernel_arguments(weight), weight.code, x, y, M, N, K // 8, x.stride(0), y.stride(0),
            BLOCKSIZE=weight.blocksize, DOUBLE_QUANT=weight.offset is not None, SHARE=words_sharing(weight, K // 8),
            PRECISION="ieee" if amd else "tf32x3", **tiling,
        )  # fmt: skip


def launch(x, weight: NF4Weight, y) -> None:
    """Write y [M, N], given x [M, K], M from 1 to 16, both contiguous, with the kernel that suits them."""
    if nf4_matvec_lines.takes(weight, x, y, architecture(x.device)):
        nf4_matvec_lines.launch(x, weight, y)
    elif len(x) == 1 and (x.dtype == torch.float32 or architecture(x.device) == "sm_75"):
        launch_matvec(x[0], weight, y[0])
    else:
        launch_batch(x, weight, y)


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    N, K = 14336, 4096  # Mistral-7B's gate and up
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    weight, x, y = empty_nf4((N, K), dtype, device="meta"), empty(16, K), empty(16, N)
    return {
        f"1 row {N}x{K}": functools.partial(launch, x[:1], weight, y[:1]),
        f"1 row {N}x{K} in torch.compile": functools.partial(launch_batch, x[:1], weight, y[:1]),
        f"16 rows {N}x{K}": functools.partial(launch, x, weight, y),
        f"1 row {N}x{K} in fp32": functools.partial(launch, x[:1].float(), weight, y[:1].float()),
    }


def nf4_matvec(x: torch.Tensor, weight: NF4Weight) -> torch.Tensor:
    """x @ W.T of a 4-bit weight that is not dequantized first, for up to 16 rows (`kernels/nf4.py` has the format).

    x        [..., K] of up to 16 rows, float32, float16 or bfloat16; copied first if a row is not contiguous
    weight   an NF4Weight of shape [N, K]
    returns  [..., N], contiguous, in x's dtype; fp32 sums

    No gradient: it is for generation. Raises TypeError for another dtype, ValueError for shapes or devices that do not
    match, NotImplementedError for a device without kernels. More rows, and those whose length is no multiple of 8 (of
    16 for 2 to 16 rows in float32), take dequantize_nf4 and torch's product, as do 2 to 16 rows on GPUs before sm_80;
    CPU tensors take `reference` (see `on_triton`).
    """
    check_floats("nf4_matvec", x=x)
    if len(weight.shape) != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"nf4_matvec: x has shape {tuple(x.shape)}; a weight {weight.shape} needs [..., K] of its [N, K]"
        )
    if x.device != weight.device:
        raise ValueError(f"nf4_matvec: x is on {x.device} but weight is on {weight.device}; move one to the other")
    (N, K), M = weight.shape, x.shape[:-1].numel()
    x = x.detach()
    if not on_triton("nf4_matvec", "x", x):
        return reference(x, weight)
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    step = 16 if M > 1 and x.dtype == torch.float32 else 8  # tensor cores take 16 columns at least
    if M > MAX_ROWS or K == 0 or K % step or (M > 1 and architecture(x.device) == "sm_75"):
        return x @ dequantize_nf4(weight, x.dtype).T
    launch(x.reshape(M, K).contiguous(), weight, y.view(M, N))
    return y
