"""Add, the ladder of programs: out = x + y, number by number, the smallest kernel that is worth writing.

A kernel says what one program does with one block of numbers. How many programs there are is said at the launch, and
with it how much of the GPU works:

alone  One program adds block after block, as a loop on a CPU would. A program runs on one streaming multiprocessor, so
       all others stand idle.
grid   A program a block. The loop is gone: the grid is the loop, and the GPU runs as many of its turns at once as fit.

The last block may reach past the end: `mask` keeps its lanes from loading and storing there.

Casts: every load is converted to fp32 at once, and the sum is rounded once, when it is stored.
"""

import torch

from fastkit.kernels.common import Cost, check_floats, on_triton, tl, triton
from fastkit.kernels.ladders.rung import Rung, best, find
from fastkit.kernels.ladders.rung import examples as rung_examples


def cost(n: int, dtype=torch.float32) -> Cost:
    """The least work to add two tensors of n numbers of `dtype`."""
    return Cost(bytes_moved=3 * n * dtype.itemsize, flops=n)  # read x, y; write out


def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    return x + y


@triton.jit
def _alone_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """The only program adds all n numbers, BLOCK at a time."""
    for start in range(0, n, BLOCK):
        offsets = start + tl.arange(0, BLOCK)  # [BLOCK]
        mask = offsets < n
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, (x + y).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grid_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """One program adds BLOCK neighbouring numbers."""
    start = tl.program_id(0).to(tl.int64) * BLOCK  # can pass 2**31
    offsets = start + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, (x + y).to(out_ptr.dtype.element_ty), mask=mask)


def launch_alone(x, y, out, BLOCK: int = 1024, num_warps: int = 4) -> None:
    _alone_kernel[(1,)](x, y, out, out.numel(), BLOCK=BLOCK, num_warps=num_warps)


def launch_grid(x, y, out, BLOCK: int = 1024, num_warps: int = 4) -> None:
    n = out.numel()
    _grid_kernel[(triton.cdiv(n, BLOCK),)](x, y, out, n, BLOCK=BLOCK, num_warps=num_warps)


RUNGS = (
    Rung("alone", "one program adds block after block: one multiprocessor works", launch_alone),
    Rung("grid", "a program a block: the grid is the loop, and all multiprocessors work", launch_grid),
)


def examples(dtype=torch.bfloat16):
    """The launches for `fastkit compile`, at the size that is measured."""
    return rung_examples(RUNGS, "67108864", *(torch.empty(2**26, device="meta") for _ in range(3)))


def add(x: torch.Tensor, y: torch.Tensor, rung: str | None = None) -> torch.Tensor:
    """x + y, by one of RUNGS (None: the last).

    x, y     the same shape, contiguous, float32, float16 or bfloat16, both alike.
    returns  that shape and dtype, contiguous.

    Not differentiable: a ladder is for measuring. Raises TypeError for another dtype or two different ones, ValueError
    for shapes that differ, tensors that are not contiguous or a rung that there is not, NotImplementedError for a
    device without kernels. CPU tensors take `reference` (see `on_triton`).
    """
    check_floats("add", x=x, y=y)
    check_pair("add", x=x, y=y)
    chosen = find("add", RUNGS, rung)
    if not on_triton("add", "x", x):
        return reference(x, y)
    out = torch.empty_like(x)
    (chosen or best(RUNGS, x, y, out)).launch(x, y, out)
    return out


def check_pair(op: str, **tensors: torch.Tensor) -> None:
    """Raise unless both tensors are contiguous and have one shape and one dtype."""
    (name, x), (other, y) = tensors.items()
    if x.shape != y.shape:
        raise ValueError(f"{op}: {other} has shape {tuple(y.shape)} but {name} has {tuple(x.shape)}; make them alike")
    if x.dtype != y.dtype:
        raise TypeError(f"{op}: {other} has dtype {y.dtype} but {name} has {x.dtype}; convert one to the other's")
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}; pass {name}.contiguous()")
