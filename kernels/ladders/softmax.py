"""Softmax over rows, the ladder of passes: y = exp(x - max) / sum(exp(x - max)), row by row.

Its arithmetic is a few operations a number; what it costs is reading and writing rows. The maximum must be known before
the first exponential is taken, without which exp(89) overflows fp32, and the sum before the first result is written. So
a row is wanted three times, and the rungs differ in where it is in the meantime:

three_pass  Read from memory three times: for the maximum, for the sum, for the result. 4 transfers where 2 are due.
online      Maximum and sum in one pass (Milakov & Gimelshein 2018, arXiv:1805.02867). When the running maximum grows,
            what has been summed so far is scaled down to the new one. 3 transfers, for rows of any length.
persistent  The row stays in registers from its first load to its last store: 2 transfers, as little as can be, for rows
            that fit there. A program handles row after row, and the next one's load leaves before this one is done, so
            that memory works while the program waits for its reductions.
fused       The same with a program a row, and no plan at all: an SM holds several, and while one waits for a reduction
            the others load. The hardware overlaps them better than the loop did (H100, 4096x16384: 0.183 ms, 0.192).

A row of -inf alone, or one that holds inf or nan, gives nan, as in torch.

Casts: every load is converted to fp32 at once and all arithmetic is fp32; a result is rounded once, when it is stored.
"""

import torch

from fastkit.kernels.common import Cost, as_rows, check_floats, on_triton, sm_count, tl, triton
from fastkit.kernels.ladders.rung import Rung, best, find
from fastkit.kernels.ladders.rung import examples as rung_examples

MAX_N = 32768  # longest row that registers hold: 64 numbers a thread in the largest program


def cost(M: int, N: int, dtype=torch.float32) -> Cost:
    """The least work for M rows of N numbers of `dtype`."""
    return Cost(
        bytes_moved=2 * M * N * dtype.itemsize,  # read x, write y
        flops=5 * M * N,  # maximum, difference, exp, sum, division
    )


def reference(x: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, with the same casts. fp64 stays fp64: the tests' truth."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).to(x.dtype)


@triton.jit
def _three_pass_kernel(x_ptr, y_ptr, N, stride_xm, stride_ym, BLOCK_N: tl.constexpr):
    """One program writes one row, BLOCK_N numbers at a time."""
    row = tl.program_id(0).to(tl.int64)  # row * stride can pass 2**31
    x_ptr += row * stride_xm
    y_ptr += row * stride_ym
    lanes = tl.arange(0, BLOCK_N)  # [BLOCK_N]

    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)  # of each lane's numbers; the row's at the end
    for start in range(0, N, BLOCK_N):
        cols = start + lanes
        x = tl.load(x_ptr + cols, mask=cols < N, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
    row_max = tl.max(largest, axis=0)

    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + lanes
        x = tl.load(x_ptr + cols, mask=cols < N, other=float("-inf")).to(tl.float32)
        sums += tl.exp(x - row_max)
    inverse = 1.0 / tl.sum(sums, axis=0)  # one division a row

    for start in range(0, N, BLOCK_N):
        cols = start + lanes
        x = tl.load(x_ptr + cols, mask=cols < N, other=float("-inf")).to(tl.float32)
        y = tl.exp(x - row_max) * inverse
        tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def _fused_kernel(x_ptr, y_ptr, N, stride_xm, stride_ym, BLOCK_N: tl.constexpr):
    """One program writes one row, all of which it holds: BLOCK_N >= N."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = cols < N
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=float("-inf")).to(tl.float32)
    exp = tl.exp(x - tl.max(x, axis=0))
    y = exp * (1.0 / tl.sum(exp, axis=0))
    tl.store(y_ptr + row * stride_ym + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _online_kernel(x_ptr, y_ptr, N, stride_xm, stride_ym, BLOCK_N: tl.constexpr):
    """One program writes one row, BLOCK_N numbers at a time."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    y_ptr += row * stride_ym
    lanes = tl.arange(0, BLOCK_N)  # [BLOCK_N]

    row_max = float("-inf")
    sums = tl.zeros([BLOCK_N], tl.float32)  # of each lane's exp(x - row_max)
    for start in range(0, N, BLOCK_N):
        cols = start + lanes
        x = tl.load(x_ptr + cols, mask=cols < N, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf alone so far: exp(-inf - 0) = 0, and no nan
        sums = sums * tl.exp(row_max - base) + tl.exp(x - base)
        row_max = new_max
    inverse = 1.0 / tl.sum(sums, axis=0)  # one division a row

    for start in range(0, N, BLOCK_N):
        cols = start + lanes
        x = tl.load(x_ptr + cols, mask=cols < N, other=float("-inf")).to(tl.float32)
        y = tl.exp(x - row_max) * inverse
        tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def _persistent_kernel(x_ptr, y_ptr, M, N, stride_xm, stride_ym, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
    """One program writes rows i, i + programs, ..., with STAGES - 1 of them loading ahead into shared memory."""
    cols = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = cols < N
    for row in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=float("-inf")).to(tl.float32)
        exp = tl.exp(x - tl.max(x, axis=0))
        y = exp * (1.0 / tl.sum(exp, axis=0))
        tl.store(y_ptr + row * stride_ym + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def _fused_tiling(N: int) -> dict[str, int]:
    """The row in one block, 32 numbers a thread if 16 warps will do: enough loads under way, few enough to be held."""
    BLOCK_N = triton.next_power_of_2(N)
    return {"BLOCK_N": BLOCK_N, "num_warps": min(max(BLOCK_N // 1024, 1), 16)}


def launch_three_pass(x, y, BLOCK_N: int = 1024, num_warps: int = 4) -> None:
    M, N = x.shape
    _three_pass_kernel[(M,)](x, y, N, x.stride(0), y.stride(0), BLOCK_N=BLOCK_N, num_warps=num_warps)


def launch_fused(x, y, **tiling) -> None:
    M, N = x.shape
    _fused_kernel[(M,)](x, y, N, x.stride(0), y.stride(0), **_fused_tiling(N) | tiling)


def launch_online(x, y, BLOCK_N: int = 4096, num_warps: int = 8) -> None:
    M, N = x.shape
    _online_kernel[(M,)](x, y, N, x.stride(0), y.stride(0), BLOCK_N=BLOCK_N, num_warps=num_warps)


def launch_persistent(x, y, programs: int | None = None, STAGES: int | None = None, **tiling) -> None:
    """By default one row loads ahead if it takes up to 64 KiB of shared memory, and each SM holds 32 warps.

    programs  the number of programs an SM is given
    """
    M, N = x.shape
    tiling = _fused_tiling(N) | tiling
    STAGES = STAGES or (2 if tiling["BLOCK_N"] * x.element_size() <= 2**16 else 1)
    programs = programs or 32 // tiling["num_warps"]
    grid = (min(M, programs * sm_count(x.device)),)
    _persistent_kernel[grid](x, y, M, N, x.stride(0), y.stride(0), STAGES=STAGES, **tiling)


def _too_long(x, y) -> str:
    N = x.shape[1]
    return f"holds a row in registers, up to {MAX_N} numbers, and x has rows of {N}: use 'online'" if N > MAX_N else ""


RUNGS = (
    Rung("three_pass", "each row is read three times, for maximum, sum and result: 4 transfers", launch_three_pass),
    Rung("online", "maximum and sum in one pass, for rows of any length: 3 transfers", launch_online),
    Rung(
        "persistent", "the row stays in registers, 2 transfers, and the next one loads while it is reduced",
        launch_persistent, refuses=_too_long,
    ),
    Rung("fused", "a program a row: the hardware overlaps loads and reductions", launch_fused, refuses=_too_long),
)  # fmt: skip


def examples(dtype=torch.bfloat16):
    """The launches for `fastkit compile`, at the sizes that are benchmarked."""
    short, long = (
        rung_examples(RUNGS, f"4096x{N}", *(torch.empty(4096, N, device="meta") for _ in range(2)))
        for N in (4096, 16384)
    )
    return short | long


def softmax(x: torch.Tensor, rung: str | None = None) -> torch.Tensor:
    """Softmax over the last dimension, by one of RUNGS (None: the last that takes x's rows).

    x        [..., N], N >= 1, float32, float16 or bfloat16. Contiguous tensors and column slices of them are read in
             place, other layouts copied first.
    returns  [..., N], contiguous, in x's dtype. Arithmetic is fp32 with one rounding at the end.

    Not differentiable: a ladder is for measuring. Raises TypeError for another dtype, ValueError for x without rows,
    rows too long for the rung or a rung that there is not, NotImplementedError for a device without kernels. CPU
    tensors take `reference` (see `on_triton`).
    """
    check_floats("softmax", x=x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"softmax: x has shape {tuple(x.shape)}; give rows of at least one number")
    chosen = find("softmax", RUNGS, rung)
    if not on_triton("softmax", "x", x):
        return reference(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, y_rows = as_rows(x), as_rows(y)
    (chosen or best(RUNGS, rows, y_rows)).launch(rows, y_rows)
    return y
