"""SwiGLU: one projection, passed through silu, gates another (Shazeer 2020, arXiv:2002.05202).

Forward, for each pair of numbers:

    sigmoid = 1 / (1 + exp(-gate))
    silu    = gate * sigmoid
    y       = silu * up

Backward, given dy = ∂L/∂y. With sigmoid' = sigmoid * (1 - sigmoid), the product rule gives

    dsilu = ∂silu/∂gate = sigmoid + gate * sigmoid * (1 - sigmoid) = sigmoid * (1 + gate * (1 - sigmoid))
    dup   = dy * silu
    dgate = dy * up * dsilu

Saved for the backward: gate and up, the caller's own tensors. sigmoid and silu are recomputed: to keep them would write
and read as much memory as gate itself, to save a few instructions in a kernel that waits for memory anyway.

Casts: every load is converted to fp32 at once and all arithmetic is fp32; a result is rounded once, when it is stored.
Hugging Face's MLP rounds twice, silu(gate) and then its product with up: we can differ from it in the last bit, and
have the smaller error bound. y, dgate and dup have the dtype of gate and up.
"""

import functools
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from fastkit.kernels.common import Cost, as_rows, check_floats, device_of, on_triton, tl, triton


def cost(M: int, N: int, dtype=torch.bfloat16) -> tuple[Cost, Cost]:
    """The least work for gate and up [M, N] of `dtype`: (forward, backward)."""
    tensor_bytes = M * N * dtype.itemsize
    forward = Cost(
        bytes_moved=3 * tensor_bytes,  # read gate, up; write y
        flops=6 * M * N,  # sigmoid 4, silu, * up
    )
    backward = Cost(
        bytes_moved=5 * tensor_bytes,  # read dy, gate, up; write dgate, dup
        flops=12 * M * N,  # sigmoid 4, silu, dsilu 4, dup, dgate 2
    )
    return forward, backward


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, with the same casts, differentiated by autograd. fp64 stays fp64: the tests' truth."""
    accurate = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(accurate)) * up.to(accurate)).to(gate.dtype)


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr,
    N, stride_gatem, stride_upm, stride_ym,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_N neighbouring numbers of one row. The grid is 1-D: its other axes end at 65,535."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks_n).to(tl.int64)  # row * stride, or a flat tensor's columns, can pass 2**31
    cols = (tl.program_id(0) % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = cols < N

    gate = tl.load(gate_ptr + row * stride_gatem + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_upm + cols, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * stride_ym + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, y_ptr,
    N, stride_dym, stride_gatem, stride_upm, stride_dgatem, stride_dupm, stride_ym,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_N neighbouring numbers of a row of dgate, dup and y, if given; it reads all before."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks_n).to(tl.int64)
    cols = (tl.program_id(0) % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = cols < N

    dy = tl.load(dy_ptr + row * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gatem + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_upm + cols, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dsilu = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * silu
    dgate = dy * up * dsilu
    tl.store(dgate_ptr + row * stride_dgatem + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * stride_dupm + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    if y_ptr is not None:
        tl.store(y_ptr + row * stride_ym + cols, (silu * up).to(y_ptr.dtype.element_ty), mask=mask)


def elementwise_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors as rows: a single one, as long as it gets, if all are contiguous; else [M, N] (see `as_rows`).

    An elementwise operation knows no rows, so a contiguous tensor is best cut into full blocks wherever its rows end.
    """
    if all(map(torch.Tensor.is_contiguous, tensors)):
        return [tensor.view(1, -1) for tensor in tensors]
    return [as_rows(tensor) for tensor in tensors]


def elementwise_grid(M: int, N: int, **tiling) -> tuple[tuple[int], dict[str, int]]:
    """The grid and its tiling: 1024 numbers a program, 8 a thread, one 128-bit load of each input in a 16-bit dtype.

    One tiling for every N, so that torch.compile need not compile anew for each. `tiling` overrides BLOCK_N, num_warps.
    """
    tiling = {"BLOCK_N": 1024, "num_warps": 4} | tiling
    return (M * -(-N // tiling["BLOCK_N"]),), tiling


def launch_forward(gate, up, y, **tiling) -> None:
    """Write y, given gate and up, all [M, N]. Rows may be any stride apart. y may be gate or up itself.

    `tiling` overrides BLOCK_N and num_warps.
    """
    M, N = gate.shape
    if M * N == 0:
        return
    grid, tiling = elementwise_grid(M, N, **tiling)
    with device_of(gate):
        _forward_kernel[grid](gate, up, y, N, gate.stride(0), up.stride(0), y.stride(0), **tiling)


def launch_backward(dy, gate, up, dgate, dup, y=None, **tiling) -> None:
    """Write dgate and dup, given dy, gate and up, all [M, N]; and y again if given. Rows may be any stride apart.

    dgate may be gate itself, dup up and y dy, which saves buffers and destroys the inputs: for callers that own them.
    Each number is read before it is overwritten, by the one program that needs it. `tiling` as in the forward.
    """
    M, N = gate.shape
    if M * N == 0:
        return
    grid, tiling = elementwise_grid(M, N, **tiling)
    with device_of(gate):
        _backward_kernel[grid](
            dy, gate, up, dgate, dup, y,
            N, dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0),
            0 if y is None else y.stride(0), **tiling,
        )  # fmt: skip


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    M, N = 8192, 14336  # Mistral-7B, 4 sequences of 2,048 tokens
    dy, gate, up, dgate, dup = elementwise_rows(*(torch.empty(M, N, dtype=dtype, device="meta") for _ in range(5)))
    return {
        f"forward {M}x{N}": functools.partial(launch_forward, gate, up, dy),
        f"backward {M}x{N}": functools.partial(launch_backward, dy, gate, up, dgate, dup),
    }


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        y = gate.new_empty(gate.shape)
        launch_forward(*elementwise_rows(gate, up, y))
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
        launch_backward(*elementwise_rows(dy, gate, up, dgate, dup))
        return dgate, dup


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020, arXiv:2002.05202).

    gate, up  the same shape, dtype (float32, float16 or bfloat16) and device. Contiguous tensors and column slices of
              them, such as the halves of a stacked projection's [M, 2N] output, are read in place; other layouts are
              copied first. Take the halves with `stacked.chunk(2, -1)`: its backward joins both gradients in one copy.
    returns   that shape, contiguous, in that dtype. Arithmetic is fp32 with one rounding at the end; so under autocast.

    Differentiable once. Raises TypeError for another dtype or two different ones, ValueError for shapes or devices that
    do not match, NotImplementedError for a device without kernels. CPU tensors take `reference` (see `on_triton`).
    """
    check_floats("swiglu", gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: up has shape {tuple(up.shape)} but gate has {tuple(gate.shape)}; make them the same")
    if gate.dtype != up.dtype:
        raise TypeError(f"swiglu: up has dtype {up.dtype} but gate has {gate.dtype}; convert one to the other's")
    if not on_triton("swiglu", "gate", gate):
        return reference(gate, up)
    return _SwiGLU.apply(gate, up)
