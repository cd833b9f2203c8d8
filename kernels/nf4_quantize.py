"""Writing NF4, the format of `kernels/nf4.py` (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), once a weight.

    absmax = max |w|  over the block
    index  = how many of the 15 midpoints of CODE lie below w * (1 / absmax)

Double quantization treats absmax so in turn, less its mean, in blocks of 256 and with a table of 256 values that are
dense near zero (arXiv:2110.02861).

Every bit is as bitsandbytes has it. Its backends differ in corners, and we follow each on its own ground.

On a GPU its code is built with fast math. Subnormal numbers, below 2**-126, are zeros, read or computed; so is
1 / absmax above 2**126, and then every number of the block has the index of 0. Else it is the hardware's approximation.
In a block of zeros, 0 * inf being no number, every index is 0. Four of the midpoints are its source's decimal literals,
a last place away from those of CODE. A tie of nested values goes to the even index.

On a CPU absmax is raised to 1e-38 before it divides; a last, shorter block is divided instead of multiplied (by
`reference`, not by the interpreted kernel); nested values are divided and rounded to 65,536 levels first.

Casts: all arithmetic is fp32, whatever the dtype of the weight.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels.common import Cost, check_floats, device_of, fp32, on_triton, tl, triton
from fastkit.kernels.nf4 import BLOCKSIZES, NF4Weight, code_on, empty_nf4, stored_bytes

LEAST_ABSMAX = 1e-38  # what bitsandbytes' CPU backend divides by at least
GPU_MIDPOINTS = {0: -0.8480964303016663, 8: 0.1202552542090416, 12: 0.5016633868217468, 14: 0.8614783883094788}


def cost(n: int, dtype=torch.bfloat16, blocksize: int = 64) -> Cost:
    """The least work to quantize n numbers of `dtype`, absmax in fp32; |w|, max, * 1 / absmax and 15 comparisons."""
    return Cost(n * dtype.itemsize + stored_bytes(n, blocksize, double_quant=False), 18 * n)


def dynamic_code() -> torch.Tensor:
    """The 256 values of nested_code: ±(0.1 to 1) * 10^-e in 2^(6-e) equal steps for e = 0 to 6, 0 and 1, fp32."""
    positive = [
        10 ** (e - 6) * (steps[:-1] + steps[1:]) / 2
        for e in range(7)
        for steps in [torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float32)]
    ]
    # through Python's doubles, in which bitsandbytes sorts them
    values = [value for part in positive for value in part.tolist()]
    return torch.tensor(sorted([*values, *(-value for value in values), 0.0, 1.0]), dtype=torch.float32)


def reference(x: torch.Tensor, blocksize: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed, absmax in fp32) in plain torch, in the arithmetic of bitsandbytes' CPU backend."""
    flat = x.detach().reshape(-1).float()
    full = flat.numel() // blocksize * blocksize
    blocks = flat[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=LEAST_ABSMAX))[:, None]).flatten()
    if full < flat.numel():
        last = flat[full:].abs().amax().clamp(min=LEAST_ABSMAX)[None]
        absmax, scaled = torch.cat([absmax, last]), torch.cat([scaled, flat[full:] / last])
    scaled = torch.nn.functional.pad(scaled.clamp(-1, 1), (0, scaled.numel() % 2))
    indices = torch.bucketize(scaled, midpoints(x.device)).to(torch.uint8)
    return indices[::2] << 4 | indices[1::2], absmax


def reference_quantize_absmax(centered: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, nested_absmax) of absmax - offset in plain torch, in the arithmetic of bitsandbytes' CPU backend."""
    blocks = torch.nn.functional.pad(centered, (0, -centered.numel() % 256)).view(-1, 256)
    nested_absmax = blocks.abs().amax(1)
    scaled = torch.where(nested_absmax[:, None] > 0, blocks / nested_absmax[:, None], -1.0).clamp(-1, 1)
    levels = ((scaled + 1) * 0.5 * 65535 + 0.5).floor() / 65535 * 2 - 1
    indices = torch.bucketize(levels.flatten()[: centered.numel()], (code[:-1] + code[1:]) / 2)
    return indices.to(torch.uint8), nested_absmax


@functools.cache
def midpoints(device: torch.device) -> torch.Tensor:
    """What parts the 16 values of CODE, fp32 [15], as bitsandbytes has it on `device`."""
    code = code_on(torch.device("cpu"))
    between = (code[:-1] + code[1:]) / 2
    if device.type != "cpu":
        between[list(GPU_MIDPOINTS)] = torch.tensor(list(GPU_MIDPOINTS.values()))
    return between.to(device)


@triton.jit
def _normal(x):
    """x, or zero for what fast math does not tell from zero: below 2**-126."""
    return tl.where(x < 1.1754943508222875e-38, 0.0, x)


@triton.jit
def _fast_inverse(absmax):
    """1 / absmax; no number for zero, as 0 * inf is none."""
    return tl.where(absmax > 0, _normal(1.0 / absmax), float("nan"))


@triton.jit
def _quantize_kernel(
    x_ptr, midpoints_ptr, packed_ptr, absmax_ptr,
    N,
    LEAST_ABSMAX: tl.constexpr, FAST_MATH: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program quantizes BLOCKS blocks. It counts midpoints, 15 for each number; who quantizes once can wait."""
    start = tl.program_id(0).to(tl.int64) * BLOCKS
    blocks = start + tl.arange(0, BLOCKS)  # [BLOCKS]
    numbers = blocks[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]  # [BLOCKS, BLOCKSIZE]
    x = tl.load(x_ptr + numbers, mask=numbers < N, other=0.0).to(tl.float32)

    absmax = tl.max(tl.abs(x), axis=1)
    if FAST_MATH:
        absmax = _normal(absmax)
        inverse = _fast_inverse(absmax)
    else:
        inverse = 1.0 / tl.maximum(absmax, fp32(LEAST_ABSMAX))  # a constant below 2**-126 is fp64 to Triton
    tl.store(absmax_ptr + blocks, absmax, mask=blocks * BLOCKSIZE < N)
    scaled = x * inverse[:, None]
    indices = tl.zeros([BLOCKS, BLOCKSIZE], tl.int32)
    for i in tl.static_range(15):
        indices += (scaled > tl.load(midpoints_ptr + i)).to(tl.int32)  # no number, of a block of zeros, is above none
    high, low = tl.split(tl.reshape(indices, [BLOCKS * BLOCKSIZE // 2, 2]))
    pairs = start * (BLOCKSIZE // 2) + tl.arange(0, BLOCKS * BLOCKSIZE // 2)
    tl.store(packed_ptr + pairs, (high << 4 | low).to(tl.uint8), mask=pairs < tl.cdiv(N, 2))


@triton.jit
def _quantize_absmax_kernel(centered_ptr, code_ptr, indices_ptr, nested_absmax_ptr, N):
    """One program quantizes a block of 256 absmax by bisection, as bitsandbytes does on a GPU.

    Seven halvings of 0..255 end at an even index, with the number between that one's neighbours; a tie stays there.
    """
    numbers = tl.program_id(0) * 256 + tl.arange(0, 256)
    centered = tl.load(centered_ptr + numbers, mask=numbers < N, other=0.0)
    nested_absmax = _normal(tl.max(tl.abs(centered), axis=0))
    tl.store(nested_absmax_ptr + tl.program_id(0), nested_absmax)
    scaled = centered * _fast_inverse(nested_absmax)

    index = tl.full([256], 127, tl.int32)
    for i in tl.static_range(7):
        index += tl.where(scaled > tl.load(code_ptr + index), 64 >> i, -(64 >> i))
    value = tl.load(code_ptr + index)
    above = (value + tl.load(code_ptr + index + 1)) * 0.5
    below = (value + tl.load(code_ptr + tl.maximum(index - 1, 0))) * 0.5
    index += tl.where(scaled > value, (scaled > above).to(tl.int32), -((scaled < below) & (index > 0)).to(tl.int32))
    tl.store(indices_ptr + numbers, index.to(tl.uint8), mask=numbers < N)


def launch(x, blocksize: int, packed, absmax) -> None:
    """Write packed (uint8) and absmax (fp32), given x, all contiguous."""
    if x.numel() == 0:
        return
    BLOCKS = max(1, 2048 // blocksize)
    with device_of(x):
        _quantize_kernel[(-(-absmax.numel() // BLOCKS),)](
            x, midpoints(x.device), packed, absmax, x.numel(), LEAST_ABSMAX, x.device.type != "cpu", blocksize, BLOCKS,
            num_warps=4,
        )  # fmt: skip


def launch_absmax(centered, nested_code, indices, nested_absmax) -> None:
    """Write indices (uint8) and nested_absmax (fp32), given absmax - offset."""
    with device_of(centered):
        _quantize_absmax_kernel[(nested_absmax.numel(),)](
            centered, nested_code, indices, nested_absmax, centered.numel()
        )


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    N, K = 14336, 4096  # Mistral-7B's gate and up
    x = torch.empty(N, K, dtype=dtype, device="meta")
    weight = empty_nf4((N, K), dtype, double_quant=False, device="meta")
    nested = torch.empty(weight.absmax.numel() // 256, device="meta")
    code, indices = torch.empty(256, device="meta"), torch.empty_like(weight.absmax, dtype=torch.uint8)
    return {
        f"{N}x{K}": functools.partial(launch, x, 64, weight.packed, weight.absmax),
        f"absmax of {N}x{K}": functools.partial(launch_absmax, weight.absmax, code, indices, nested),
    }


def quantize_nf4(x: torch.Tensor, blocksize: int = 64, double_quant: bool = False) -> NF4Weight:
    """x in 4 bits a number (QLoRA, arXiv:2305.14314), bit by bit as bitsandbytes does it on the same device.

    x             any shape, float32, float16 or bfloat16; read as one long row. Copied first if not contiguous.
    blocksize     numbers that share an absmax: 32, 64, 128, 256, 512, 1024, 2048 or 4096
    double_quant  whether to keep the absmax in 8 bits too (bitsandbytes: compress_statistics)

    No gradient. Raises TypeError for another dtype, ValueError for another blocksize or nothing to quantize twice,
    NotImplementedError for a device without kernels. CPU tensors take the references (see `on_triton`).
    """
    check_floats("quantize_nf4", x=x)
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"quantize_nf4: blocksize is {blocksize}; use one of {', '.join(map(str, BLOCKSIZES))}")
    if double_quant and x.numel() == 0:
        raise ValueError(f"quantize_nf4: x has shape {tuple(x.shape)}; the mean absmax of no blocks does not exist")
    x = x.detach()
    weight = empty_nf4(x.shape, x.dtype, blocksize, double_quant=False, device=x.device)
    packed, absmax = weight.packed, weight.absmax
    if on_triton("quantize_nf4", "x", x):
        launch(x.contiguous(), blocksize, packed, absmax)
    elif x.numel():
        packed, absmax = reference(x, blocksize)
    if not double_quant:
        return NF4Weight(packed, absmax, tuple(x.shape), x.dtype, blocksize, weight.code)
    offset, nested_code = absmax.mean(), dynamic_code().to(x.device)
    centered = absmax - offset
    if x.device.type == "cpu":
        indices, nested_absmax = reference_quantize_absmax(centered, nested_code)
    else:
        indices = torch.empty_like(centered, dtype=torch.uint8)
        nested_absmax = torch.empty(-(-centered.numel() // 256), device=x.device)
        launch_absmax(centered, nested_code, indices, nested_absmax)
    return NF4Weight(
        packed, indices, tuple(x.shape), x.dtype, blocksize, weight.code, offset, nested_absmax, nested_code
    )
