"""y = x @ W.T straight from 4 bits, for the one or few rows of x that generation has; see `kernels/nf4.py`.

A new token needs each weight once, so its time is that of reading them: 0.52 bytes a weight here, against the 0.52
read, 2 written and 2 read again of a product with dequantized weights.

One row. With W[n, k] = CODE[q] * absmax, and words of 8 neighbours, which never straddle a block,

    y[n] = sum over words of absmax * (sum over the word of CODE[q] * x[k])

A lane takes the same words of BLOCK_N rows, so that its 8 numbers of x serve them all. At 3.35 TB/s an H100 has time
for five instructions a weight, and five it takes to shift and mask an index, to address and load its value, to multiply
and add. absmax, its table and its addresses cost a lane some 20 more a word. So this kernel is bound by instructions as
much as by memory, and all that can be is done once a word.

Several rows, up to 16, would multiply the last instruction; tensor cores do it for all rows at once, from weights
rounded to x's dtype, as a product with dequantized weights has them.

Casts: for one row all is fp32 and y is rounded once. For several, weights are rounded to x's dtype, and sums are fp32.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels.common import Cost, architecture, check_floats, device_of, on_triton, sm_count, tl, triton
from fastkit.kernels.nf4 import (
    NF4Weight,
    code_values,
    dequantize_nf4,
    empty_nf4,
    kernel_arguments,
    stored_bytes,
    word_absmax,
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
def _batch_kernel(
    words_ptr, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, code_ptr, x_ptr, y_ptr,
    M, N, K, words_k, stride_xm, stride_ym,
    BLOCKSIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_N columns of y for all rows, at most BLOCK_M."""
    row, first = tl.arange(0, BLOCK_N), tl.program_id(0).to(tl.int64) * BLOCK_N * words_k
    in_rows = tl.program_id(0) * BLOCK_N + row < N  # [BLOCK_N]
    m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    code = tl.load(code_ptr + tl.arange(0, 16))
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, words_k, BLOCK_K // 8):
        word = start + tl.arange(0, BLOCK_K // 8)
        words, mask = row[:, None] * words_k + word[None, :], in_rows[:, None] & (word < words_k)[None, :]
        packed = tl.load(words_ptr + first + words, mask=mask, other=0)  # [BLOCK_N, BLOCK_K / 8]
        absmax = word_absmax(
            first, words, mask, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, BLOCKSIZE, DOUBLE_QUANT
        )
        values = code_values(tl.reshape(packed, [BLOCK_N * BLOCK_K // 8]), code)
        w = tl.reshape(values, [BLOCK_N, BLOCK_K // 8, 8]) * absmax[:, :, None]
        w = tl.reshape(w, [BLOCK_N, BLOCK_K]).to(x_ptr.dtype.element_ty)
        cols = start * 8 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        x_mask = (m < M)[:, None] & (cols < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * stride_xm + cols[None, :], mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        y = tl.dot(w, tl.trans(x), y, input_precision=PRECISION)
    out = y_ptr + m[None, :] * stride_ym + (tl.program_id(0) * BLOCK_N + row)[:, None]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & (m < M)[None, :])


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
    BLOCK_N = next((size for size in (64, 32) if -(-N // size) >= sm_count(x.device)), 16)  # all SMs at work
    tiling = {"BLOCK_M": 16, "BLOCK_N": BLOCK_N, "BLOCK_K": 64, "num_warps": 4} | tiling
    with device_of(x):
        _batch_kernel[(-(-N // tiling["BLOCK_N"]),)](
            *kernel_arguments(weight), weight.code, x, y, M, N, K, K // 8, x.stride(0), y.stride(0),
            BLOCKSIZE=weight.blocksize, DOUBLE_QUANT=weight.offset is not None,
            PRECISION="ieee" if arch.startswith("gfx") else "tf32x3", enable_fp_fusion=False, **tiling,
        )  # fmt: skip


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    N, K = 14336, 4096  # Mistral-7B's gate and up
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    weight, x, y = empty_nf4((N, K), dtype, device="meta"), empty(16, K), empty(16, N)
    return {
        f"1 row {N}x{K}": functools.partial(launch_matvec, x[0], weight, y[0]),
        f"16 rows {N}x{K}": functools.partial(launch_batch, x, weight, y),
    }


def nf4_matvec(x: torch.Tensor, weight: NF4Weight) -> torch.Tensor:
    """x @ W.T of a 4-bit weight that is not dequantized first, for up to 16 rows (`kernels/nf4.py` has the format).

    x        [..., K] of up to 16 rows, float32, float16 or bfloat16; copied first if a row is not contiguous
    weight   an NF4Weight of shape [N, K]
    returns  [..., N], contiguous, in x's dtype; fp32 sums

    No gradient: it is for generation. Raises TypeError for another dtype, ValueError for shapes or devices that do not
    match, NotImplementedError for a device without kernels. More rows, and those whose length is no multiple of 8,
    take dequantize_nf4 and torch's product, as do 2 to 16 rows on GPUs before sm_80; CPU tensors take `reference` (see
    `on_triton`).
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
    if M > MAX_ROWS or K == 0 or K % 8 or (M > 1 and architecture(x.device) == "sm_75"):
        return x @ dequantize_nf4(weight, x.dtype).T
    rows = x.reshape(M, K).contiguous()
    if M == 1:
        launch_matvec(rows[0], weight, y.view(N))
    else:
        launch_batch(rows, weight, y.view(M, N))
    return y
