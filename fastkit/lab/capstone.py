"""The capstone's step: the MLP half of a decoder layer, and one step of training of its last weight.

    n      = norm(x) * weight              [M, K]
    hidden = n @ gate_up                   [M, 2 I]
    a      = silu(gate) * up               [M, I], of hidden's halves
    y      = x + a @ down                  [M, K]
    dy     = y - target                    the gradient of half the squared distance
    dw     = a.T @ dy                      [I, K], clipped to a norm of MOST
    down   = down - lr * dw                in place

Everything is float16 and computed in float32. The result is right, and five of the parts waste, on purpose, what the
course has taught to save: nothing is to be mended here. What is wrong, `fastkit.lab.exercises.capstone` knows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fastkit.kernels.common import Cost, fp32, tl, triton
from fastkit.kernels.ladders.rung import gl, gluon

EPS, MOST, LR = 1e-5, 1.0, 1e-3
TOKENS, HIDDEN, INTERMEDIATE = 2048, 4096, 14336  # Mistral-7B's, for one sequence


@dataclass(frozen=True)
class Parts:
    """The functions that a step is made of; dataclasses.replace(parts, norm=yours) exchanges one.

    norm      (x [M, K], weight [K]) -> [M, K]
    multiply  (a [M, K], b [K, N]) -> [M, N]; a may be the transpose of a contiguous matrix
    gate      (hidden [M, 2 I]) -> [M, I]
    combine   (x, y, factor) -> x + factor * y, all [M, K]
    turn      (a [M, I]) -> [I, M]
    clip      (dw) -> dw, in place, no longer than MOST
    update    (w, dw, lr) -> None; w becomes w - lr * dw
    """

    norm: Callable
    multiply: Callable
    gate: Callable
    combine: Callable
    turn: Callable
    clip: Callable
    update: Callable


@dataclass(frozen=True)
class Batch:
    """What a step works on, in float16: x and target [M, K], weight [K], gate_up [K, 2 I], down [I, K]."""

    x: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def batch(M: int = TOKENS, K: int = HIDDEN, I: int = INTERMEDIATE, device: str = "meta", seed: int = 0) -> Batch:
    """Random numbers of a layer's size; on "meta" shapes alone."""
    if device == "meta":
        draw = partial(torch.empty, dtype=torch.float16, device=device)
    else:
        generator = torch.Generator(device).manual_seed(seed)
        draw = partial(torch.randn, dtype=torch.float16, device=device, generator=generator)
    return Batch(draw(M, K), draw(M, K), draw(K), draw(K, 2 * I).mul_(K**-0.5), draw(I, K).mul_(I**-0.5))


def step(parts: Parts, batch: Batch) -> torch.Tensor:
    """y [M, K]. Changes batch.down."""
    a = parts.gate(parts.multiply(parts.norm(batch.x, batch.weight), batch.gate_up))
    y = parts.combine(batch.x, parts.multiply(a, batch.down), 1.0)
    dy = parts.combine(y, batch.target, -1.0)
    dw = parts.clip(parts.multiply(parts.turn(a), dy))
    parts.update(batch.down, dw, LR)
    return y


def costs(batch: Batch) -> dict[str, Cost]:
    """The least work of each of `calls`."""
    (M, K), I = batch.x.shape, batch.down.shape[0]

    def elementwise(numbers: int) -> Cost:
        return Cost(bytes_moved=2 * numbers, flops=0)

    def product(m: int, n: int, k: int) -> Cost:
        return Cost(bytes_moved=2 * (m * k + k * n + m * n), flops=2 * m * n * k)

    return {
        "norm": elementwise(2 * M * K + K),  # read x, weight; write n
        "multiply, gate and up": product(M, 2 * I, K),
        "gate": elementwise(3 * M * I),  # read both halves, write a
        "multiply, down": product(M, K, I),
        "combine": elementwise(3 * M * K),  # read x, y; write out
        "turn": elementwise(2 * M * I),  # read a, write its transpose
        "multiply, dw": product(I, K, M),
        "clip": elementwise(3 * I * K),  # read dw for its norm; read and write it
        "update": elementwise(3 * I * K),  # read w, dw; write w
    }


def calls(parts: Parts, batch: Batch) -> dict[str, Callable[[], object]]:
    """The step's calls by name, in its order, each on tensors of its shape on the batch's device.

    The step calls combine twice.
    """
    (M, K), I = batch.x.shape, batch.down.shape[0]
    zeros = partial(torch.zeros, dtype=torch.float16, device=batch.x.device)
    n, hidden, a, at, dw = zeros(M, K), zeros(M, 2 * I), zeros(M, I), zeros(I, M), zeros(I, K)
    return {
        "norm": partial(parts.norm, batch.x, batch.weight),
        "multiply, gate and up": partial(parts.multiply, n, batch.gate_up),
        "gate": partial(parts.gate, hidden),
        "multiply, down": partial(parts.multiply, a, batch.down),
        "combine": partial(parts.combine, batch.x, n, 1.0),
        "turn": partial(parts.turn, a),
        "multiply, dw": partial(parts.multiply, at, n),
        "clip": partial(parts.clip, dw),
        "update": partial(parts.update, batch.down, dw, LR),
    }


@triton.jit
def _norm_kernel(x_ptr, weight_ptr, y_ptr, N, eps, LANES: tl.constexpr, STEPS: tl.constexpr):
    """One program scales a row, in which each lane has STEPS numbers."""
    row = tl.program_id(0).to(tl.int64) * N
    lanes = tl.arange(0, LANES)  # [LANES]
    squares = tl.zeros([LANES], tl.float32)
    for step in range(STEPS):
        cols = lanes * STEPS + step
        x = tl.load(x_ptr + row + cols, mask=cols < N, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares) / N + fp32(eps))
    for step in range(STEPS):
        cols = lanes * STEPS + step
        x = tl.load(x_ptr + row + cols, mask=cols < N, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + row + cols, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=cols < N)


def norm(x, weight):
    M, N = x.shape
    y = torch.empty_like(x)
    _norm_kernel[(M,)](x, weight, y, N, EPS, LANES=128, STEPS=triton.cdiv(N, 128), num_warps=4)
    return y


@triton.jit
def _multiply_kernel(
    a_ptr, b_ptr, c_ptr,
    M, N, K, stride_am, stride_ak, stride_bk, stride_cm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program writes a tile of c. Rows of b and c are contiguous."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    cols = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_rows, in_cols = (rows < M)[:, None], (cols < N)[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        a_ptrs = a_ptr + rows[:, None] * stride_am + ks[None, :].to(tl.int64) * stride_ak
        b_ptrs = b_ptr + ks[:, None].to(tl.int64) * stride_bk + cols[None, :]
        a = tl.load(a_ptrs, mask=in_rows & (ks < K)[None, :], other=0.0).to(tl.float32)
        b = tl.load(b_ptrs, mask=(ks < K)[:, None] & in_cols, other=0.0).to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    tl.store(c_ptr + rows[:, None] * stride_cm + cols[None, :], sums.to(c_ptr.dtype.element_ty), mask=in_rows & in_cols)


def multiply(a, b):
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty(M, N, dtype=a.dtype, device=a.device)
    grid = (triton.cdiv(M, 64) * triton.cdiv(N, 64),)
    strides = (*a.stride(), b.stride(0), c.stride(0))
    _multiply_kernel[grid](
        a, b, c, M, N, K, *strides, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=1
    )  # fmt: skip
    return c


@triton.jit
def _gate_kernel(
    gate_ptr, up_ptr, a_ptr,
    N, stride_gatem, stride_upm, stride_am,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK neighbouring numbers of one row."""
    blocks = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    gate = tl.load(gate_ptr + row * stride_gatem + cols, mask=cols < N, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_upm + cols, mask=cols < N, other=0.0).to(tl.float32)
    a = gate * tl.sigmoid(gate) * up
    tl.store(a_ptr + row * stride_am + cols, a.to(a_ptr.dtype.element_ty), mask=cols < N)


def gate(hidden):
    gate, up = hidden.float().chunk(2, dim=1)  # exp wants fp32
    a = torch.empty(gate.shape, dtype=torch.float32, device=gate.device)
    M, N = a.shape
    grid = (M * triton.cdiv(N, 1024),)
    _gate_kernel[grid](gate, up, a, N, gate.stride(0), up.stride(0), a.stride(0), BLOCK=1024, num_warps=4)
    return a.to(hidden.dtype)


@triton.jit
def _combine_kernel(x_ptr, y_ptr, out_ptr, factor, n, BLOCK: tl.constexpr):
    """One program writes BLOCK numbers of out. Out may be x."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    x = tl.load(x_ptr + places, mask=places < n, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + places, mask=places < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, (x + fp32(factor) * y).to(out_ptr.dtype.element_ty), mask=places < n)


def _combine(x, y, out, factor):
    n = x.numel()
    _combine_kernel[(triton.cdiv(n, 1024),)](x, y, out, float(factor), n, BLOCK=1024, num_warps=4)


def combine(x, y, factor):
    out = torch.empty_like(x)
    _combine(x, y, out, factor)
    return out


@gluon.jit
def _turn_kernel(
    x_ptr, y_ptr, M, N,
    BLOCK: gl.constexpr, LANES: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """One program turns a tile of [BLOCK, BLOCK]: x [M, N] and y [N, M] in LANES, shared memory in TILE."""
    blocks = gl.cdiv(N, BLOCK)
    downs = gl.arange(0, BLOCK, gl.SliceLayout(1, LANES))  # [BLOCK], along a tile's first side
    acrosses = gl.arange(0, BLOCK, gl.SliceLayout(0, LANES))  # [BLOCK], along its second
    row, col = gl.program_id(0) // blocks * BLOCK, gl.program_id(0) % blocks * BLOCK
    x_rows, x_cols = (row + downs)[:, None], (col + acrosses)[None, :]
    x = gl.load(x_ptr + x_rows.to(gl.int64) * N + x_cols, mask=(x_rows < M) & (x_cols < N), other=0.0)
    tile = gl.allocate_shared_memory(x.dtype, [BLOCK, BLOCK], TILE, x)
    y = tile.permute((1, 0)).load(LANES)
    y_rows, y_cols = (col + downs)[:, None], (row + acrosses)[None, :]
    gl.store(y_ptr + y_rows.to(gl.int64) * M + y_cols, y, mask=(y_rows < N) & (y_cols < M))


def turn(x):
    M, N = x.shape
    y = torch.empty(N, M, dtype=x.dtype, device=x.device)
    lanes = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    tile = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0])
    grid = (triton.cdiv(M, 32) * triton.cdiv(N, 32),)
    _turn_kernel[grid](x, y, M, N, BLOCK=32, LANES=lanes, TILE=tile, num_warps=4)
    return y


def clip(dw):
    norm = torch.linalg.vector_norm(dw, dtype=torch.float32)
    if norm > MOST:
        dw.mul_(MOST / norm)
    return dw


def update(w, dw, lr):
    _combine(w, dw, w, -lr)


PLANTED = Parts(norm, multiply, gate, combine, turn, clip, update)
