"""The scales of a weight with its LoRA adapter that `kernels/merged_dequantize.py` is yet to write in FP8 (e4m3).

e4m3 ends at 448 and has 3 bits of mantissa at any size, so a scale must keep its row in range but need not be tight. To
find a row's largest number would take a pass of its own. We take an upper bound: |CODE| <= 1 and so

    |W[i, j]|  <=  bound[i]  =  max of absmax over row i  +  |scaling| * sum_r |B[i, r]| * max_j |A[r, j]|
    scale[i]    =  bound[i] / 448

The first term never changes (`weight_bounds`, once a weight). The second is made of the adapters alone, hundredths of
the weight's bytes, in two small launches. For W.T the same holds with rows and columns, A and B exchanged.

A coarser bound serves several weights at once, both ways round, in two launches for all (`shared_scale`):

    |W[i, j]|  <=  max of absmax  +  |scaling| * r * max |B| * max |A|

It costs no bit: e4m3 is as fine, relative to a number, down to 1/28672 of the largest.

Casts: all arithmetic is fp32, products rounded before they are added (enable_fp_fusion=False), so that the lanes that
share a row agree in its scale to the last bit.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels.common import Cost, architecture, check_floats, device_of, fp32, on_triton, tl, triton
from fastkit.kernels.nf4 import NF4Weight, reference_absmax

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
PARTS = 32  # programs that look for the largest numbers of a factor


def cost(N: int, K: int, r: int, dtype=torch.bfloat16) -> Cost:
    """The least work for A [r, K] and B [N, r]: read both and bound [N], write scale and its inverse."""
    return Cost(r * (N + K) * dtype.itemsize + 12 * N, r * (3 * N + 2 * K) + 2 * N)


def lacks_fp8(arch: str) -> bool:
    """Whether `arch`, of `architecture`, has no e4m3: NVIDIA's before sm_89, and AMD's, whose e4m3 is another."""
    return arch.startswith("gfx") or (arch.startswith("sm_") and int(arch.removeprefix("sm_")) < 89)


def check_fp8(op: str, device: torch.device) -> None:
    """For launches: raise NotImplementedError where the kernel cannot be compiled to e4m3."""
    if lacks_fp8(arch := architecture(device)):
        raise NotImplementedError(f"{op} writes FP8 from sm_89 on and this is {arch}: use bfloat16")


def reference_scale(bound: torch.Tensor, A, B, scaling: float) -> torch.Tensor:
    """scale [rows] in plain torch; A [r, columns], B [rows, r], bound [rows]."""
    if A is not None:
        bound = bound + abs(scaling) * (B.float().abs() @ A.float().abs().amax(1))
    return bound.clamp(min=1e-30) / FP8_MAX


def reference_fp8(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """w / scale in e4m3, of w [rows, columns] in fp32, in plain torch."""
    return (w * (1 / scale)[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def reference_shared(bound: float, A: torch.Tensor, B: torch.Tensor, gain: float) -> torch.Tensor:
    """The scale of `shared_scale`, fp32, no dimensions, in plain torch."""
    a, b = (x.float().abs().amax() if x.numel() else torch.zeros((), device=x.device) for x in (A, B))
    return (bound + gain * a * b).clamp(min=1e-30) / FP8_MAX


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
def row_scale(largest):
    """(scale, 1 / scale) of rows whose largest magnitudes are `largest`, in fp32."""
    scale = tl.maximum(largest, 1e-30) / 448.0  # a row of zeros
    return scale, 1.0 / scale


@triton.jit
def _largest_kernel(
    x_ptr, largest_ptr,
    N, stride_xn, stride_xr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The largest |x[n, r]| over n, of every num_programs-th tile of x [N, RANK]: largest [num_programs, RANK]."""
    r = tl.arange(0, BLOCK_R)
    largest = tl.zeros([BLOCK_R], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_N, N, tl.num_programs(0) * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & (r < RANK)[None, :]
        x = tl.load(x_ptr + n[:, None] * stride_xn + r[None, :] * stride_xr, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), axis=0))
    tl.store(largest_ptr + tl.program_id(0) * RANK + r, largest, mask=r < RANK)


@triton.jit
def _scale_kernel(
    bound_ptr, x_ptr, largest_ptr, scale_ptr, inverse_ptr,
    N, stride_xn, stride_xr, scaling,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """scale = (bound + |scaling| * sum over r of |x[n, r]| * largest[r]) / 448 for BLOCK_N rows of x [N, RANK].

    And its inverse, so that nothing is divided where the weight is written.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bound = tl.load(bound_ptr + n, mask=n < N, other=1.0)
    if RANK > 0:
        r = tl.arange(0, BLOCK_R)
        parts = tl.arange(0, PARTS)[:, None] * RANK + r[None, :]
        largest = tl.max(tl.load(largest_ptr + parts, mask=(r < RANK)[None, :], other=0.0), axis=0)
        mask = (n < N)[:, None] & (r < RANK)[None, :]
        x = tl.load(x_ptr + n[:, None] * stride_xn + r[None, :] * stride_xr, mask=mask, other=0.0).to(tl.float32)
        bound += tl.abs(fp32(scaling)) * tl.sum(tl.abs(x) * largest[None, :], axis=1)
    scale = tl.maximum(bound, 1e-30) / 448.0  # a row of zeros
    tl.store(scale_ptr + n, scale, mask=n < N)
    tl.store(inverse_ptr + n, 1.0 / scale, mask=n < N)


@triton.jit
def _largest(x_ptr, N, BLOCK_N: tl.constexpr):
    """max |x| of every num_programs-th block of x [N]."""
    largest = tl.zeros([BLOCK_N], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_N, N, tl.num_programs(0) * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        largest = tl.maximum(largest, tl.abs(tl.load(x_ptr + n, mask=n < N, other=0.0).to(tl.float32)))
    return tl.max(largest, axis=0)


@triton.jit
def _factors_kernel(a_ptr, b_ptr, largest_ptr, N_A, N_B, BLOCK_N: tl.constexpr):
    """What `_largest` finds in a [N_A] and in b [N_B]: largest [2, num_programs]."""
    tl.store(largest_ptr + tl.program_id(0), _largest(a_ptr, N_A, BLOCK_N))
    tl.store(largest_ptr + tl.num_programs(0) + tl.program_id(0), _largest(b_ptr, N_B, BLOCK_N))


@triton.jit
def _shared_kernel(
    largest_ptr, scale_ptr, inverse_ptr, N, bound, gain, PARTS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """scale = (bound + gain * max |a| * max |b|) / 448, and its inverse, N times each: a scale a row, all the same."""
    parts, n = tl.arange(0, PARTS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    a, b = tl.max(tl.load(largest_ptr + parts), axis=0), tl.max(tl.load(largest_ptr + PARTS + parts), axis=0)
    scale = tl.maximum(fp32(bound) + fp32(gain) * a * b, tl.full([BLOCK_N], 1e-30, tl.float32)) / 448.0
    tl.store(scale_ptr + n, scale, mask=n < N)
    tl.store(inverse_ptr + n, 1.0 / scale, mask=n < N)


def launch_shared(bound: float, A, B, gain: float, scale, inverse) -> None:
    """Write scale and inverse [rows], fp32, all entries the same, of A and B, contiguous."""
    with device_of(scale):
        parts = 4 * PARTS
        largest = torch.empty(2, parts, device=scale.device)
        _factors_kernel[(parts,)](A, B, largest, A.numel(), B.numel(), 2048)
        _shared_kernel[(-(-scale.numel() // 2048),)](largest, scale, inverse, scale.numel(), bound, gain, parts, 2048)


def launch_scale(bound, A, B, scaling, scale, inverse, transposed=False) -> None:
    """Write scale and inverse [rows of the result], fp32, given bound of `weight_bounds` for the same rows."""
    x, y = (None, None) if A is None else (A.T, B) if transposed else (B, A.T)  # [rows, r], [columns, r]
    rank = 0 if A is None else A.shape[0]
    BLOCK_R = 1 << max(rank - 1, 0).bit_length()
    with device_of(scale):
        largest = None
        if rank:
            largest = torch.empty(PARTS, rank, device=scale.device)
            _largest_kernel[(PARTS,)](y, largest, y.shape[0], *y.stride(), rank, BLOCK_R, 4096 // BLOCK_R)
        _scale_kernel[(-(-bound.shape[0] // 128),)](
            bound, x, largest, scale, inverse, bound.shape[0], *((0, 0) if x is None else x.stride()), scaling,
            rank, BLOCK_R, PARTS, 128, enable_fp_fusion=False,
        )  # fmt: skip


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    N, K, r = 14336, 4096, 16  # Mistral-7B's gate and up
    empty = functools.partial(torch.empty, device="meta")
    A, B = empty(r, K, dtype=dtype), empty(N, r, dtype=dtype)
    return {
        f"rows of {N}x{K}, rank {r}": lambda: launch_scale(empty(N), A, B, 2.0, empty(N), empty(N)),
        f"one for {N}x{K}, rank {r}": lambda: launch_shared(0.1, A, B, 32.0, empty(N), empty(N)),
    }


def shared_scale(
    bound: float, A: torch.Tensor, B: torch.Tensor, gain: float, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for several weights with their adapters, as a scale a row for `merged_dequantize_fp8`.

    bound    the largest absmax of all of them
    A, B     all numbers of their A, and of their B, of any shape, float32, float16 or bfloat16; may be empty
    gain     the largest |scaling| * rank among them (of one with several adapters, their sum)
    rows     how many rows to write it for
    returns  (scale, 1 / scale), both [rows], fp32, all entries the same

    Raises TypeError for another dtype. CPU tensors take torch.
    """
    check_floats("shared_scale", A=A, B=B)
    if not on_triton("shared_scale", "A", A):
        scale = reference_shared(bound, A, B, gain).expand(rows).contiguous()
        return scale, 1 / scale
    scale, inverse = torch.empty(2, rows, device=A.device)
    launch_shared(float(bound), A.contiguous(), B.contiguous(), float(gain), scale, inverse)
    return scale, inverse
