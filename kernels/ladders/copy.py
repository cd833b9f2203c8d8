"""Copy, the ladder of memory access: y = x, the same bytes three times, in another order.

A warp's 32 lanes ask for memory together, and what the memory system counts is not bytes but sectors, of 32 bytes each:
a request costs as many as its 32 addresses touch. In float32 that is, for each load and each store:

    rung        addresses of neighbouring lanes         sectors a request   bytes used of each sector
    strided     128 bytes apart                         32                  4 of 32
    coalesced   4 bytes apart                           4                   32
    vectorised  16 bytes apart, and 16 bytes a lane     16                  32, in a quarter of the requests

strided     Each lane copies a run of its own, as one would write it for a CPU's threads. All of a sector's bytes are
            wanted, but one request at a time, and between the first and the last the caches have to keep it.
coalesced   The same loop with the roles of lane and step exchanged: a warp's lanes stand side by side.
vectorised  The loop becomes one load of many numbers. Each lane takes 128 bits a request, the widest there is, and all
            of its loads leave before the first store waits for one: more bytes under way, which is what hides latency.
"""

import torch

from fastkit.kernels.common import Cost, check_floats, on_triton, tl, triton
from fastkit.kernels.ladders.rung import Rung, best, find
from fastkit.kernels.ladders.rung import examples as rung_examples


def cost(n: int, dtype=torch.float32) -> Cost:
    """The least work to copy n numbers of `dtype`."""
    return Cost(bytes_moved=2 * n * dtype.itemsize, flops=0)  # read x, write y


def reference(x: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    return x.clone()


@triton.jit
def _strided_kernel(x_ptr, y_ptr, n, LANES: tl.constexpr, STEPS: tl.constexpr):
    """One program copies LANES * STEPS numbers; lane i copies those from i * STEPS on, one a step."""
    start = tl.program_id(0).to(tl.int64) * LANES * STEPS
    lanes = tl.arange(0, LANES)  # [LANES], one number a lane
    for step in range(STEPS):
        offsets = start + lanes * STEPS + step
        mask = offsets < n
        tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask, other=0.0), mask=mask)


@triton.jit
def _coalesced_kernel(x_ptr, y_ptr, n, LANES: tl.constexpr, STEPS: tl.constexpr):
    """One program copies LANES * STEPS numbers; lane i copies every LANES-th from i on, one a step."""
    start = tl.program_id(0).to(tl.int64) * LANES * STEPS
    lanes = tl.arange(0, LANES)  # [LANES], one number a lane
    for step in range(STEPS):
        offsets = start + step * LANES + lanes
        mask = offsets < n
        tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask, other=0.0), mask=mask)


@triton.jit
def _vectorised_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """One program copies BLOCK numbers: 16 bytes a lane where Triton knows n to be divisible by 16, else one number."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offsets < n
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask, other=0.0), mask=mask)


def _launch_steps(kernel, x, y, LANES: int = 128, STEPS: int = 32) -> None:
    n = x.numel()
    kernel[(triton.cdiv(n, LANES * STEPS),)](x, y, n, LANES=LANES, STEPS=STEPS, num_warps=LANES // 32)


def launch_strided(x, y, **tiling) -> None:
    _launch_steps(_strided_kernel, x, y, **tiling)


def launch_coalesced(x, y, **tiling) -> None:
    _launch_steps(_coalesced_kernel, x, y, **tiling)


def launch_vectorised(x, y, BLOCK: int | None = None, num_warps: int = 4) -> None:
    """By default a lane copies four times 16 bytes: four loads of its own under way."""
    n = x.numel()
    BLOCK = BLOCK or num_warps * 32 * 4 * (16 // x.element_size())
    _vectorised_kernel[(triton.cdiv(n, BLOCK),)](x, y, n, BLOCK=BLOCK, num_warps=num_warps)


RUNGS = (
    Rung("strided", "each lane copies a run of its own: 32 sectors a request, 4 bytes of each used", launch_strided),
    Rung("coalesced", "neighbouring lanes copy neighbouring numbers: every sector is used whole", launch_coalesced),
    Rung("vectorised", "16 bytes a lane, several loads under way: fewer requests, latency hidden", launch_vectorised),
)


def examples(dtype=torch.bfloat16):
    """The launches for `fastkit compile`, at the size that is benchmarked."""
    return rung_examples(RUNGS, "67108864", *(torch.empty(2**26, device="meta") for _ in range(2)))


def copy(x: torch.Tensor, rung: str | None = None) -> torch.Tensor:
    """A copy of x, by one of RUNGS (None: the last).

    x        any shape, contiguous, float32, float16 or bfloat16.
    returns  the same shape and dtype, contiguous.

    Raises TypeError for another dtype, ValueError for an x that is not contiguous or a rung that there is not,
    NotImplementedError for a device without kernels. CPU tensors take `reference` (see `on_triton`).
    """
    check_floats("copy", x=x)
    if not x.is_contiguous():
        raise ValueError(f"copy: x has strides {x.stride()} for shape {tuple(x.shape)}; pass x.contiguous()")
    chosen = find("copy", RUNGS, rung)
    if not on_triton("copy", "x", x):
        return reference(x)
    y = torch.empty_like(x)
    (chosen or best(RUNGS, x, y)).launch(x, y)
    return y
