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

e4m3 ends at 448 and has 3 bits of mantissa at any size, so a scale must keep its row in range but need not be tight. To
find a row's largest number would take a pass of its own. We take an upper bound: |CODE| <= 1 and so

    |W[i, j]|  <=  bound[i]  =  max of absmax over row i  +  |scaling| * sum_r |B[i, r]| * max_j |A[r, j]|
    scale[i]    =  bound[i] / 448

The first term never changes (`weight_bounds`, once a weight), the second is made of what the pass has at hand. For W.T
the same holds with rows and columns, A and B exchanged.

Casts: the dequantized number, its sum with the delta and the product with scaling are fp32, and W is rounded once, when
it is stored. B @ A is accumulated in fp32: 16-bit adapters are multiplied as they are, exactly; fp32 ones on tensor
cores too, each as three products of TF32 parts, which lose less than 2**-21. With B = 0, W is bit by bit what
`dequantize_nf4` gives.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels.common import Cost, architecture, check_floats, device_of, on_triton, tl, triton
from fastkit.kernels.nf4 import (
    NF4Weight,
    code_values,
    dequantize_nf4,
    empty_nf4,
    kernel_arguments,
    reference_absmax,
    stored_bytes,
    word_absmax,
)
from fastkit.kernels.nf4 import reference as dequantized

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
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


def reference_fp8(w: torch.Tensor, bound: torch.Tensor, A, B, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(w / scale in e4m3, scale [rows]) of w in fp32 in plain torch; A [r, columns], B [rows, r], bound [rows]."""
    if A is not None:
        bound = bound + abs(scaling) * (B.float().abs() @ A.float().abs().amax(1))
    bound = bound.clamp(min=1e-30)
    return (w * (FP8_MAX / bound)[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), bound / FP8_MAX


def weight_bounds(weight: NF4Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [N], columns [K]): the largest absmax, in fp32, of the blocks that reach into each row and column.

    For `merged_dequantize_fp8`. Computed once: a quantized weight never changes.
    """
    N, K = weight.shape
    absmax = reference_absmax(weight).abs()  # offset and code may round a small one below zero
    number = torch.arange(0, N * K, 8 if K % 8 == 0 else 1, device=weight.device)
    each = absmax[number // weight.blocksize].view(N, -1)
    return each.amax(1), each.amax(0).repeat_interleave(K // each.shape[1])


@triton.jit
def _delta(
    a_ptr, b_ptr, largest_ptr, rows, cols, N, K, stride_ar, stride_bn,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, TRANSPOSED: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(B @ A [BLOCK_N, BLOCK_K], a bound of each row's, or column's, magnitudes)."""
    delta = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    bound = tl.zeros([cols.shape[0] if TRANSPOSED else rows.shape[0]], tl.float32)
    for start in tl.range(0, RANK, BLOCK_R, num_stages=1):  # one turn up to rank 64, or 32 in fp32
        r = start + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        in_rank = r < RANK
        a = tl.load(a_ptr + r[:, None] * stride_ar + cols[None, :], mask=in_rank[:, None] & (cols < K), other=0.0)
        b = tl.load(b_ptr + rows[:, None] * stride_bn + r[None, :], mask=(rows < N)[:, None] & in_rank, other=0.0)
        delta = tl.dot(b, a, delta, input_precision=PRECISION)
        if FP8:
            largest = tl.load(largest_ptr + r, mask=in_rank, other=0.0).to(tl.float32)
            if TRANSPOSED:
                bound += tl.sum(tl.abs(a.to(tl.float32)) * largest[:, None], axis=0)
            else:
                bound += tl.sum(tl.abs(b.to(tl.float32)) * largest[None, :], axis=1)
    return delta, bound


@triton.jit
def _merge_kernel(
    words_ptr, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, code_ptr,
    a_ptr, b_ptr, w_ptr, bound_ptr, largest_ptr, scale_ptr,
    N, K, words_k, stride_ar, stride_bn, stride_wm, scaling,
    BLOCKSIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    TRANSPOSED: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program writes a tile of W, or of its transpose. Programs of a row are neighbours and share B in cache.

    words_k = K / 8 is an argument for its divisibility, as in nf4.py.
    """
    blocks_k = tl.cdiv(K, BLOCK_K)
    first_row = (tl.program_id(0) // blocks_k).to(tl.int64) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_N)  # [BLOCK_N]; * K can pass 2**31
    first_col = tl.program_id(0) % blocks_k * BLOCK_K
    cols = first_col + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    word_cols = first_col // 8 + tl.arange(0, BLOCK_K // 8)  # [BLOCK_K / 8]
    first_word, words = first_row * words_k, tl.arange(0, BLOCK_N)[:, None] * words_k + word_cols[None, :]
    mask = (rows < N)[:, None] & (word_cols < words_k)[None, :]

    packed = tl.load(words_ptr + first_word + words, mask=mask, other=0)  # [BLOCK_N, BLOCK_K / 8]
    absmax = word_absmax(
        first_word, words, mask, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, BLOCKSIZE, DOUBLE_QUANT
    )
    code = tl.load(code_ptr + tl.arange(0, 16))
    values = code_values(tl.reshape(packed, [BLOCK_N * BLOCK_K // 8]), code)
    w = tl.reshape(values, [BLOCK_N, BLOCK_K // 8, 8]) * absmax[:, :, None]
    w = tl.reshape(w, [BLOCK_N, BLOCK_K])

    if RANK > 0:
        delta, adapter_bound = _delta(
            a_ptr, b_ptr, largest_ptr, rows, cols, N, K, stride_ar, stride_bn,
            RANK, BLOCK_R, TRANSPOSED, FP8, PRECISION,
        )  # fmt: skip
        w = tl.fma(delta, tl.full([BLOCK_N, BLOCK_K], scaling, tl.float32), w)

    if TRANSPOSED:
        w, out_rows, out_cols, M_OUT, N_OUT = tl.trans(w), cols.to(tl.int64), rows, K, N
    else:
        out_rows, out_cols, M_OUT, N_OUT = rows, cols, N, K
    if FP8:
        bound = tl.load(bound_ptr + out_rows, mask=out_rows < M_OUT, other=1.0)
        if RANK > 0:
            bound += tl.abs(scaling) * adapter_bound
        bound = tl.maximum(bound, 1e-30)  # a row of zeros
        w *= (448.0 / bound)[:, None]
        once = first_col == 0 if not TRANSPOSED else tl.program_id(0) < blocks_k
        tl.store(scale_ptr + out_rows, bound / 448.0, mask=(out_rows < M_OUT) & once)  # one writer a row
    out = w_ptr + out_rows[:, None] * stride_wm + out_cols[None, :]
    tl.store(out, w.to(w_ptr.dtype.element_ty), mask=(out_rows < M_OUT)[:, None] & (out_cols < N_OUT)[None, :])


def _tiling(rank: int, fp32: bool) -> dict[str, int]:
    """8192 numbers a program, 32 a thread: loads under way enough, in registers so few that an SM holds several."""
    BLOCK_R = min(64 if not fp32 else 32, max(16, 1 << (rank - 1).bit_length()))
    return {"BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_R": BLOCK_R, "num_warps": 8}


def launch(weight, A, B, scaling, w, transposed=False, bound=None, largest=None, scale=None, **tiling) -> None:
    """Write w [N, K], or [K, N] if `transposed`, whose rows may lie any stride apart. A and B may both be None.

    For an FP8 w: bound is of `weight_bounds`, for the rows of w; largest [r] are the largest magnitudes of A's rows, of
    B's columns if `transposed`; and scale [rows of w], fp32, is written. `tiling` overrides BLOCK_N and so on.

    Raises NotImplementedError where there is no tensor core that Triton can use, or no FP8.
    """
    arch = architecture(w.device)
    if arch == "sm_75":
        raise NotImplementedError("merged_dequantize needs Triton's tensor cores, sm_80: use dequantize_nf4 and addmm_")
    if w.dtype == FP8 and arch in ("sm_80", "sm_86", "gfx942", "gfx1100"):
        raise NotImplementedError(f"merged_dequantize writes FP8 from sm_89 on and this is {arch}: use bfloat16")
    N, K = weight.shape
    if N * K == 0:
        return
    rank = 0 if A is None else A.shape[0]
    fp32 = A is not None and torch.float32 in (A.dtype, B.dtype)
    tiling = _tiling(rank, fp32) | tiling
    grid = (-(-N // tiling["BLOCK_N"]) * -(-K // tiling["BLOCK_K"]),)
    with device_of(w):
        _merge_kernel[grid](
            *kernel_arguments(weight), weight.code, A, B, w, bound, largest, scale,
            N, K, K // 8, 0 if A is None else A.stride(0), 0 if A is None else B.stride(0), w.stride(0), scaling,
            BLOCKSIZE=weight.blocksize, DOUBLE_QUANT=weight.offset is not None, RANK=rank, TRANSPOSED=transposed,
            FP8=w.dtype == FP8, PRECISION="ieee" if arch.startswith("gfx") else "tf32x3",
            enable_fp_fusion=False, **tiling,
        )  # fmt: skip


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    N, K, r = 14336, 4096, 16  # Mistral-7B's gate and up
    empty = functools.partial(torch.empty, device="meta")
    weight = empty_nf4((N, K), dtype, device="meta")
    A, B = empty(r, K, dtype=dtype), empty(N, r, dtype=dtype)
    dense = functools.partial(launch, weight, A, B, 2.0)
    fp8 = {"bound": empty(N), "largest": empty(r, dtype=dtype), "scale": empty(N)}
    return {
        f"merged {N}x{K}, rank {r}": functools.partial(dense, empty(N, K, dtype=dtype)),
        f"transposed {N}x{K}, rank {r}": functools.partial(dense, empty(K, N, dtype=dtype), True),
        f"FP8 {N}x{K}, rank {r}": functools.partial(dense, empty(N, K, dtype=FP8), False, **fp8),
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


def _runs(op: str, weight: NF4Weight, w: torch.Tensor, A) -> bool:
    """Whether the kernel can take it: rows of whole words, and a device with what the kernel needs."""
    if not on_triton(op, "weight", w if A is None or A.dtype != torch.bfloat16 else A):
        return False
    if weight.shape[1] % 8 or architecture(w.device) == "sm_75":
        return False
    return w.dtype != FP8 or (w.device.type == "cuda" and architecture(w.device) not in ("sm_80", "sm_86"))


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
    if out.shape != shape or out.device != weight.device or out.stride(1) != 1 or dtype not in (None, out.dtype):
        raise ValueError(
            f"merged_dequantize: out is {tuple(out.shape)}, {out.dtype}, on {out.device}, with strides {out.stride()}; "
            f"give {shape}, {dtype or out.dtype}, on {weight.device}, with neighbours in a row"
        )
    if _runs("merged_dequantize", weight, out, A):
        launch(weight, A, B, float(scaling), out, transposed)
    else:
        w = _with_torch(weight, A, B, scaling)
        out.copy_(w.T if transposed else w)
    return out


def merged_dequantize_fp8(
    weight: NF4Weight, bound: torch.Tensor, A=None, B=None, scaling: float = 1.0, *, transposed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`merged_dequantize` in FP8 (e4m3), each row of the result divided by a scale of its own.

    weight, A, B, scaling, transposed   as in `merged_dequantize`
    bound    of the result's rows: the first of `weight_bounds(weight)`, the second if `transposed`
    returns  (w8 [N, K] or [K, N], scale [N] or [K] in fp32); w8 * scale is W, to the 4 significant bits of e4m3.
             For a product x @ W.T give torch._scaled_mm x8, w8.T, and scale as the scales of its columns.

    Raises as `merged_dequantize` does, and takes torch where that does; also on a CPU and on GPUs before sm_89.
    """
    A, B = _checked("merged_dequantize_fp8", weight, A, B)
    N, K = weight.shape
    shape = (K, N) if transposed else (N, K)
    check_floats("merged_dequantize_fp8", bound=bound)
    if bound.shape != shape[:1] or bound.device != weight.device:
        raise ValueError(f"merged_dequantize_fp8: bound has shape {tuple(bound.shape)}; use weight_bounds(weight)")
    w8 = torch.empty(shape, dtype=FP8, device=weight.device)
    if not _runs("merged_dequantize_fp8", weight, w8, A):
        w = _with_torch(weight, A, B, scaling)
        if transposed:
            w, A, B = w.T.contiguous(), *((B.T, A.T) if A is not None else (None, None))
        return reference_fp8(w, bound, A, B, scaling)
    scale, largest = torch.empty(shape[0], device=weight.device), None
    if A is not None:
        largest = B.abs().amax(0) if transposed else A.abs().amax(1)
    launch(weight, A, B, float(scaling), w8, transposed, bound, largest, scale)
    return w8, scale
