"""Transpose, the ladder of shared memory: y[n, m] = x[m, n].

Rows of x are columns of y, so a warp whose lanes stand along a row of either has them strided in the other. The way out
is a tile in shared memory, written along x and read along y. That memory has 32 banks of 4 bytes: number i of a tile of
float32 lies in bank i % 32, and a request takes as many turns as its busiest bank has different words to give.

naive       Reads rows of x side by side, writes them as columns of y: 32 sectors a store, 4 bytes of each used.
automatic   A square tile, transposed by `tl.trans`. Triton sees that load and store want different layouts and takes
            the tile through shared memory by itself, in a layout of its own. The rungs below open that box, in Gluon.
shared      The same by hand, the tile stored row after row. A row is 32 words, so a column lies in one bank: 31
            conflicts a request (in a 16-bit dtype two lanes share a word, and two rows a round of banks: 15).
swizzled    Number (m, n) goes to column n ^ m of its row. Rows and columns then both touch every bank once.
padded      One word is left empty after each row, which shifts the next one by a bank: as good, for 3% more memory.
vectorised  16 bytes a lane to and from memory. What a lane writes along y lies in 4 rows of the tile (8 in a 16-bit
            dtype) and takes as many loads; the swizzle moves pieces of 16 bytes, those 4 rows' all alike.
"""

import functools

import torch

from fastkit.kernels.common import Cost, check_floats, on_triton, tl, triton
from fastkit.kernels.ladders.rung import Rung, best, find, gl, gluon
from fastkit.kernels.ladders.rung import examples as rung_examples


def cost(M: int, N: int, dtype=torch.float32) -> Cost:
    """The least work to transpose [M, N] of `dtype`."""
    return Cost(bytes_moved=2 * M * N * dtype.itemsize, flops=0)  # read x, write y


def reference(x: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    return x.mT.contiguous()


@triton.jit
def _naive_kernel(
    x_ptr, y_ptr,
    M, N, stride_xm, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program moves BLOCK_M rows of x, each BLOCK_N long, a number a lane, to as many columns of y."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // blocks_n * BLOCK_M
    cols = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    cols = cols.to(tl.int64)  # cols * stride can pass 2**31
    for step in range(BLOCK_M):
        row = (rows + step).to(tl.int64)
        mask = (row < M) & (cols < N)
        x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0)
        tl.store(y_ptr + cols * stride_yn + row, x, mask=mask)


@triton.jit
def _automatic_kernel(
    x_ptr, y_ptr,
    M, N, stride_xm, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program transposes a tile of [BLOCK_M, BLOCK_N]."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    cols = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    x_offsets = rows[:, None].to(tl.int64) * stride_xm + cols[None, :]  # [BLOCK_M, BLOCK_N]
    y_offsets = cols[:, None].to(tl.int64) * stride_yn + rows[None, :]  # [BLOCK_N, BLOCK_M]
    x = tl.load(x_ptr + x_offsets, mask=(rows < M)[:, None] & (cols < N)[None, :], other=0.0)
    tl.store(y_ptr + y_offsets, tl.trans(x), mask=(cols < N)[:, None] & (rows < M)[None, :])


@gluon.jit
def _tile_kernel(
    x_ptr, y_ptr,
    M, N, stride_xm, stride_yn,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    X_LAYOUT: gl.constexpr, Y_LAYOUT: gl.constexpr, TILE_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One program transposes a tile of [BLOCK_M, BLOCK_N]: x in X_LAYOUT, shared memory in TILE_LAYOUT, y in Y_LAYOUT.

    The four rungs that use it differ in these layouts alone.
    """
    blocks_n = gl.cdiv(N, BLOCK_N)
    row = gl.program_id(0) // blocks_n * BLOCK_M
    col = gl.program_id(0) % blocks_n * BLOCK_N

    x_rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, X_LAYOUT))  # [BLOCK_M], on the lanes that load x
    x_cols = col + gl.arange(0, BLOCK_N, gl.SliceLayout(0, X_LAYOUT))  # [BLOCK_N]
    x_offsets = x_rows[:, None].to(gl.int64) * stride_xm + x_cols[None, :]
    x = gl.load(x_ptr + x_offsets, mask=(x_rows < M)[:, None] & (x_cols < N)[None, :], other=0.0)
    tile = gl.allocate_shared_memory(x.dtype, [BLOCK_M, BLOCK_N], TILE_LAYOUT, x)
    y = tile.permute((1, 0)).load(Y_LAYOUT)  # [BLOCK_N, BLOCK_M]; the barrier before it is the compiler's

    y_rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, Y_LAYOUT))  # [BLOCK_M], on the lanes that store y
    y_cols = col + gl.arange(0, BLOCK_N, gl.SliceLayout(1, Y_LAYOUT))  # [BLOCK_N]
    y_offsets = y_cols[:, None].to(gl.int64) * stride_yn + y_rows[None, :]
    gl.store(y_ptr + y_offsets, y, mask=(y_cols < N)[:, None] & (y_rows < M)[None, :])


def _grid(x, y, BLOCK_M: int, BLOCK_N: int):
    """What every launch begins with: the 1-D grid (its other axes end at 65,535), then tensors, sizes and strides."""
    M, N = x.shape
    return (triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),), (x, y, M, N, x.stride(0), y.stride(0))


def launch_naive(x, y, BLOCK_M: int = 32, num_warps: int = 4) -> None:
    BLOCK_N = 32 * num_warps
    grid, arguments = _grid(x, y, BLOCK_M, BLOCK_N)
    _naive_kernel[grid](*arguments, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps)


def launch_automatic(x, y, BLOCK_M: int = 64, BLOCK_N: int = 64, num_warps: int = 4) -> None:
    grid, arguments = _grid(x, y, BLOCK_M, BLOCK_N)
    _automatic_kernel[grid](*arguments, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps)


@functools.cache
def layouts(kind: str, itemsize: int, BLOCK_M: int, BLOCK_N: int, num_warps: int) -> dict:
    """The layouts of a Gluon rung: X_LAYOUT and Y_LAYOUT for the lanes, TILE_LAYOUT for shared memory.

    kind  "shared", "swizzled" and "padded" give a lane one number, a warp a row; "vectorised" gives a lane 16 bytes and
          a warp 8 lanes' worth, 128 bytes, of each of 4 rows.
    """
    vector = 16 // itemsize if kind == "vectorised" else 1
    lanes = [4, 8] if kind == "vectorised" else [1, 32]
    lanes = gl.BlockedLayout([1, vector], lanes, [num_warps, 1], [1, 0])
    tile = {
        "shared": lambda: gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0]),
        "swizzled": lambda: gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=32, order=[1, 0]),
        "padded": lambda: gl.PaddedSharedLayout.with_identity_for(
            [[BLOCK_N, 4 // itemsize]], [BLOCK_M, BLOCK_N], [1, 0]
        ),
        "vectorised": lambda: gl.SwizzledSharedLayout(vec=vector, per_phase=vector, max_phase=8, order=[1, 0]),
    }
    return {"X_LAYOUT": lanes, "Y_LAYOUT": lanes, "TILE_LAYOUT": tile[kind]()}


def _launch_gluon(kind: str, x, y, BLOCK_M: int = 32, BLOCK_N: int = 32, num_warps: int = 4) -> None:
    grid, arguments = _grid(x, y, BLOCK_M, BLOCK_N)
    chosen = layouts(kind, x.element_size(), BLOCK_M, BLOCK_N, num_warps)
    _tile_kernel[grid](*arguments, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **chosen, num_warps=num_warps)


def launch_shared(x, y, **tiling) -> None:
    _launch_gluon("shared", x, y, **tiling)


def launch_swizzled(x, y, **tiling) -> None:
    _launch_gluon("swizzled", x, y, **tiling)


def launch_padded(x, y, **tiling) -> None:
    _launch_gluon("padded", x, y, **tiling)


def launch_vectorised(x, y, **tiling) -> None:
    _launch_gluon("vectorised", x, y, **{"BLOCK_M": 64, "BLOCK_N": 64} | tiling)


_SIMPLER = "rung 'automatic' or 'naive'"
RUNGS = (
    Rung("naive", "rows of x are read side by side and written as columns of y, 4 bytes a sector", launch_naive),
    Rung("automatic", "a tile through tl.trans: Triton exchanges it in shared memory by itself", launch_automatic),
    Rung(
        "shared", "the exchange by hand, row after row: columns are one bank, 31 conflicts a request", launch_shared,
        instead=_SIMPLER, nvidia=True, gluon=True,
    ),
    Rung(
        "swizzled", "column n of row m goes to n ^ m: rows and columns both touch every bank once", launch_swizzled,
        instead=_SIMPLER, nvidia=True, gluon=True,
    ),
    Rung(
        "padded", "an empty word after each row does what swizzling does, for some memory", launch_padded,
        instead=_SIMPLER, nvidia=True, gluon=True,
    ),
    Rung(
        "vectorised", "16 bytes a lane in both directions: a quarter of the requests to memory", launch_vectorised,
        instead=_SIMPLER, nvidia=True, gluon=True,
    ),
)  # fmt: skip


def examples(dtype=torch.bfloat16):
    """The launches for `fastkit compile`, at the size that is benchmarked."""
    return rung_examples(RUNGS, "8192x8192", *(torch.empty(8192, 8192, device="meta") for _ in range(2)))


def transpose(x: torch.Tensor, rung: str | None = None) -> torch.Tensor:
    """x with its rows as columns, in memory too, by one of RUNGS (None: the last that runs on x's device).

    x        [M, N], float32, float16 or bfloat16. Rows may be any stride apart; other layouts are copied first.
    returns  [N, M], contiguous, in x's dtype.

    Raises TypeError for another dtype, ValueError for another number of dimensions or a rung that there is not,
    NotImplementedError for a device without kernels or without what the rung needs. CPU tensors take `reference` (see
    `on_triton`).
    """
    check_floats("transpose", x=x)
    if x.dim() != 2:
        raise ValueError(f"transpose: x has shape {tuple(x.shape)}; give two dimensions")
    chosen = find("transpose", RUNGS, rung)
    if not on_triton("transpose", "x", x):
        return reference(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(x.shape[::-1], dtype=x.dtype, device=x.device)
    (chosen or best(RUNGS, x, y)).launch(x, y)
    return y
