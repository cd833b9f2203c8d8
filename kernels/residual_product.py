"""A product that adds the residual stream at its end: y = residual + x @ W.T, one kernel.

For x [M, K], W [N, K] and residual [M, N]:

    y = residual + x @ W.T        [M, N]

torch.addmm(residual, x, W.T) takes two: one copies the residual into y, 2 M N numbers moved, and cuBLAS's product reads
that copy and writes over it. Here the product's own end reads the residual. There is no backward of its own: y's
gradient is the residual's, and the product's is a product.

order     As many programs as SMs (or twice as many), each taking tile after tile, by the grouped order of
          `ladders/matmul.py`; both loops are one (flatten), so that the next tile loads while this one's end runs.
residual  A tile of it comes in quarters, one before each of the last four steps of the product, and waits in registers.
          Triton waits for such a load where it stands; here the tensor cores are at the step before meanwhile. Behind
          the product, Triton 3.6 would wait for all sums first. And beside the stages of "wide" and its tile of y there
          is room in shared memory for a quarter.
tiles     All of x, W, residual and y go by the copy engine (TMA).

On an H200 it is yet to be timed against cuBLAS.

Casts: products and sums are fp32. The residual is added in fp32, and y is rounded once, when it is stored.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels.common import Cost, architecture, device_of, on_triton, sm_count, tl, triton
from fastkit.kernels.tma import TensorDescriptor, fits_tma, place

ARCHITECTURES = ("sm_90", "interpreter")  # "high" spills registers on sm_100
FASTER = False  # than torch.addmm on sm_90: yet to be timed against cuBLAS
TILINGS = {  # "wide" is taken; per_sm: programs an SM
    "wide": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    "high": {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    "small": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4, "per_sm": 2},
}


def cost(M: int, N: int, K: int, dtype=torch.bfloat16) -> Cost:
    """The least work for x [M, K], w [N, K], residual and y [M, N] of `dtype`."""
    return Cost(
        bytes_moved=(M * K + N * K + 2 * M * N) * dtype.itemsize,  # read x, w, residual; write y
        flops=2 * M * N * K + M * N,
    )


def reference(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, with the same casts. To fp64 nothing is rounded: the tests' truth."""
    accurate = torch.promote_types(x.dtype, torch.float32)
    return (residual.to(accurate) + x.to(accurate) @ w.to(accurate).T).to(x.dtype)


@triton.jit
def _beside(left, right):
    """[left right] [M, 2 N] of two [M, N]. To a thread these are its own registers: nothing moves."""
    return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [left.shape[0], 2 * left.shape[1]])


@triton.jit(do_not_specialize=["M"])
def _residual_product_kernel(
    x_desc, w_desc, residual_desc, y_desc,
    M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program writes tiles i, i + programs, ... of y. Beyond an edge TMA reads 0 and writes nothing."""
    tl.assume(K > 0)
    QUARTER: tl.constexpr = BLOCK_N // 4
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    last = (tl.cdiv(K, BLOCK_K) - 1) * BLOCK_K
    # quarters of the residual's tile, set here once and not for each tile
    r0 = tl.zeros([BLOCK_M, QUARTER], y_desc.dtype)
    r1 = r0
    r2 = r0
    r3 = r0
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        place_m, place_n = place(tile, tiles_m, tiles_n, GROUP_M)
        row, col = place_m * BLOCK_M, place_n * BLOCK_N
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            if k == tl.maximum(last - 3 * BLOCK_K, 0):
                r0 = residual_desc.load([row, col])
            if k == tl.maximum(last - 2 * BLOCK_K, 0):
                r1 = residual_desc.load([row, col + QUARTER])
            if k == tl.maximum(last - BLOCK_K, 0):
                r2 = residual_desc.load([row, col + 2 * QUARTER])
            if k == last:
                r3 = residual_desc.load([row, col + 3 * QUARTER])
            sums = tl.dot(x_desc.load([row, k]), w_desc.load([col, k]).T, sums)
        residual = _beside(_beside(r0, r1), _beside(r2, r3))  # [BLOCK_M, BLOCK_N]
        y_desc.store([row, col], (sums + residual.to(tl.float32)).to(y_desc.dtype))


def takes(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor) -> bool:
    """Whether the kernel is for x [M, K], w [N, K] and residual [M, N], where they lie; else torch.addmm is.

    Not while torch.compile traces, which knows no addresses.
    """
    if not FASTER or torch.compiler.is_compiling() or not on_triton("residual_product", "x", x):
        return False
    if architecture(x.device) not in ARCHITECTURES or not x.dtype == w.dtype == residual.dtype:
        return False
    (M, K), N = x.shape, len(w)
    return x.element_size() == 2 and min(M, N, K) > 0 and N % 8 == 0 and all(map(fits_tma, (x, w, residual)))


def launch(x, w, residual, y, per_sm: int = 1, **tiling) -> None:
    """Write y [M, N], given x [M, K], w [N, K] and residual [M, N], all of one 16-bit dtype; K is at least 1.

    Rows of each lie any stride apart, at multiples of 16 bytes. y shares no memory with the others. `tiling` overrides
    BLOCK_M and so on: see TILINGS.

    Raises NotImplementedError on any other architecture than sm_90.
    """
    arch, (M, K), N = architecture(x.device), x.shape, len(w)
    if arch not in ARCHITECTURES:
        raise NotImplementedError(f"residual_product needs sm_90 and this is {arch}: use torch.addmm")
    tiling = TILINGS["wide"] | {"GROUP_M": 16} | tiling
    BLOCK_M, BLOCK_N, BLOCK_K = (tiling[size] for size in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
    if tiles == 0:
        return
    quarter = [BLOCK_M, BLOCK_N // 4]
    boxes = ([BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K], quarter, [BLOCK_M, BLOCK_N])
    tensors = zip((x, w, residual, y), boxes, strict=True)
    descs = (TensorDescriptor(t, list(t.shape), list(t.stride()), box) for t, box in tensors)
    with device_of(x):
        _residual_product_kernel[(min(per_sm * sm_count(x.device), tiles),)](*descs, M, N, K, **tiling)


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    empty, found = functools.partial(torch.empty, dtype=dtype, device="meta"), {}
    for M, N, K in ((8192, 4096, 4096), (8192, 4096, 14336)):  # Mistral-7B's o and down, 4 sequences of 2,048 tokens
        tensors = empty(M, K), empty(N, K), empty(M, N), empty(M, N)
        for name, tiling in TILINGS.items():
            found[f"{name} {M}x{N}x{K}"] = functools.partial(launch, *tensors, **tiling)
    return found
