"""NF4: weights in 4 bits, at the quantiles of a normal distribution (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

The weight, read as one long row, is cut into blocks of `blocksize` numbers. CODE holds 16 values from -1 to 1; a number
is kept as the index of the one that is nearest to it, once it is divided by the largest magnitude of its block:

    absmax = max |w|  over the block
    index  = that of the nearest in CODE to w / absmax
    w'     = CODE[index] * absmax

Two indices share a byte, the first number's in the high half. Double quantization keeps each absmax in 8 bits: less
their mean, in blocks of 256, by the same rule and a table of 256 values that are dense near zero (arXiv:2110.02861):

    absmax = nested_code[absmax_index] * nested_absmax + offset

So 64 weights take 32 bytes, a byte of absmax and 1/64 of one of nested_absmax: 4.127 bits each.

The format and every bit are those of bitsandbytes, so that weights go to and fro. One exception: below 1.2e-38, among
the subnormal numbers of fp32, its GPU kernels take everything for zero; ours do not.

This file has the format and its reading; `kernels/nf4_quantize.py` writes it, once a weight.

Casts: all arithmetic is fp32, and product and sum of absmax are rounded one by one, so the compiler may not fuse them
(enable_fp_fusion=False); the weight is rounded once, when it is stored.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastkit.kernels.common import Cost, check_floats, device_of, on_triton, tl, triton

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class NF4Weight:
    """A quantized tensor of n numbers in ceil(n / blocksize) blocks.

    packed        uint8 [ceil(n / 2)], contiguous
    absmax        [blocks], fp32; uint8 indices into nested_code if double quantized
    shape, dtype  of the tensor that was quantized
    code          fp32 [16], CODE on the weight's device
    offset        fp32, no dimensions: the mean of the absmax. This and the rest are None if not double quantized
    nested_absmax fp32 [ceil(blocks / 256)]
    nested_code   fp32 [256], ascending
    words         int32, packed as the kernels read it: 8 indices each
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    code: torch.Tensor
    offset: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    words: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self):
        packed = self.packed
        if packed.numel() % 4 or packed.storage_offset() % 4:  # no layer of a model; the copy ends in a whole word
            packed = torch.nn.functional.pad(packed, (0, -packed.numel() % 4)).clone()
        object.__setattr__(self, "words", packed.view(torch.int32))

    @classmethod
    def from_bitsandbytes(cls, packed: torch.Tensor, state) -> "NF4Weight":
        """A view of a weight of bitsandbytes, such as layer.weight.data and layer.weight.quant_state; no copy.

        Raises ValueError for another quantization than NF4.
        """
        if state.quant_type != "nf4":
            raise ValueError(f"NF4Weight: the weight is quantized as {state.quant_type!r}; only 'nf4' is supported")
        if state.nested and state.state2.blocksize != 256:
            raise ValueError(f"NF4Weight: absmax comes in blocks of {state.state2.blocksize}; only 256 is supported")
        nested = (state.offset, state.state2.absmax, state.state2.code) if state.nested else (None, None, None)
        flat = packed.detach().contiguous().view(-1).view(torch.uint8)
        return cls(flat, state.absmax, tuple(state.shape), state.dtype, state.blocksize, state.code, *nested)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        return self.packed.device


def cost(n: int, dtype=torch.bfloat16, blocksize: int = 64, double_quant: bool = True) -> Cost:
    """The least work to dequantize n numbers to `dtype`."""
    return Cost(n * dtype.itemsize + stored_bytes(n, blocksize, double_quant), n)  # * absmax


def stored_bytes(n: int, blocksize: int = 64, double_quant: bool = True) -> int:
    """Bytes of n quantized numbers."""
    blocks = -(-n // blocksize)
    nested = 4 * -(-blocks // 256) + 4 * 256 + 4
    return -(-n // 2) + (blocks + nested if double_quant else 4 * blocks) + 4 * len(CODE)


def reference_absmax(weight: NF4Weight) -> torch.Tensor:
    """absmax [blocks] in fp32, in plain torch."""
    if weight.offset is None:
        return weight.absmax
    nested = weight.nested_absmax.repeat_interleave(256)[: weight.absmax.numel()]
    return weight.nested_code[weight.absmax.long()] * nested + weight.offset


def reference(weight: NF4Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`dequantize_nf4` in plain torch. To fp64 the product is not rounded: the tests' truth."""
    dtype = dtype or weight.dtype
    accurate = torch.promote_types(dtype, torch.float32)
    indices = torch.stack([weight.packed >> 4, weight.packed & 15], -1).flatten()[: weight.numel]
    values = weight.code.to(accurate)[indices.long()]
    absmax = reference_absmax(weight).to(accurate).repeat_interleave(weight.blocksize)[: weight.numel]
    return (values * absmax).to(dtype).view(weight.shape)


@triton.jit
def word_absmax(
    first, words, mask, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr,
    BLOCKSIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr,
):  # fmt: skip
    """absmax, in fp32, of the blocks that hold the words first + words; first is an int64 scalar, words are int32.

    Neighbours share a block and the table stays in the L1 cache, so it is the addresses that cost: 32-bit ones here.
    """
    block = first // (BLOCKSIZE // 8)
    blocks = ((first % (BLOCKSIZE // 8)).to(tl.int32) + words) // (BLOCKSIZE // 8)  # beyond `block`
    absmax = tl.load(absmax_ptr + block + blocks, mask=mask, other=0)
    if DOUBLE_QUANT:
        nested = ((block % 256).to(tl.int32) + blocks) // 256
        nested_absmax = tl.load(nested_absmax_ptr + block // 256 + nested, mask=mask, other=0.0)
        absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested_absmax + tl.load(offset_ptr)
    return absmax


@triton.jit
def spread(absmax, SHARE: tl.constexpr):
    """absmax [W] of words that share it, SHARE at a time, for each of the words [W * SHARE]."""
    each = tl.broadcast_to(absmax[:, None], [absmax.shape[0], SHARE])
    return tl.reshape(each, [absmax.shape[0] * SHARE])


@triton.jit
def code_values(words, code):
    """CODE's values [W, 8] of `words` int32 [W], which hold 8 indices each: the bytes in order, the high half first.

    `code` lies in shared memory for the gather: 16 neighbours, in 16 banks, so that lanes never conflict.
    """
    shifts = 4 * (tl.arange(0, 8) ^ 1)
    indices = (words[:, None] >> shifts[None, :]) & 15
    return tl.reshape(tl.gather(code, tl.reshape(indices, [8 * words.shape[0]]), 0), [words.shape[0], 8])


@triton.jit
def _dequantize_kernel(
    words_ptr, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, code_ptr, w_ptr,
    N, WORDS,
    BLOCKSIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, SHARE: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """One program writes 8 * BLOCK_WORDS numbers, a multiple of BLOCKSIZE.

    A lane loads four words, 32 numbers, at once; the compiler then deals the words out, a word a lane, so that a store
    of 8 numbers is 128 bits too and a warp's stores are neighbours. WORDS = cdiv(N, 8) is an argument because the
    compiler, told that it is a multiple of 16, knows that the mask never parts four words.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_WORDS  # numbers can pass 2**31
    words = tl.arange(0, BLOCK_WORDS)  # [BLOCK_WORDS]
    mask = start + words < WORDS
    packed = tl.load(words_ptr + start + words, mask=mask, other=0)
    shared = tl.arange(0, BLOCK_WORDS // SHARE) * SHARE  # the first word of each that share an absmax
    absmax = word_absmax(
        start, shared, start + shared < WORDS, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr,
        BLOCKSIZE, DOUBLE_QUANT,
    )  # fmt: skip
    code = tl.load(code_ptr + tl.arange(0, 16))

    w = code_values(packed, code) * spread(absmax, SHARE)[:, None]  # [BLOCK_WORDS, 8]
    numbers = words[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(w_ptr + start * 8 + numbers, w.to(w_ptr.dtype.element_ty), mask=start * 8 + numbers < N)


def kernel_arguments(weight: NF4Weight) -> tuple[torch.Tensor | None, ...]:
    """What the kernels read of `weight`: words, absmax, offset, nested_absmax, nested_code."""
    return weight.words, weight.absmax, weight.offset, weight.nested_absmax, weight.nested_code


def words_sharing(weight: NF4Weight, words_k: int = 0) -> int:
    """How many words, at most 8, share an absmax from wherever a multiple of as many starts, in rows of `words_k`."""
    return math.gcd(words_k, weight.blocksize // 8, 8)


def launch(weight: NF4Weight, w, BLOCK_WORDS: int = 512, num_warps: int = 4) -> None:
    """Write w, contiguous, of as many numbers as `weight`. BLOCK_WORDS must be a multiple of a block's words."""
    if w.numel() == 0:
        return
    with device_of(w):
        _dequantize_kernel[(-(-w.numel() // (8 * BLOCK_WORDS)),)](
            *kernel_arguments(weight), weight.code, w, w.numel(), -(-w.numel() // 8),
            weight.blocksize, weight.offset is not None, words_sharing(weight), BLOCK_WORDS, num_warps=num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    N, K = 14336, 4096  # Mistral-7B's gate and up
    w, weight = torch.empty(N, K, dtype=dtype, device="meta"), empty_nf4((N, K), dtype, device="meta")
    return {f"dequantize {N}x{K}": functools.partial(launch, weight, w)}


def empty_nf4(shape, dtype, blocksize: int = 64, double_quant: bool = True, device="cuda") -> NF4Weight:
    """An NF4Weight of `shape` whose packed and absmax are yet to be written."""
    n = math.prod(shape)
    blocks = -(-n // blocksize)
    empty = functools.partial(torch.empty, device=device)
    nested = ()
    if double_quant:
        nested = empty(()), empty(-(-blocks // 256)), empty(256)
    return NF4Weight(
        empty(-(-n // 2), dtype=torch.uint8), empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
        tuple(shape), dtype, blocksize, code_on(empty(0).device), *nested,
    )  # fmt: skip


@functools.cache
def code_on(device: torch.device) -> torch.Tensor:
    """CODE in fp32."""
    return torch.tensor(CODE, dtype=torch.float32, device=device)


def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The numbers that `weight` stands for, bit by bit as bitsandbytes gives them.

    weight   an NF4Weight, of quantize_nf4 or NF4Weight.from_bitsandbytes
    dtype    float32, float16 or bfloat16; by default that of the tensor that was quantized
    returns  a new tensor of weight.shape; rounded once, so it is the nearest of its dtype to CODE[index] * absmax

    No gradient. Raises TypeError for another dtype, NotImplementedError for a device without kernels. CPU tensors take
    `reference` (see `on_triton`).
    """
    w = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    check_floats("dequantize_nf4", weight=w)
    if not on_triton("dequantize_nf4", "weight", w):
        return reference(weight, dtype)
    launch(weight, w)
    return w
