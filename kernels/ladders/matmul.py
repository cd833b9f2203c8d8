"""Matrix product, the ladder of reuse: c = a @ b, a [M, K], b [K, N].

It takes 2 M N K operations on (M K + K N + M N) numbers: at 8192³ in a 16-bit dtype 2731 operations a byte, where an
H100 needs some 300 to be busy. So a number, once fetched, must serve many times, and each rung finds it a nearer place:

naive         A thread per number of c, which reads a row of a and a column of b: two loads for one multiply-add. All
              reuse is luck with the caches.
tiled         A program takes tiles of a and b through shared memory: [64, 16] and [16, 64] numbers, each used 64 times.
grouped       The same tiles in another order. Programs that run at once cover a block of c, not a stripe, and so share
              rows of a and columns of b in the L2 cache.
tensor_cores  The tiles stay in 16 bits, twice as deep in the same room, and `tl.dot` becomes one instruction of a whole
              warp (mma) or four (wgmma), with sums in fp32: some 15 times the arithmetic of the plain cores.
pipelined     The tensor cores would wait for each tile. Loads run stages ahead through shared memory, and larger tiles
              give more arithmetic to hide them behind.
persistent    As many programs as SMs, each taking tile after tile, so that the next tile loads while the last is
              written. One thread asks the copy engine (TMA) for a whole tile by its coordinates, which frees the
              registers and instructions that computed addresses.

Casts: products and sums are fp32; a result is rounded once, when it is stored. float32 inputs are for the first three
rungs, which multiply them exactly; on tensor cores they would be cut to tf32, another operation.
"""

import torch

from fastkit.kernels.common import Cost, architecture, check_floats, on_triton, sm_count, tl, triton
from fastkit.kernels.ladders.rung import Rung, best, find
from fastkit.kernels.ladders.rung import examples as rung_examples

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None  # Triton is missing and `on_triton` sees to it that nothing is launched


def cost(M: int, N: int, K: int, dtype=torch.float16) -> Cost:
    """The least work for a [M, K], b [K, N] and c [M, N] of `dtype`."""
    return Cost(
        bytes_moved=(M * K + K * N + M * N) * dtype.itemsize,  # read a, b; write c
        flops=2 * M * N * K,  # multiply, add
    )


def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    return a @ b


@triton.jit
def _naive_kernel(
    a_ptr, b_ptr, c_ptr,
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program writes a tile of c, a number a thread."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)  # [BLOCK_M]
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)  # [BLOCK_N]
    in_rows, in_cols = rows < M, cols < N
    a_ptrs = a_ptr + rows * stride_am  # [BLOCK_M]
    b_ptrs = b_ptr + cols * stride_bn  # [BLOCK_N]

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, K):
        a = tl.load(a_ptrs, mask=in_rows, other=0.0).to(tl.float32)
        b = tl.load(b_ptrs, mask=in_cols, other=0.0).to(tl.float32)
        sums += a[:, None] * b[None, :]
        a_ptrs += stride_ak
        b_ptrs += stride_bk

    c_ptrs = c_ptr + rows[:, None] * stride_cm + cols[None, :] * stride_cn
    tl.store(c_ptrs, sums.to(c_ptr.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


@triton.jit
def _tile(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of the tile of c that `program` writes: stripe by stripe, GROUP_M tiles high, columns first.

    With GROUP_M = 1 that is row by row: of 128 programs in a row each wants other columns of b, in all 1 tile's rows of
    a and 128 tiles' columns of b. With 8 it is 8 and 16.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = program // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)  # the last stripe may be lower
    within = program % (GROUP_M * tiles_n)
    return (first_m + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _tiled_kernel(
    a_ptr, b_ptr, c_ptr,
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program writes a tile of c in fp32, on the plain cores (on gfx9, whose matrix cores know fp32, on those)."""
    row, col = _tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    cols = (col + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BLOCK_N]
    ks = tl.arange(0, BLOCK_K).to(tl.int64)  # [BLOCK_K]
    in_rows, in_cols = (rows < M)[:, None], (cols < N)[None, :]
    a_ptrs = a_ptr + rows[:, None] * stride_am + ks[None, :] * stride_ak  # [BLOCK_M, BLOCK_K]
    b_ptrs = b_ptr + ks[:, None] * stride_bk + cols[None, :] * stride_bn  # [BLOCK_K, BLOCK_N]

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=in_rows & (ks < K - k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(ks < K - k)[:, None] & in_cols, other=0.0)
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")  # fp32: no tensor cores
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk

    c_ptrs = c_ptr + rows[:, None] * stride_cm + cols[None, :] * stride_cn
    tl.store(c_ptrs, sums.to(c_ptr.dtype.element_ty), mask=in_rows & in_cols)


@triton.jit
def _tensor_core_kernel(
    a_ptr, b_ptr, c_ptr,
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program writes a tile of c on the tensor cores. How many stages its loop has is said at the launch."""
    row, col = _tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    cols = (col + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BLOCK_N]
    ks = tl.arange(0, BLOCK_K).to(tl.int64)  # [BLOCK_K]
    in_rows, in_cols = (rows < M)[:, None], (cols < N)[None, :]
    a_ptrs = a_ptr + rows[:, None] * stride_am + ks[None, :] * stride_ak  # [BLOCK_M, BLOCK_K]
    b_ptrs = b_ptr + ks[:, None] * stride_bk + cols[None, :] * stride_bn  # [BLOCK_K, BLOCK_N]

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=in_rows & (ks < K - k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(ks < K - k)[:, None] & in_cols, other=0.0)
        sums = tl.dot(a, b, sums)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk

    c_ptrs = c_ptr + rows[:, None] * stride_cm + cols[None, :] * stride_cn
    tl.store(c_ptrs, sums.to(c_ptr.dtype.element_ty), mask=in_rows & in_cols)


@triton.jit
def _persistent_kernel(
    a_desc, b_desc, c_desc,
    M, N, K,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """One program writes tiles i, i + programs, ... of c. What lies beyond an edge, TMA reads as 0 and does not write.

    TRANSPOSED  the descriptor is of a.T (b.T), because there the numbers are neighbours in memory
    HALVES      the tile of c is written in two, through half the shared memory, which then holds another stage
    FLATTEN     both loops become one, so that the stages of the next tile fill while this one ends
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, col = _tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([k, row]).T if A_TRANSPOSED else a_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
            b = b_desc.load([col, k]).T if B_TRANSPOSED else b_desc.load([k, col])  # [BLOCK_K, BLOCK_N]
            sums = tl.dot(a, b, sums)
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(sums, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
            c_desc.store([row, col], left.to(c_desc.dtype))
            c_desc.store([row, col + BLOCK_N // 2], right.to(c_desc.dtype))
        else:
            c_desc.store([row, col], sums.to(c_desc.dtype))


def _arguments(a, b, c) -> tuple:
    """What all launches but TMA's begin with: tensors, sizes, strides."""
    (M, K), N = a.shape, b.shape[1]
    return a, b, c, M, N, K, *a.stride(), *b.stride(), *c.stride()


def _launch_tiles(kernel, a, b, c, tiling: dict) -> None:
    """One program a tile. The grid is 1-D: its other axes end at 65,535."""
    M, N = c.shape
    kernel[(triton.cdiv(M, tiling["BLOCK_M"]) * triton.cdiv(N, tiling["BLOCK_N"]),)](*_arguments(a, b, c), **tiling)


def launch_naive(a, b, c, **tiling) -> None:
    """As many warps as have a thread for each number of the tile; gfx9's have 64 threads."""
    num_warps = 16 if architecture(a.device).startswith("gfx9") else 32
    _launch_tiles(_naive_kernel, a, b, c, {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": num_warps} | tiling)


_TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}


def launch_tiled(a, b, c, **tiling) -> None:
    _launch_tiles(_tiled_kernel, a, b, c, _TILE | {"GROUP_M": 1} | tiling)


def launch_grouped(a, b, c, **tiling) -> None:
    _launch_tiles(_tiled_kernel, a, b, c, _TILE | {"GROUP_M": 8} | tiling)


def launch_tensor_cores(a, b, c, **tiling) -> None:
    _launch_tiles(_tensor_core_kernel, a, b, c, _TILE | {"BLOCK_K": 32, "GROUP_M": 8} | tiling)


def launch_pipelined(a, b, c, **tiling) -> None:
    """By default 96 KiB of shared memory (144 on sm_90 and sm_100), which NVIDIA has from sm_80 on; 16 KiB on AMD."""
    chosen = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}
    if architecture(a.device).startswith("gfx"):
        chosen |= {"BLOCK_N": 128, "BLOCK_K": 32, "num_stages": 2}
    _launch_tiles(_tensor_core_kernel, a, b, c, chosen | tiling)


def launch_persistent(a, b, c, programs: int | None = None, **tiling) -> None:
    """By default a program an SM, and what 227 KiB of shared memory hold; 99 KiB on sm_120.

    programs  how many there are in all
    """
    chosen = {
        "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8, "HALVES": True, "FLATTEN": True,
        "num_warps": 8, "num_stages": 4,
    }  # fmt: skip
    if architecture(a.device).startswith("sm_12"):
        chosen |= {"BLOCK_N": 128, "num_stages": 3}
    chosen |= tiling
    (M, K), N = a.shape, b.shape[1]
    BLOCK_M, BLOCK_N, BLOCK_K = (chosen[size] for size in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    a_desc, a_transposed = _descriptor(a, BLOCK_M, BLOCK_K)
    b_desc, b_transposed = _descriptor(b, BLOCK_K, BLOCK_N)
    c_desc, _ = _descriptor(c, BLOCK_M, BLOCK_N // 2 if chosen["HALVES"] else BLOCK_N)
    programs = min(programs or sm_count(a.device), triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N))
    _persistent_kernel[(programs,)](
        a_desc, b_desc, c_desc, M, N, K, A_TRANSPOSED=a_transposed, B_TRANSPOSED=b_transposed, **chosen
    )


def _descriptor(x, rows: int, cols: int):
    """(TMA's descriptor of x, cut into [rows, cols], False), or (that of x.T, True) where columns are contiguous."""
    if _has_tma_rows(x):
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols]), False
    return TensorDescriptor(x, list(x.shape[::-1]), list(x.stride()[::-1]), [cols, rows]), True


def _has_tma_rows(x) -> bool:
    """Whether TMA can copy x: neighbours in a row adjacent, rows apart, each beginning at a multiple of 16 bytes."""
    adjacent = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return adjacent and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def _not_16_bit(a, b, c) -> str:
    return "" if a.element_size() == 2 else f"takes float16 and bfloat16, and a has {a.dtype}: use 'grouped'"


def _not_for_tma(a, b, c) -> str:
    if refusal := _not_16_bit(a, b, c):
        return refusal
    if a.shape[1] == 0:
        return "takes no K of 0: use 'pipelined'"
    for name, x, copied in (("a", a, (a, a.T)), ("b", b, (b, b.T)), ("c", c, (c,))):
        if not any(_has_tma_rows(y) for y in copied):
            what = f"of {name}, and it has strides {x.stride()} at {x.data_ptr() % 16} bytes past a multiple of 16"
            return f"needs rows of adjacent numbers, at multiples of 16 bytes, {what}: use 'pipelined'"
    return ""


RUNGS = (
    Rung("naive", "a thread for each number of c: two loads for one multiply-add", launch_naive),
    Rung("tiled", "tiles in shared memory: a number, once loaded, is used 64 times", launch_tiled),
    Rung("grouped", "programs that run at once cover a block of c and share tiles in the L2 cache", launch_grouped),
    Rung(
        "tensor_cores", "16-bit tiles go to the tensor cores, one instruction for a whole warp", launch_tensor_cores,
        needs="sm_80", instead="rung 'grouped'", refuses=_not_16_bit,
    ),
    Rung(
        "pipelined", "loads run stages ahead, and larger tiles give them time", launch_pipelined,
        needs="sm_80", instead="rung 'grouped'", refuses=_not_16_bit,
    ),
    Rung(
        "persistent", "tiles copied by TMA, and a program an SM that loads the next while it writes the last",
        launch_persistent,
        needs="sm_90", instead="rung 'pipelined' (from sm_80 on) or 'grouped'", nvidia=True, refuses=_not_for_tma,
    ),
)  # fmt: skip


def examples(dtype=torch.bfloat16):
    """The launches for `fastkit compile`, at the size that is benchmarked."""
    return rung_examples(
        RUNGS, "8192x8192x8192", *(torch.empty(8192, 8192, dtype=dtype, device="meta") for _ in range(3))
    )


def matmul(a: torch.Tensor, b: torch.Tensor, rung: str | None = None) -> torch.Tensor:
    """a @ b, by one of RUNGS (None: the last that these tensors and their device can take).

    a        [M, K], float32, float16 or bfloat16, any strides; "persistent" wants rows or columns that TMA can copy.
    b        [K, N], the same dtype and device; for b given as [N, K], pass b.T.
    returns  [M, N], contiguous, in that dtype. Sums are fp32 with one rounding at the end.

    Not differentiable: a ladder is for measuring. Raises TypeError for another dtype or two different ones, ValueError
    for shapes that do not match, tensors that the rung refuses or a rung that there is not, NotImplementedError for a
    device without kernels or without what the rung needs. CPU tensors take `reference` (see `on_triton`).
    """
    check_floats("matmul", a=a, b=b)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul: a has shape {tuple(a.shape)} and b {tuple(b.shape)}; give [M, K] and [K, N]")
    if a.dtype != b.dtype:
        raise TypeError(f"matmul: b has dtype {b.dtype} but a has {a.dtype}; convert one to the other's")
    chosen = find("matmul", RUNGS, rung)
    if not on_triton("matmul", "a", a):
        return reference(a, b)
    c = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    (chosen or best(RUNGS, a, b, c)).launch(a, b, c)
    return c
