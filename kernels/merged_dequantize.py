"""A 4-bit weight and its LoRA adapter as one dense matrix: W = dequantize(weight) + scaling * B @ A, in one pass.

A layer with an adapter (LoRA, Hu et al. 2021, arXiv:2106.09685) computes

    y = x @ W0.T + scaling * (x @ A.T) @ B.T        x [M, K], W0 [N, K], A [r, K], B [N, r]
      = x @ (W0 + scaling * B @ A).T

The weight has to be dequantized before it is multiplied anyway. To add B @ A meanwhile costs 2 r operations a number on
tensor cores that are idle, and the bytes of A and B, a few hundredths of the weight's. It saves both skinny products
with all of x, the sum with all of y, and in the backward those for dx = dy @ W. (The gradients: `kernels/lora.py`.)

The other outputs that a step needs, from the same pass:

    transposed  W.T [K, N]
    FP8         round(W[i, j] / scale[i]) in e4m3 and scale [N], fp32, for a product with a scale a row

`kernels/fp8_scale.py` finds the scales, without a pass over W.

Casts: the dequantized number, its sum with the delta and the product with scaling are fp32, and W is rounded once,
when it is stored. B @ A is accumulated in fp32: 16-bit adapters are multiplied as they are, exactly. fp32 ones go as
sums of two numbers, in three products: of W's dtype if that has 16 bits (bfloat16 for FP8), which loses less than
2**-15 of a product (and 2**-25 of a factor, in float16); of TF32 for an fp32 W, less than 2**-21. With B = 0, W is
bit by bit what `dequantize_nf4` gives.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels import merged_lines
from fastkit.kernels.common import Cost, architecture, check_floats, device_of, on_triton, tl, triton
from fastkit.kernels.fp8_scale import FP8, check_fp8, lacks_fp8, launch_scale, reference_fp8, reference_scale
from fastkit.kernels.nf4 import (
    NF4Weight,
    code_values,
    dequantize_nf4,
    empty_nf4,
    kernel_arguments,
    spread,
    stored_bytes,
    word_absmax,
    words_sharing,
)
from fastkit.kernels.nf4 import launch as dequantize
from fastkit.kernels.nf4 import reference as dequantized

MAX_RANK = 256


def cost(N: int, K: int, r: int, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16) -> Cost:
    """The least work for W [N, K] of `dtype`, double quantized in blocks of 64, with an adapter of rank r."""
    moved = N * K * dtype.itemsize + stored_bytes(N * K) + r * (N + K) * adapter_dtype.itemsize
    if dtype == FP8:
        moved += 8 * N  # read the bounds, write the scales
    return Cost(moved, (2 * r + 3) * N * K)  # B @ A, * scaling, * absmax, +


def reference(weight: NF4Weight, A, B, scaling: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """W [N, K] in plain torch, with the same casts. To fp64 nothing is rounded: the tests' truth."""
    dtype = dtype or weight.dtype
    accurate = torch.promote_types(dtype, torch.float32)
    w = dequantized(weight, accurate)
    return (w if A is None else w + scaling * (B.to(accurate) @ A.to(accurate))).to(dtype)


@triton.jit
def _dot(b, a, delta, SPLIT: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr):
    """delta + b @ a. If SPLIT, both fp32, as sums of two numbers of PART; low @ low is too small to matter."""
    if SPLIT:
        b_high, a_high = b.to(PART), a.to(PART)
        b_low, a_low = (b - b_high.to(tl.float32)).to(PART), (a - a_high.to(tl.float32)).to(PART)
        delta = tl.dot(b_high, a_low, delta)
        delta = tl.dot(b_low, a_high, delta)
        delta = tl.dot(b_high, a_high, delta)
    else:
        delta = tl.dot(b, a, delta, input_precision=PRECISION)
    return delta


@triton.jit
def _delta(
    a_ptr, b_ptr, rows, cols, N, K, stride_ar, stride_bn,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """B @ A [BLOCK_N, BLOCK_K]."""
    delta = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for start in tl.range(0, RANK, BLOCK_R, num_stages=1):  # one turn up to rank 64, or 32 in fp32
        r = start + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        in_rank = r < RANK
        a = tl.load(a_ptr + r[:, None] * stride_ar + cols[None, :], mask=in_rank[:, None] & (cols < K), other=0.0)
        b = tl.load(b_ptr + rows[:, None] * stride_bn + r[None, :], mask=(rows < N)[:, None] & in_rank, other=0.0)
        delta = _dot(b, a, delta, SPLIT, PART, PRECISION)
    return delta


@triton.jit
def _merge_kernel(
    words_ptr, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, code_ptr,
    a_ptr, b_ptr, w_ptr, inverse_ptr,
    N, K, words_k, stride_ar, stride_bn, stride_wm, scaling,
    BLOCKSIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, SHARE: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr, TRANSPOSED: tl.constexpr, FP8: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program writes a tile of W, or of its transpose. Programs of a row are neighbours and share B in cache.

    It waits for memory once: words, absmax and adapters are all asked for before any is used. words_k = K / 8 is an
    argument for its divisibility, as in nf4.py.
    """
    blocks_k = tl.cdiv(K, BLOCK_K)
    first_row = (tl.program_id(0) // blocks_k).to(tl.int64) * BLOCK_N
    row, rows = tl.arange(0, BLOCK_N), first_row + tl.arange(0, BLOCK_N)  # [BLOCK_N]; * K can pass 2**31
    first_col = tl.program_id(0) % blocks_k * BLOCK_K
    cols = first_col + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    word = first_col // 8 + tl.arange(0, BLOCK_K // 8)  # [BLOCK_K / 8]
    shared = first_col // 8 + tl.arange(0, BLOCK_K // 8 // SHARE) * SHARE  # the first of each that share an absmax
    first_word, in_rows = first_row * words_k, (rows < N)[:, None]

    packed = tl.load(
        words_ptr + first_word + (row[:, None] * words_k + word[None, :]), mask=in_rows & (word < words_k), other=0
    )  # [BLOCK_N, BLOCK_K / 8]
    absmax = word_absmax(
        first_word, row[:, None] * words_k + shared[None, :], in_rows & (shared < words_k),
        absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, BLOCKSIZE, DOUBLE_QUANT,
    )  # fmt: skip
    code = tl.load(code_ptr + tl.arange(0, 16))
    if RANK > 0:
        delta = _delta(
            a_ptr, b_ptr, rows, cols, N, K, stride_ar, stride_bn, RANK, BLOCK_R, SPLIT,
            tl.bfloat16 if FP8 else w_ptr.dtype.element_ty, PRECISION,
        )  # fmt: skip
    absmax = spread(tl.reshape(absmax, [BLOCK_N * (BLOCK_K // 8 // SHARE)]), SHARE)
    w = code_values(tl.reshape(packed, [BLOCK_N * BLOCK_K // 8]), code) * absmax[:, None]
    w = tl.reshape(w, [BLOCK_N, BLOCK_K])
    if RANK > 0:
        w = tl.fma(delta, tl.full([BLOCK_N, BLOCK_K], scaling, tl.float32), w)

    if TRANSPOSED:
        w, out_rows, out_cols, M_OUT, N_OUT = tl.trans(w), cols.to(tl.int64), rows, K, N
    else:
        out_rows, out_cols, M_OUT, N_OUT = rows, cols, N, K
    if FP8:
        w *= tl.load(inverse_ptr + out_rows, mask=out_rows < M_OUT, other=0.0)[:, None]
    out = w_ptr + out_rows[:, None] * stride_wm + out_cols[None, :]
    tl.store(out, w.to(w_ptr.dtype.element_ty), mask=(out_rows < M_OUT)[:, None] & (out_cols < N_OUT)[None, :])


def _tiling(rank: int, fp32: bool, fp8: bool, transposed: bool, arch: str) -> dict[str, int]:
    """The fastest of some forty for 14336x4096 and rank 16 on an H100 that spill nothing: 0.069 ms, from fp32 adapters
    0.076, to FP8 0.055, where the plain dequantization takes 0.056. Small programs, of which an SM holds several; as
    one that transposes is slow with fewer than seven, its registers are limited."""
    BLOCK_R = min(64 if not fp32 else 32, max(16, 1 << (rank - 1).bit_length()))
    if transposed or fp32:
        fewer = {"maxnreg": 72} if arch == "sm_90" and not fp32 else {}
        return {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": BLOCK_R, "num_warps": 4} | fewer
    BLOCK_N = 32 if fp8 else 64
    return {"BLOCK_N": BLOCK_N, "BLOCK_K": 8192 // BLOCK_N, "BLOCK_R": BLOCK_R, "num_warps": 4}


def launch(weight, A, B, scaling, w, transposed=False, inverse=None, **tiling) -> None:
    """Write w [N, K], or [K, N] if `transposed`, whose rows may lie any stride apart. A and B may both be None.

    An FP8 w takes inverse [rows of w], fp32, of `launch_scale`. `tiling` overrides BLOCK_N and so on of _merge_kernel,
    which then runs; else `merged_lines` does, where it can.

    Raises NotImplementedError where there is no tensor core that Triton can use, or no FP8.
    """
    arch = architecture(w.device)
    if arch == "sm_75":
        raise NotImplementedError("merged_dequantize needs Triton's tensor cores, sm_80: use dequantize_nf4 and addmm_")
    if w.dtype == FP8:
        check_fp8("merged_dequantize", w.device)
    N, K = weight.shape
    if N * K == 0:
        return
    rank = 0 if A is None else A.shape[0]
    fp32 = A is not None and A.dtype == torch.float32
    split = fp32 and w.dtype != torch.float32 and not (w.dtype == FP8 and arch == "interpreter")  # it has no bfloat16
    if not tiling and merged_lines.takes(weight, A, B, w, transposed, arch):
        return merged_lines.launch(weight, A, B, scaling, w, transposed, inverse)
    tiling = _tiling(rank, fp32, w.dtype == FP8, transposed, arch) | tiling
    share = min(words_sharing(weight, K // 8), tiling["BLOCK_K"] // 8)
    grid = (-(-N // tiling["BLOCK_N"]) * -(-K // tiling["BLOCK_K"]),)
    with device_of(w):
        _merge_kernel[grid](
            *kernel_arguments(weight), weight.code, A, B, w, inverse,
            N, K, K // 8, 0 if A is None else A.stride(0), 0 if A is None else B.stride(0), w.stride(0), scaling,
            BLOCKSIZE=weight.blocksize, DOUBLE_QUANT=weight.offset is not None, SHARE=share,
            RANK=rank, TRANSPOSED=transposed, FP8=w.dtype == FP8, SPLIT=split,
            PRECISION="ieee" if arch.startswith("gfx") else "tf32x3", enable_fp_fusion=False, **tiling,
        )  # fmt: skip


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    N, K, r = 14336, 4096, 16  # Mistral-7B's gate and up
    empty = functools.partial(torch.empty, device="meta")
    weight = empty_nf4((N, K), dtype, device="meta")
    A, B = empty(r, K, dtype=dtype), empty(N, r, dtype=dtype)
    dense = functools.partial(launch, weight, A, B, 2.0, num_warps=4)  # said, so that _merge_kernel is meant
    return {
        f"merged {N}x{K}, rank {r}": functools.partial(dense, empty(N, K, dtype=dtype)),
        f"transposed {N}x{K}, rank {r}": functools.partial(dense, empty(K, N, dtype=dtype), True),
        f"FP8 {N}x{K}, rank {r}": functools.partial(dense, empty(N, K, dtype=FP8), False, empty(N)),
        f"FP8 {N}x{K}, rank {r} in fp32": functools.partial(
            launch, weight, A.float(), B.float(), 2.0, empty(N, K, dtype=FP8), False, empty(N)
        ),
        f"FP8 transposed {N}x{K}, rank {r} in fp32": functools.partial(
            launch, weight, A.float(), B.float(), 2.0, empty(K, N, dtype=FP8), True, empty(K)
        ),
        f"merged {N}x{K}, rank {r} in fp32": functools.partial(
            launch, weight, A.float(), B.float(), 2.0, empty(N, K, dtype=dtype)
        ),
    }


def _checked(op: str, weight: NF4Weight, A, B) -> tuple:
    """(A, B, both of one dtype and with neighbours in a row), or raise."""
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; give a matrix [N, K]")
    if (A is None) != (B is None):
        raise ValueError(f"{op}: one of A and B is None; give both or neither")
    if A is None:
        return None, None
    check_floats(op, A=A, B=B)
    (N, K), r = weight.shape, A.shape[0]
    if A.shape != (r, K) or B.shape != (N, r) or not 1 <= r <= MAX_RANK:
        raise ValueError(
            f"{op}: A has shape {tuple(A.shape)} and B {tuple(B.shape)}; "
            f"a weight [{N}, {K}] needs A [r, {K}] and B [{N}, r] of a rank r from 1 to {MAX_RANK}"
        )
    if A.device != weight.device:
        raise ValueError(f"{op}: A is on {A.device} but weight is on {weight.device}; move one to the other")
    dtype = A.dtype if A.dtype == B.dtype else torch.float32
    return tuple((x if x.stride(1) == 1 else x.contiguous()).detach().to(dtype) for x in (A, B))


def _check_out(op: str, out: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, weight: NF4Weight) -> None:
    if out.shape != shape or out.device != weight.device or out.stride(1) != 1 or out.dtype != dtype:
        raise ValueError(
            f"{op}: out is {tuple(out.shape)}, {out.dtype}, on {out.device}, with strides {out.stride()}; "
            f"give {shape}, {dtype}, on {weight.device}, with neighbours in a row"
        )


def _runs(op: str, weight: NF4Weight, w: torch.Tensor, A) -> bool:
    """Whether the kernel can take it: rows of whole words, and a device with what the kernel needs."""
    if not on_triton(op, "weight", w if A is None or A.dtype != torch.bfloat16 else A):
        return False
    if weight.shape[1] % 8 or architecture(w.device) == "sm_75":
        return False
    return w.dtype != FP8 or (w.device.type == "cuda" and not lacks_fp8(architecture(w.device)))


def _with_torch(weight: NF4Weight, A, B, scaling: float) -> torch.Tensor:
    """W [N, K] in fp32, dequantized by its kernel where there is one."""
    w = dequantize_nf4(weight, torch.float32)
    return w if A is None else w.addmm_(B.float(), A.float(), alpha=scaling)


def merged_dequantize(
    weight: NF4Weight, A=None, B=None, scaling: float = 1.0, *,
    dtype: torch.dtype | None = None, transposed: bool = False, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """dequantize(weight) + scaling * B @ A in one pass, rounded once (LoRA, arXiv:2106.09685).

    weight      an NF4Weight of shape [N, K]
    A, B        [r, K] and [N, r], float32, float16 or bfloat16, r from 1 to 256; or None, both, for the weight alone
    scaling     a number, alpha / r
    dtype       of the result, float32, float16 or bfloat16; by default that of the tensor that was quantized
    transposed  whether to return [K, N]
    out         where to write, such as rows of a stacked buffer; any stride between rows, none within them
    returns     [N, K] or [K, N]

    No gradient: those of A and B come of `lora_gradients`. Raises TypeError for another dtype, ValueError for shapes or
    devices that do not match, NotImplementedError for a device without kernels. CPU tensors, rows that are no
    multiple of 8 long, and GPUs before sm_80 take torch: the weight dequantized to fp32, and addmm.
    """
    A, B = _checked("merged_dequantize", weight, A, B)
    N, K = weight.shape
    shape = (K, N) if transposed else (N, K)
    if out is None:
        out = torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)
    check_floats("merged_dequantize", out=out)
    _check_out("merged_dequantize", out, shape, dtype or out.dtype, weight)
    if A is None and not transposed and out.is_contiguous() and on_triton("merged_dequantize", "weight", out):
        dequantize(weight, out)
    elif _runs("merged_dequantize", weight, out, A):
        launch(weight, A, B, float(scaling), out, transposed)
    else:
        w = _with_torch(weight, A, B, scaling)
        out.copy_(w.T if transposed else w)
    return out


def merged_dequantize_fp8(
    weight: NF4Weight, bound: torch.Tensor | None, A=None, B=None, scaling: float = 1.0, *, transposed: bool = False,
    scale: torch.Tensor | None = None, inverse: torch.Tensor | None = None, out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`merged_dequantize` in FP8 (e4m3), each row of the result divided by a scale of its own.

    weight, A, B, scaling, transposed   as in `merged_dequantize`
    bound    of the result's rows: the first of `weight_bounds(weight)`, the second if `transposed`; None with `scale`
    scale    the rows' scales, in fp32, such as `shared_scale`'s: for rows that run through several weights
    inverse  1 / scale, where that is known
    out      as in `merged_dequantize`, in e4m3
    returns  (w8 [N, K] or [K, N], scale [N] or [K] in fp32); w8 * scale is W, to the 4 significant bits of e4m3.
             For a product x @ W.T give torch._scaled_mm x8, w8.T, and scale as the scales of its columns.

    Raises as `merged_dequantize` does, and takes torch where that does; also on a CPU and on GPUs before sm_89.
    """
    op = "merged_dequantize_fp8"
    A, B = _checked(op, weight, A, B)
    N, K = weight.shape
    shape = (K, N) if transposed else (N, K)
    if (bound is None) == (scale is None):
        raise ValueError(f"{op}: give either bound or scale")
    name, given = ("bound", bound) if scale is None else ("scale", scale)
    check_floats(op, **{name: given})
    if given.shape != shape[:1] or given.device != weight.device:
        raise ValueError(f"{op}: {name} has shape {tuple(given.shape)}, on {given.device}; use weight_bounds(weight)")
    w8 = torch.empty(shape, dtype=FP8, device=weight.device) if out is None else out
    _check_out(op, w8, shape, FP8, weight)
    if not _runs(op, weight, w8, A):
        w = _with_torch(weight, A, B, scaling)
        if transposed:
            w, A, B = w.T, *((B.T, A.T) if A is not None else (None, None))
        scale = reference_scale(bound, A, B, scaling) if scale is None else scale
        w8.copy_(reference_fp8(w, scale))
        return w8, scale
    if scale is None:
        scale, inverse = torch.empty(2, shape[0], device=weight.device)
        launch_scale(bound, A, B, float(scaling), scale, inverse, transposed)
    elif inverse is None:
        inverse = scale.reciprocal()
    launch(weight, A, B, float(scaling), w8, transposed, inverse)
    return w8, scale
