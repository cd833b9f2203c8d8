"""Add and normalise, the ladder of fusion: h = x + residual, y = h / sqrt(mean(h²) + EPS), row by row.

Every half of a transformer's layer begins so. The arithmetic is nothing; what costs is how often rows travel between
memory and the multiprocessors, and that is decided by where one kernel ends and the next begins:

parts  Three kernels, as three lines of torch would have it: the sum (2 rows read, 1 written), the mean of squares
       (1 read), the quotient (1 read, 1 written). 6 transfers of a row where 3 are due.
pairs  The program that adds a row has it in registers: it takes the mean of squares there and then. 5 transfers.
fused  The program that knows the mean of squares still has the row: it divides at once. x and the residual are read,
       y is written: 3 transfers, and there is nothing left to save.

How blocks are cut and how many warps share one changes what share of the bandwidth a kernel reaches, never how many
bytes it moves. The library's own, with a weight, both outputs and a backward: kernels/add_rms_norm.py.

Casts: every load is converted to fp32 at once and all arithmetic is fp32. What a kernel hands to the next is rounded to
the dtype of x on its way through memory; the fused rung rounds once, at the end.
"""

import torch

from fastkit.kernels.common import Cost, as_rows, check_floats, on_triton, tl, triton
from fastkit.kernels.ladders.add import check_pair, launch_grid
from fastkit.kernels.ladders.rung import Rung, find
from fastkit.kernels.ladders.rung import examples as rung_examples

EPS = 1e-6  # keeps rows of zeros from dividing by zero
MAX_N = 32768  # longest row that registers hold


def cost(M: int, N: int, dtype=torch.float32) -> Cost:
    """The least work for M rows of N numbers of `dtype`."""
    return Cost(
        bytes_moved=3 * M * N * dtype.itemsize,  # read x, residual; write y
        flops=4 * M * N,  # sum, square, its sum, product
    )


def reference(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, rounded once. fp64 stays fp64: the tests' truth."""
    accurate = torch.promote_types(x.dtype, torch.float32)
    h = x.to(accurate) + residual.to(accurate)
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


@triton.jit
def _mean_square_kernel(h_ptr, rstd_ptr, N, EPS: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program writes 1 / sqrt(mean(h²) + EPS) of one row."""
    row = tl.program_id(0).to(tl.int64)  # row * N can pass 2**31
    cols = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    h = tl.load(h_ptr + row * N + cols, mask=cols < N, other=0.0).to(tl.float32)
    tl.store(rstd_ptr + row, tl.rsqrt(tl.sum(h * h, axis=0) / N + EPS))


@triton.jit
def _divide_kernel(h_ptr, rstd_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    """One program writes one row of y. y may be h itself."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = cols < N
    h = tl.load(h_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    y = h * tl.load(rstd_ptr + row)
    tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_square_kernel(
    x_ptr, residual_ptr, h_ptr, rstd_ptr,
    N,
    EPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program writes one row of h = x + residual, and 1 / sqrt(mean(h²) + EPS) of it."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = cols < N
    x = tl.load(x_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    stored = (x + residual).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + row * N + cols, stored, mask=mask)
    h = stored.to(tl.float32)  # the mean is taken of what will be divided
    tl.store(rstd_ptr + row, tl.rsqrt(tl.sum(h * h, axis=0) / N + EPS))


@triton.jit
def _fused_kernel(
    x_ptr, residual_ptr, y_ptr,
    N,
    EPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program writes one row of y, having held the row of h in registers all the while."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = cols < N
    x = tl.load(x_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    h = x + residual
    y = h * tl.rsqrt(tl.sum(h * h, axis=0) / N + EPS)
    tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def _row_tiling(N: int, num_warps: int | None = None) -> dict[str, int]:
    """The row in one block; by default 32 numbers a thread, if 16 warps will do."""
    BLOCK_N = triton.next_power_of_2(N)
    return {"BLOCK_N": BLOCK_N, "num_warps": num_warps or min(max(BLOCK_N // 1024, 1), 16)}


def launch_mean_square(h, rstd, num_warps: int | None = None) -> None:
    """Write 1 / sqrt(mean(h²) + EPS) of each row of h [M, N] to rstd [M], fp32."""
    M, N = h.shape
    _mean_square_kernel[(M,)](h, rstd, N, EPS=EPS, **_row_tiling(N, num_warps))


def launch_divide(h, rstd, y, num_warps: int | None = None) -> None:
    """Write h * rstd, row by row, to y [M, N], which may be h itself."""
    M, N = h.shape
    _divide_kernel[(M,)](h, rstd, y, N, **_row_tiling(N, num_warps))


def launch_parts(x, residual, y, BLOCK: int = 1024, num_warps: int | None = None) -> None:
    """h lies in y, until it is overwritten by its quotient."""
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    launch_grid(x, residual, y, BLOCK=BLOCK)
    launch_mean_square(y, rstd, num_warps)
    launch_divide(y, rstd, y, num_warps)


def launch_pairs(x, residual, y, num_warps: int | None = None) -> None:
    """h lies in y, until it is overwritten by its quotient."""
    M, N = x.shape
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    _add_square_kernel[(M,)](x, residual, y, rstd, N, EPS=EPS, **_row_tiling(N, num_warps))
    launch_divide(y, rstd, y, num_warps)


def launch_fused(x, residual, y, num_warps: int | None = None) -> None:
    M, N = x.shape
    _fused_kernel[(M,)](x, residual, y, N, EPS=EPS, **_row_tiling(N, num_warps))


def _too_long(x, residual, y) -> str:
    N = x.shape[1]
    return f"holds a row in registers, up to {MAX_N} numbers, and x has rows of {N}" if N > MAX_N else ""


RUNGS = (
    Rung(
        "parts", "sum, mean of squares, quotient, a kernel each: 6 transfers of a row", launch_parts, refuses=_too_long
    ),
    Rung("pairs", "the mean of squares is taken where the sum is made: 5 transfers", launch_pairs, refuses=_too_long),
    Rung("fused", "the row stays in registers from load to store: 3 transfers", launch_fused, refuses=_too_long),
)


def examples(dtype=torch.bfloat16):
    """The launches for `fastkit compile`, at the size that is measured."""
    return rung_examples(RUNGS, "16384x4096", *(torch.empty(16384, 4096, device="meta") for _ in range(3)))


def add_norm(x: torch.Tensor, residual: torch.Tensor, rung: str | None = None) -> torch.Tensor:
    """x + residual, each row divided by its root mean square, by one of RUNGS (None: the last).

    x, residual  [..., N], N >= 1, the same shape, contiguous, float32, float16 or bfloat16, both alike.
    returns      that shape and dtype, contiguous.

    Not differentiable: a ladder is for measuring. Raises TypeError for another dtype or two different ones, ValueError
    for shapes that differ or have no rows, rows beyond 32,768 numbers, tensors that are not contiguous or a rung that
    there is not, NotImplementedError for a device without kernels. CPU tensors take `reference` (see `on_triton`).
    """
    check_floats("add_norm", x=x, residual=residual)
    check_pair("add_norm", x=x, residual=residual)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"add_norm: x has shape {tuple(x.shape)}; give rows of at least one number")
    chosen = find("add_norm", RUNGS, rung) or RUNGS[-1]
    if not on_triton("add_norm", "x", x):
        return reference(x, residual)
    y = torch.empty_like(x)
    chosen.launch(as_rows(x), as_rows(residual), as_rows(y))
    return y
