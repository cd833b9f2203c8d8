"""A polynomial, the ladder of intensity: y = 1 + x + x² + ... + x^degree, by Horner's rule, y = y * x + 1 each step.

Two operations a step. What a step costs in bytes is up to the rung:

stepwise  a launch a step: y is read and written again each time, 12 bytes for 2 operations, whatever the degree
fused     all steps in registers: 8 bytes in all, so that operations a byte grow with the degree, degree / 4 in float32

Products and sums are fp32; a result is rounded once, when it is stored (in stepwise: each step).
"""

import torch

from fastkit.kernels.common import Cost, check_floats, on_triton, tl, triton
from fastkit.kernels.ladders.rung import Rung, best, find
from fastkit.kernels.ladders.rung import examples as rung_examples


def cost(n: int, degree: int, dtype=torch.float32) -> Cost:
    """The least work for n numbers of `dtype`."""
    return Cost(bytes_moved=2 * n * dtype.itemsize, flops=2 * n * degree)  # read x, write y; multiply, add


def reference(x: torch.Tensor, degree: int) -> torch.Tensor:
    """The same in plain torch."""
    y = torch.ones_like(x, dtype=torch.float32)
    for _ in range(degree):
        y = y * x + 1.0
    return y.to(x.dtype)


@triton.jit
def _ones_kernel(y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    tl.store(y_ptr + offsets, 1.0, mask=offsets < n)


@triton.jit
def _step_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """One step for BLOCK numbers: y = y * x + 1."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, y * x + 1.0, mask=mask)


@triton.jit
def _fused_kernel(x_ptr, y_ptr, n, degree, BLOCK: tl.constexpr):
    """All steps for BLOCK numbers, y in registers."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = tl.full([BLOCK], 1.0, tl.float32)
    for _ in range(degree):
        y = y * x + 1.0
    tl.store(y_ptr + offsets, y, mask=mask)


def launch_stepwise(x, degree, y, BLOCK: int = 4096, num_warps: int = 4) -> None:
    n = x.numel()
    grid = (triton.cdiv(n, BLOCK),)
    _ones_kernel[grid](y, n, BLOCK=BLOCK, num_warps=num_warps)
    for _ in range(degree):
        _step_kernel[grid](x, y, n, BLOCK=BLOCK, num_warps=num_warps)


def launch_fused(x, degree, y, BLOCK: int = 4096, num_warps: int = 4) -> None:
    n = x.numel()
    _fused_kernel[(triton.cdiv(n, BLOCK),)](x, y, n, degree, BLOCK=BLOCK, num_warps=num_warps)


RUNGS = (
    Rung("stepwise", "a launch a step: 12 bytes of traffic for 2 operations", launch_stepwise),
    Rung("fused", "all steps in registers: 8 bytes of traffic for all operations", launch_fused),
)


def examples(dtype=torch.bfloat16):
    """The launches for `fastkit compile`, at the size that is measured."""
    x, y = (torch.empty(2**26, device="meta") for _ in range(2))
    return rung_examples(RUNGS, "67108864 degree 2", x, 2, y)


def horner(x: torch.Tensor, degree: int, rung: str | None = None) -> torch.Tensor:
    """1 + x + ... + x^degree of each number, by one of RUNGS (None: the last).

    x        any shape, contiguous, float32, float16 or bfloat16
    degree   steps, 0 or more
    returns  the same shape and dtype, contiguous

    Raises TypeError for another dtype, ValueError for an x that is not contiguous, a negative degree or a rung that
    there is not, NotImplementedError for a device without kernels. CPU tensors take `reference` (see `on_triton`).
    """
    check_floats("horner", x=x)
    if not x.is_contiguous():
        raise ValueError(f"horner: x has strides {x.stride()} for shape {tuple(x.shape)}; pass x.contiguous()")
    if degree < 0:
        raise ValueError(f"horner: degree is {degree}; give 0 or more")
    chosen = find("horner", RUNGS, rung)
    if not on_triton("horner", "x", x):
        return reference(x, degree)
    y = torch.empty_like(x)
    (chosen or best(RUNGS, x, degree, y)).launch(x, degree, y)
    return y
