"""GeGLU: one projection, passed through GELU, gates another (Shazeer 2020, arXiv:2002.05202), as in Gemma's MLP.

Forward, for each pair of numbers, with Phi the distribution function of the normal distribution N(0, 1):

    gelu = gate * phi
    y    = gelu * up

GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415) has phi = Phi(gate). It is computed exactly, or by that paper's
approximation, 0.5 * (1 + tanh(z)), which is a sigmoid in disguise because tanh(z) = 2 * sigmoid(2z) - 1:

    exact   phi = 0.5 * (1 + erf(gate / sqrt(2)))
    tanh    phi = sigmoid(2z)               with z = sqrt(2/pi) * (gate + 0.044715 * gate³)

Backward, given dy = ∂L/∂y. The product rule gives

    dgelu = ∂gelu/∂gate = phi + gate * dphi
    dup   = dy * gelu
    dgate = dy * up * dgelu

    exact   dphi = exp(-gate² / 2) / sqrt(2 pi), the density of N(0, 1)
    tanh    dphi = 2 * phi * (1 - phi) * ∂z/∂gate         with ∂z/∂gate = sqrt(2/pi) * (1 + 3 * 0.044715 * gate²)

Saved for the backward: gate and up, the caller's own tensors; phi is recomputed, as SwiGLU recomputes its sigmoid.

Casts: every load is converted to fp32 at once and all arithmetic is fp32; a result is rounded once, when it is stored.
Hugging Face's MLP rounds twice, gelu(gate) and then its product with up: we can differ from it in the last bit, and
have the smaller error bound. y, dgate and dup have the dtype of gate and up.
"""

import functools
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from fastkit.kernels import swiglu
from fastkit.kernels.common import Cost, check_floats, device_of, on_triton, tl, triton
from fastkit.kernels.swiglu import elementwise_grid, elementwise_rows


def cost(M: int, N: int, dtype=torch.bfloat16) -> tuple[Cost, Cost]:
    """The least work for gate and up [M, N] of `dtype`: (forward, backward), phi exact."""
    forward, backward = swiglu.cost(M, N, dtype)  # the same tensors
    return (
        Cost(forward.bytes_moved, 6 * M * N),  # phi 4, gelu, * up
        Cost(backward.bytes_moved, 14 * M * N),  # phi 4, dphi 4, gelu, dgelu 2, dup, dgate 2
    )


def reference(gate: torch.Tensor, up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """The same in plain torch, with the same casts, differentiated by autograd. fp64 stays fp64: the tests' truth."""
    accurate = torch.promote_types(gate.dtype, torch.float32)
    gelu = torch.nn.functional.gelu(gate.to(accurate), approximate=approximate)
    return (gelu * up.to(accurate)).to(gate.dtype)


@triton.jit
def _phi_dphi(gate, TANH: tl.constexpr):
    """(phi, ∂phi/∂gate); what a caller does not use is compiled away."""
    if TANH:
        square = tl.minimum(gate * gate, 1e4)  # past |gate| = 100 phi is 0 or 1 anyway; below, no 0 meets an infinity
        z2 = 1.5957691216057308 * gate * (1.0 + 0.044715 * square)  # 2z; the number is 2 sqrt(2/pi)
        phi = tl.sigmoid(z2)
        dphi = phi * tl.sigmoid(-z2) * 1.5957691216057308 * (1.0 + 0.134145 * square)  # 1 - phi would cancel
    else:
        phi = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        dphi = tl.exp(-0.5 * gate * gate) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return phi, dphi


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr,
    N, stride_gatem, stride_upm, stride_ym,
    TANH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_N neighbouring numbers of one row."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks_n).to(tl.int64)  # row * stride, or a flat tensor's columns, can pass 2**31
    cols = (tl.program_id(0) % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = cols < N

    gate = tl.load(gate_ptr + row * stride_gatem + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_upm + cols, mask=mask, other=0.0).to(tl.float32)
    phi, _ = _phi_dphi(gate, TANH)
    y = gate * phi * up
    tl.store(y_ptr + row * stride_ym + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    N, stride_dym, stride_gatem, stride_upm, stride_dgatem, stride_dupm,
    TANH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_N neighbouring numbers of a row of dgate and of dup, all inputs read before."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks_n).to(tl.int64)
    cols = (tl.program_id(0) % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = cols < N

    dy = tl.load(dy_ptr + row * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gatem + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_upm + cols, mask=mask, other=0.0).to(tl.float32)
    phi, dphi = _phi_dphi(gate, TANH)
    dup = dy * (gate * phi)
    dgate = dy * up * (phi + gate * dphi)
    tl.store(dgate_ptr + row * stride_dgatem + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * stride_dupm + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def launch_forward(gate, up, y, approximate: str, **tiling) -> None:
    """Write y, given gate and up, all [M, N]. Rows may be any stride apart. y may be gate or up itself.

    approximate is "none" or "tanh"; `tiling` overrides BLOCK_N and num_warps.
    """
    M, N = gate.shape
    if M * N == 0:
        return
    grid, tiling = elementwise_grid(M, N, **tiling)
    with device_of(gate):
        _forward_kernel[grid](
            gate, up, y, N, gate.stride(0), up.stride(0), y.stride(0), approximate == "tanh", **tiling
        )


def launch_backward(dy, gate, up, dgate, dup, approximate: str, **tiling) -> None:
    """Write dgate and dup, given dy, gate and up, all [M, N]. Rows may be any stride apart.

    dgate may be gate itself and dup up itself, as in swiglu.launch_backward. The rest is as in the forward.
    """
    M, N = gate.shape
    if M * N == 0:
        return
    grid, tiling = elementwise_grid(M, N, **tiling)
    with device_of(gate):
        _backward_kernel[grid](
            dy, gate, up, dgate, dup,
            N, dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0),
            approximate == "tanh", **tiling,
        )  # fmt: skip


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    M, N, found = 8192, 24576, {}  # Gemma-7B, 4 sequences of 2,048 tokens
    dy, gate, up, dgate, dup = elementwise_rows(*(torch.empty(M, N, dtype=dtype, device="meta") for _ in range(5)))
    for approximate, name in (("none", "exact"), ("tanh", "tanh")):
        found[f"forward, {name}, {M}x{N}"] = functools.partial(launch_forward, gate, up, dy, approximate)
        found[f"backward, {name}, {M}x{N}"] = functools.partial(launch_backward, dy, gate, up, dgate, dup, approximate)
    return found


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, approximate):
        y = gate.new_empty(gate.shape)
        launch_forward(*elementwise_rows(gate, up, y), approximate)
        ctx.save_for_backward(gate, up)
        ctx.approximate = approximate
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
        launch_backward(*elementwise_rows(dy, gate, up, dgate, dup), ctx.approximate)
        return dgate, dup, None


def geglu(gate: torch.Tensor, up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """gelu(gate) * up, elementwise (Shazeer 2020, arXiv:2002.05202).

    gate, up     as in `swiglu`: the same shape, dtype (float32, float16 or bfloat16) and device; column slices of a
                 contiguous tensor are read in place, other layouts copied first.
    approximate  "none" for the exact GELU; "tanh" for its approximation, which configurations call gelu_pytorch_tanh
                 (Gemma). As torch.nn.functional.gelu has it.
    returns      that shape, contiguous, in that dtype. Arithmetic is fp32 with one rounding at the end; so under
                 autocast.

    Differentiable once. Raises TypeError for another dtype or two different ones, ValueError for shapes or devices that
    do not match or another approximation, NotImplementedError for a device without kernels. CPU tensors take
    `reference` (see `on_triton`).
    """
    check_floats("geglu", gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"geglu: up has shape {tuple(up.shape)} but gate has {tuple(gate.shape)}; make them the same")
    if gate.dtype != up.dtype:
        raise TypeError(f"geglu: up has dtype {up.dtype} but gate has {gate.dtype}; convert one to the other's")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate is {approximate!r}; give 'none' or 'tanh'")
    if not on_triton("geglu", "gate", gate):
        return reference(gate, up, approximate)
    return _GeGLU.apply(gate, up, approximate)
