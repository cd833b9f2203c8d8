"""SwiGLU of two projections without the projections: a = silu(x @ W_g.T) * (x @ W_u.T), one kernel.

For x [M, K], W_g and W_u [I, K]:

    g = x @ W_g.T        u = x @ W_u.T        a = silu(g) * u = g * sigmoid(g) * u        [M, I] each

A product that writes [g u] and a SwiGLU that reads it move 5 M I numbers: 2 written, 2 read, 1 written. Where nobody
wants g and u afterwards, the product's own end can take SwiGLU and write a alone, M I numbers; g and u never leave the
registers. It is for a forward whose backward computes g and u again. There is no backward of its own: `swiglu.py`'s
takes g and u.

tiles     A program multiplies a tile of x [BLOCK_M, BLOCK_K] by BLOCK_N rows of W_g and the same BLOCK_N of W_u. With W
          [2 I, K], the two below each other, taken as [2, I, K], both come by one request to the copy engine (TMA), as
          [2, BLOCK_N, BLOCK_K], and lie in shared memory as the [2 BLOCK_N, BLOCK_K] of one product. Its result is
          [g u] of the tile, whose halves a thread has in two halves of its registers: nothing moves between lanes.
order     As many programs as SMs, each taking tile after tile, by the grouped order of `ladders/matmul.py`; both loops
          are one (flatten), so that the next tile loads while SwiGLU is taken and a is written. It has one product, not
          one for g and one for u: in a flattened loop ptxas lets two wait for each other (its note C7515).

NVIDIA H200, 8192 x 14336 x 4096 in bfloat16, for seconds on end, so that its power cap rules: 2.94 ms; cuBLAS's product
and SwiGLU 3.02; with 4 stages and groups of 8 2.97, "small" 3.06, "high" 3.25. The bits are those of the two.

Casts: products and sums are fp32. g and u are rounded to x's dtype and SwiGLU is taken of that in fp32, as if they had
been written: what computes them again for the backward then has the numbers that a was made of, but for the order of
the products' sums. a is rounded once more, when it is stored.
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels import swiglu
from fastkit.kernels.common import (
    Cost,
    architecture,
    as_rows,
    check_floats,
    device_of,
    on_triton,
    sm_count,
    tl,
    triton,
)

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None  # Triton is missing and `on_triton` sees to it that nothing is launched

ARCHITECTURES = ("sm_90", "sm_100", "interpreter")  # that have TMA and tensor cores which read shared memory
TILINGS = {  # "wide" is taken; per_sm: programs an SM
    "wide": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    "high": {"BLOCK_M": 256, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
    "small": {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3, "per_sm": 2},
}


def cost(M: int, I: int, K: int, dtype=torch.bfloat16) -> Cost:
    """The least work for x [M, K], w [2 I, K] and a [M, I] of `dtype`."""
    return Cost(
        bytes_moved=(M * K + 2 * I * K + M * I) * dtype.itemsize,  # read x, w; write a
        flops=4 * M * I * K + swiglu.cost(M, I, dtype)[0].flops,
    )


def reference(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, with the same casts. To fp64 nothing is rounded: the tests' truth."""
    accurate = torch.promote_types(x.dtype, torch.float32)
    gate_up = (x.to(accurate) @ w.to(accurate).T).to(x.dtype)
    return swiglu.reference(*gate_up.chunk(2, -1))


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of `tile` among the tiles: stripe by stripe, GROUP_M tiles high, columns first."""
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)  # the last stripe may be lower
    within = tile % (GROUP_M * tiles_n)
    return first_m + within % height, within // height


@triton.jit(do_not_specialize=["M"])
def _gated_product_kernel(
    x_desc, w_desc, a_desc,
    M, I, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program writes tiles i, i + programs, ... of a. Beyond an edge TMA reads 0 and writes nothing."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(I, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        place_m, place_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        row, col = place_m * BLOCK_M, place_n * BLOCK_N
        gate_up = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
            w = tl.reshape(w_desc.load([0, col, k]), [2 * BLOCK_N, BLOCK_K])
            gate_up = tl.dot(x, w.T, gate_up)
        gate, up = tl.split(tl.permute(tl.reshape(gate_up, [BLOCK_M, 2, BLOCK_N]), [0, 2, 1]))  # [BLOCK_M, BLOCK_N]
        gate, up = gate.to(a_desc.dtype).to(tl.float32), up.to(a_desc.dtype).to(tl.float32)
        a_desc.store([row, col], (gate * tl.sigmoid(gate) * up).to(a_desc.dtype))


def _fits_tma(x: torch.Tensor) -> bool:
    """Whether TMA can copy the rows of x: neighbours adjacent, each row at a multiple of 16 bytes."""
    adjacent = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return adjacent and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def takes(x: torch.Tensor, I: int) -> bool:
    """Whether the kernel is for x [M, K] and a [M, I], where x lies; else a product and SwiGLU are.

    On sm_100, for which it compiles too, it is yet to be timed against those. Not while torch.compile traces, which
    knows no addresses.
    """
    if torch.compiler.is_compiling() or not on_triton("gated_product", "x", x):
        return False
    if not on_its_card(x.device):
        return False
    return x.element_size() == 2 and x.numel() > 0 and I > 0 and I % 8 == 0 and x.shape[1] % 8 == 0 and _fits_tma(x)


def on_its_card(device: torch.device) -> bool:
    """Whether the kernel is for the GPU `device`."""
    return architecture(device) in ("sm_90", "interpreter")


def launch(x, w, a, per_sm: int = 1, **tiling) -> None:
    """Write a [M, I], given x [M, K] and w [2 I, K], gate's rows and then up's, all of one 16-bit dtype.

    Rows of each lie any stride apart, at multiples of 16 bytes. `tiling` overrides BLOCK_M and so on: see TILINGS.

    Raises NotImplementedError where there is no TMA, or none that Triton's tensor cores read from.
    """
    arch, (M, K), I = architecture(x.device), x.shape, a.shape[1]
    if arch not in ARCHITECTURES:
        raise NotImplementedError(f"gated_product needs sm_90 or sm_100 and this is {arch}: use a product and swiglu")
    tiling = TILINGS["wide"] | {"GROUP_M": 16} | tiling
    BLOCK_M, BLOCK_N, BLOCK_K = (tiling[size] for size in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(I, BLOCK_N)
    if tiles == 0:
        return
    both = [I * w.stride(0), w.stride(0), 1]
    x_desc = TensorDescriptor(x, [M, K], [x.stride(0), 1], [BLOCK_M, BLOCK_K])
    w_desc = TensorDescriptor(w, [2, I, K], both, [2, BLOCK_N, BLOCK_K])
    a_desc = TensorDescriptor(a, [M, I], [a.stride(0), 1], [BLOCK_M, BLOCK_N])
    with device_of(x):
        _gated_product_kernel[(min(per_sm * sm_count(x.device), tiles),)](x_desc, w_desc, a_desc, M, I, K, **tiling)


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    M, I, K = 8192, 14336, 4096  # Mistral-7B, 4 sequences of 2,048 tokens
    x, w, a = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((M, K), (2 * I, K), (M, I)))
    return {f"{name} {M}x{I}x{K}": functools.partial(launch, x, w, a, **tiling) for name, tiling in TILINGS.items()}


def gated_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """silu(x @ w_gate.T) * (x @ w_up.T), where neither product is written to memory (SwiGLU, arXiv:2002.05202).

    x        [..., K], float32, float16 or bfloat16; copied first if a row is not contiguous
    w        [2 I, K], the same dtype and device: the rows of w_gate, then those of w_up
    returns  [..., I], contiguous, in that dtype. Sums are fp32; both products are rounded to the dtype before SwiGLU.

    No gradient: use swiglu of both products, whose backward needs them. Raises TypeError for another dtype or two
    different ones, ValueError for shapes or devices that do not match, NotImplementedError for a device without
    kernels. It is one kernel on sm_90, in 16 bits, for I and K that are multiples of 8; else torch's product and
    swiglu's kernel. CPU tensors take `reference` (see `on_triton`).
    """
    check_floats("gated_product", x=x, w=w)
    if x.dtype != w.dtype:
        raise TypeError(f"gated_product: w has dtype {w.dtype} but x has {x.dtype}; convert one to the other's")
    if w.dim() != 2 or w.shape[0] % 2 or x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"gated_product: x has shape {tuple(x.shape)} and w {tuple(w.shape)}; give [..., K] and [2 I, K]"
        )
    x, w, I = x.detach(), w.detach(), w.shape[0] // 2
    if not on_triton("gated_product", "x", x):
        return reference(x, w)
    a = torch.empty(*x.shape[:-1], I, dtype=x.dtype, device=x.device)
    if a.numel() == 0 or x.shape[-1] == 0:
        return a.zero_()
    rows = as_rows(x)
    w = w if w.stride(1) == 1 else w.contiguous()
    if takes(rows, I) and _fits_tma(w):
        launch(rows, w, as_rows(a))
    else:
        gate, up = (rows @ w.T).chunk(2, 1)
        swiglu.launch_forward(gate, up, as_rows(a))
    return a
