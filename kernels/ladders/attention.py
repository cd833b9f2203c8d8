"""Attention, the ladder of fusion: o = softmax(scale q kᵀ) v, head by head, q, k, v and o [B, H, T, D], all keys seen.

Two matrix products with a softmax between them, of T² scores a head. At T = 2048 and D = 128 the scores are 16 times as
many as the numbers of q, so where they live decides:

naive         In memory, as torch's three lines would have them: a product writes them, a softmax reads and rewrites
              them, a second product reads them. The products take a thread per number.
tiled         Nowhere. A program owns some queries, computes their scores block by block, uses them and forgets them.
              The softmax wants its maximum first, so there are two walks over the keys: one for the maximum, one, with
              the same scores computed again, for the rest.
online        One walk. A block's scores are taken against the largest so far, and when a later block brings a larger
              one, what has been summed is scaled down to it (Milakov & Gimelshein 2018, arXiv:1805.02867): a third of
              the arithmetic gone, and half of K's traffic.
tensor_cores  Tiles stay in 16 bits and go to the tensor cores, with sums in fp32. A warp owns whole rows of scores, so
              that a row's maximum and sum stay inside the warp, and p goes from one product to the next in registers.
pipelined     The tensor cores would wait for each block. The next blocks of K and V load ahead, through shared memory.
              The plain cores have no such rung: they cut rows of K into chunks too narrow to copy ahead.

Masks, grouped heads, packed sequences and the backward are the library's: kernels/attention.py.

Casts: scores, softmax and sums are fp32. On tensor cores p is rounded to the inputs' dtype before it multiplies v; the
other rungs multiply in fp32. A result is rounded once, when it is stored.
"""

import math

import torch

from fastkit.kernels.common import Cost, architecture, check_floats, on_triton, tl, triton
from fastkit.kernels.ladders.rung import Rung, best, find
from fastkit.kernels.ladders.rung import examples as rung_examples

MAX_D = 256
MAX_T = 32768  # of the naive rung, whose softmax holds a row of scores in registers
LOG2_E = math.log2(math.e)


def cost(B: int, H: int, T: int, D: int, dtype=torch.float16) -> Cost:
    """The least work for q, k, v and o [B, H, T, D] of `dtype`; operations are the products', as commonly counted."""
    return Cost(
        bytes_moved=4 * B * H * T * D * dtype.itemsize,  # read q, k, v; write o
        flops=4 * B * H * T * T * D,  # q k, p v
    )


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, rounded once. fp64 stays fp64: the tests' truth."""
    accurate = torch.promote_types(q.dtype, torch.float32)
    s = q.to(accurate) @ k.to(accurate).mT * q.shape[-1] ** -0.5
    return (s.softmax(-1) @ v.to(accurate)).to(q.dtype)


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, c_ptr,
    M, N, K, stride_bk, stride_bn, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program writes a tile of c = factor a @ b for one head, a number a thread; a and c have adjacent rows."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_n
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    rows = (tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    cols = (tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BLOCK_N]
    in_rows, in_cols = rows < M, cols < N
    a_ptrs = a_ptr + head * M * K + rows * K  # [BLOCK_M]
    b_ptrs = b_ptr + head * N * K + cols * stride_bn  # [BLOCK_N]

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, K):
        a = tl.load(a_ptrs, mask=in_rows, other=0.0).to(tl.float32)
        b = tl.load(b_ptrs, mask=in_cols, other=0.0).to(tl.float32)
        sums += a[:, None] * b[None, :]
        a_ptrs += 1
        b_ptrs += stride_bk

    c_ptrs = c_ptr + head * M * N + rows[:, None] * N + cols[None, :]
    c = (sums * factor).to(c_ptr.dtype.element_ty)
    tl.store(c_ptrs, c, mask=in_rows[:, None] & in_cols[None, :])


@triton.jit
def _softmax_kernel(s_ptr, N, BLOCK_N: tl.constexpr):
    """One program makes probabilities of one row of scores, in place."""
    cols = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    ptrs = s_ptr + tl.program_id(0).to(tl.int64) * N + cols
    s = tl.load(ptrs, mask=cols < N, other=float("-inf"))
    p = tl.exp(s - tl.max(s, axis=0))
    tl.store(ptrs, p * (1.0 / tl.sum(p, axis=0)), mask=cols < N)


@triton.jit
def _load(x_ptr, row, dim, T, D: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """Numbers dim, dim + 1, ... of rows row, row + 1, ... of a head: [ROWS, DIMS], zeros beyond T and D."""
    rows, dims = row + tl.arange(0, ROWS), dim + tl.arange(0, DIMS)
    return tl.load(x_ptr + rows[:, None] * D + dims[None, :], mask=(rows < T)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def _place(T, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """(offset of this program's head, its first query)."""
    blocks = tl.cdiv(T, BLOCK_M)
    return (tl.program_id(0) // blocks).to(tl.int64) * T * D, tl.program_id(0) % blocks * BLOCK_M


@triton.jit
def _store(o_ptr, o, row, T, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, dims = row + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    mask = (rows < T)[:, None] & (dims < D)[None, :]
    tl.store(o_ptr + rows[:, None] * D + dims[None, :], o.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hide(s, n, T, BLOCK_N: tl.constexpr):
    """The scores s [BLOCK_M, BLOCK_N] of the keys from n on: -inf for those beyond T."""
    return tl.where((n + tl.arange(0, BLOCK_N) < T)[None, :], s, float("-inf"))


@triton.jit
def _scores(
    q_ptr, k_ptr, row, n, T, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] in units of log 2, in fp32 on the plain cores, which hold BLOCK_K numbers of a row at once."""
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for dim in tl.static_range(0, D, BLOCK_K):
        q = _load(q_ptr, row, dim, T, D, BLOCK_M, BLOCK_K).to(tl.float32)
        k = _load(k_ptr, n, dim, T, D, BLOCK_N, BLOCK_K).to(tl.float32)
        s = tl.dot(q, k.T, s, input_precision="ieee")
    return _hide(s * scale_log2, n, T, BLOCK_N)


@triton.jit
def _tiled_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,
    T, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_M rows of o, in two walks over the keys, on the plain cores."""
    head, row = _place(T, D, BLOCK_M)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for n in range(0, T, BLOCK_N):
        s = _scores(q_ptr + head, k_ptr + head, row, n, T, scale_log2, D, BLOCK_M, BLOCK_N, BLOCK_K)
        row_max = tl.maximum(row_max, tl.max(s, 1))

    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(0, T, BLOCK_N):
        s = _scores(q_ptr + head, k_ptr + head, row, n, T, scale_log2, D, BLOCK_M, BLOCK_N, BLOCK_K)
        p = tl.exp2(s - row_max[:, None])
        row_sum += tl.sum(p, 1)
        v = _load(v_ptr + head, n, 0, T, D, BLOCK_N, BLOCK_D).to(tl.float32)
        acc = tl.dot(p, v, acc, input_precision="ieee")
    _store(o_ptr + head, acc * (1.0 / row_sum)[:, None], row, T, D, BLOCK_M, BLOCK_D)


@triton.jit
def _online_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,
    T, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_M rows of o, in one walk. How many stages its loop has is said at the launch."""
    head, row = _place(T, D, BLOCK_M)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(0, T, BLOCK_N):
        s = _scores(q_ptr + head, k_ptr + head, row, n, T, scale_log2, D, BLOCK_M, BLOCK_N, BLOCK_K)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * decay + tl.sum(p, 1)
        v = _load(v_ptr + head, n, 0, T, D, BLOCK_N, BLOCK_D).to(tl.float32)
        acc = tl.dot(p, v, acc * decay[:, None], input_precision="ieee")
    _store(o_ptr + head, acc * (1.0 / row_sum)[:, None], row, T, D, BLOCK_M, BLOCK_D)


@triton.jit
def _tensor_core_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,
    T, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_M rows of o, on the tensor cores."""
    head, row = _place(T, D, BLOCK_M)
    q = _load(q_ptr + head, row, 0, T, D, BLOCK_M, BLOCK_D)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(0, T, BLOCK_N):
        k = _load(k_ptr + head, n, 0, T, D, BLOCK_N, BLOCK_D)
        s = _hide(tl.dot(q, k.T) * scale_log2, n, T, BLOCK_N)  # [BLOCK_M, BLOCK_N]
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * decay + tl.sum(p, 1)
        v = _load(v_ptr + head, n, 0, T, D, BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None])
    _store(o_ptr + head, acc * (1.0 / row_sum)[:, None], row, T, D, BLOCK_M, BLOCK_D)


def _launch_blocks(kernel, q, k, v, o, tiling: dict) -> None:
    """One program for each block of queries. The grid is 1-D: its other axes end at 65,535."""
    B, H, T, D = q.shape
    grid = (triton.cdiv(T, tiling["BLOCK_M"]) * B * H,)
    BLOCK_D = max(16, triton.next_power_of_2(D))
    kernel[grid](q, k, v, o, T, D**-0.5 * LOG2_E, D=D, BLOCK_D=BLOCK_D, **tiling)


def launch_naive(q, k, v, o, BLOCK_M: int = 32, BLOCK_N: int = 32, num_warps: int | None = None) -> None:
    """As many warps as have a thread for each number of a tile; gfx9's have 64 threads."""
    B, H, T, D = q.shape
    num_warps = num_warps or (16 if architecture(q.device).startswith("gfx9") else 32)
    sizes = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps}
    s = torch.empty(B * H, T, T, dtype=torch.float32, device=q.device)
    tiles = triton.cdiv(T, BLOCK_M) * B * H
    _product_kernel[(tiles * triton.cdiv(T, BLOCK_N),)](q, k, s, T, T, D, 1, D, D**-0.5, **sizes)
    BLOCK = triton.next_power_of_2(T)
    _softmax_kernel[(B * H * T,)](s, T, BLOCK_N=BLOCK, num_warps=min(max(BLOCK // 1024, 1), 16))
    _product_kernel[(tiles * triton.cdiv(D, BLOCK_N),)](s, v, o, T, D, T, D, 1, 1.0, **sizes)


def _plain_tiling(q) -> dict[str, int]:
    """What registers hold of operands in fp32; on gfx11 the compiler keeps more of them there."""
    BLOCK_M = 16 if architecture(q.device).startswith("gfx11") else 64 if q.shape[3] <= 128 else 32
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1}


def launch_tiled(q, k, v, o, **tiling) -> None:
    _launch_blocks(_tiled_kernel, q, k, v, o, _plain_tiling(q) | tiling)


def launch_online(q, k, v, o, **tiling) -> None:
    _launch_blocks(_online_kernel, q, k, v, o, _plain_tiling(q) | tiling)


def _tensor_tiling(D: int, arch: str) -> dict[str, int]:
    """Eight warps with whole rows of scores, in up to 96 KiB of shared memory; 64 on AMD, whose warps hold more."""
    large = {"BLOCK_M": 128, "BLOCK_N": 64} if D <= 128 else {"BLOCK_M": 64, "BLOCK_N": 32}
    return large | {"num_warps": 8} | ({"BLOCK_N": 32} if arch.startswith("gfx") else {})


def launch_tensor_cores(q, k, v, o, **tiling) -> None:
    chosen = _tensor_tiling(q.shape[3], architecture(q.device)) | {"num_stages": 1}
    _launch_blocks(_tensor_core_kernel, q, k, v, o, chosen | tiling)


def launch_pipelined(q, k, v, o, **tiling) -> None:
    arch = architecture(q.device)
    stages = 3 if q.shape[3] <= 128 and arch.startswith("sm_") else 2
    _launch_blocks(_tensor_core_kernel, q, k, v, o, _tensor_tiling(q.shape[3], arch) | {"num_stages": stages} | tiling)


def _too_long(q, k, v, o) -> str:
    T = q.shape[2]
    return f"holds a row of scores in registers, up to {MAX_T}, and q has T = {T}: use 'tiled'" if T > MAX_T else ""


def _not_16_bit(q, k, v, o) -> str:
    return "" if q.element_size() == 2 else f"takes float16 and bfloat16, and q has {q.dtype}: use 'online'"


RUNGS = (
    Rung("naive", "two products and a softmax, the scores in memory between them", launch_naive, refuses=_too_long),
    Rung("tiled", "scores never leave the program that uses them; computed twice, for the maximum first", launch_tiled),
    Rung("online", "one walk: sums are scaled down when a larger score comes", launch_online),
    Rung(
        "tensor_cores", "16-bit tiles go to the tensor cores, a warp owning whole rows of scores", launch_tensor_cores,
        needs="sm_80", instead="rung 'online'", refuses=_not_16_bit,
    ),
    Rung(
        "pipelined", "the next blocks of K and V load while this one is computed", launch_pipelined,
        needs="sm_80", instead="rung 'online'", refuses=_not_16_bit,
    ),
)  # fmt: skip


def examples(dtype=torch.bfloat16):
    """The launches for `fastkit compile`, at the size that is benchmarked."""
    tensors = (torch.empty(4, 32, 2048, 128, dtype=dtype, device="meta") for _ in range(4))
    return rung_examples(RUNGS, "4x32x2048x128", *tensors)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rung: str | None = None) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(D)) v, head by head, by one of RUNGS (None: the last that these tensors can take).

    q, k, v  [B, H, T, D], the same shape, contiguous, float32, float16 or bfloat16, 1 <= D <= 256.
    returns  that shape, contiguous, in that dtype.

    Not differentiable: a ladder is for measuring. Raises TypeError for another dtype or two different ones, ValueError
    for other shapes, tensors that are not contiguous or that the rung refuses, or a rung that there is not,
    NotImplementedError for a device without kernels or without what the rung needs. CPU tensors take `reference` (see
    `on_triton`).
    """
    check_floats("attend", q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape != q.shape or not 1 <= x.shape[3] <= MAX_D:
            raise ValueError(f"attend: {name} has shape {tuple(x.shape)}; give three [B, H, T, D], D up to {MAX_D}")
        if x.dtype != q.dtype:
            raise TypeError(f"attend: {name} has dtype {x.dtype} but q has {q.dtype}; convert one to the other's")
        if not x.is_contiguous():
            raise ValueError(f"attend: {name} has strides {x.stride()}; pass {name}.contiguous()")
    chosen = find("attend", RUNGS, rung)
    if not on_triton("attend", "q", q):
        return reference(q, k, v)
    o = torch.empty_like(q)
    (chosen or best(RUNGS, q, k, v, o)).launch(q, k, v, o)
    return o
