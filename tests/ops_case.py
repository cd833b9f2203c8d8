"""Every public op as a function of tensors alone, for the tests of what all ops share (test_ops_compile.py)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastkit import ops
from fastkit.kernels.adamw_state import State


@dataclass(frozen=True)
class Case:
    """
    function  of `inputs`; returns a tensor or a tuple of them. Ops that write in place are given copies
    trained   how many inputs, the first, have a gradient
    """

    function: Callable
    inputs: tuple[torch.Tensor, ...]
    trained: int = 0


def cases(device: str, dtype: torch.dtype, rows: int = 48) -> dict[str, Case]:
    """A case for each op of `fastkit.ops`, by its name, with `rows` tokens."""
    return _norms(device, dtype, rows) | _losses(device, dtype, rows) | _weights(device, dtype, rows)


def _draw(device, dtype):
    return lambda *shape: torch.randn(shape, device=device).to(dtype)


def _norms(device, dtype, rows) -> dict[str, Case]:
    """Norms, gates, attention and what turns its heads."""
    draw, D = _draw(device, dtype), 64
    x, weight = draw(rows, 96), draw(96)
    q, k, v = (draw(1, rows, heads, D).transpose(1, 2) for heads in (4, 2, 2))
    angles = torch.randn(rows, D // 2, device=device).repeat(1, 2)
    packed = [y[0].transpose(0, 1).contiguous() for y in (q, k, v)]
    cu = torch.tensor([0, 17, rows], dtype=torch.int32, device=device)
    turning = (q, k, angles.cos(), angles.sin())
    return {
        "rms_norm": Case(ops.rms_norm, (x, weight), 2),
        "add_rms_norm": Case(ops.add_rms_norm, (x, draw(rows, 96), weight), 3),
        "swiglu": Case(ops.swiglu, (x, draw(rows, 96)), 2),
        "gated_product": Case(ops.gated_product, (x, draw(2 * 64, 96))),
        "geglu": Case(ops.geglu, (x, draw(rows, 96)), 2),
        "rope": Case(ops.rope, turning, 2),
        "rope_": Case(lambda q, k, cos, sin: ops.rope_(q.detach().clone(), k.detach().clone(), cos, sin), turning),
        "attention": Case(ops.attention, (q, k, v), 3),
        "attention_varlen": Case(lambda q, k, v, cu: ops.attention_varlen(q, k, v, cu, 128), (*packed, cu), 3),
    }


def _losses(device, dtype, rows) -> dict[str, Case]:
    """Losses, and what takes a step by their gradients."""
    draw = _draw(device, dtype)
    labels = torch.randint(0, 100, (rows,), device=device)
    labels[::5] = -100
    head = (draw(rows, 64), draw(100, 64) / 8, labels)
    adapter = (draw(rows, 64), draw(rows, 48), draw(8, 64), draw(48, 8), torch.rand(rows, device=device), draw(64))
    param, state = torch.randn(1000, device=device), State.zeros(torch.empty(1000, device=device))

    def lora_gradients(x, dy, A, B, rstd, weight):
        given = x, [dy], [A], [B], [0.5]
        found = ops.lora_gradients(*given), ops.lora_gradients(*given, rstd=rstd, weight=weight)
        return tuple(gradient for dAs, dBs in found for gradient in (*dAs, *dBs))

    def adamw(param, grad):
        param, step, *moments = (x.detach().clone() for x in (param, state.step, state.state1, state.state2))
        ops.adamw(param, grad, State(step, *moments, None, None, None, state.arrivals), 1e-3, max_norm=1.0)
        return param

    return {
        "cross_entropy": Case(ops.cross_entropy, (3 * draw(rows, 100), labels), 1),
        "linear_cross_entropy": Case(lambda *x: ops.linear_cross_entropy(*x, kept="all"), head, 2),
        "lora_gradients": Case(lora_gradients, adapter),
        "adamw": Case(adamw, (param, draw(1000))),
    }


def _weights(device, dtype, rows) -> dict[str, Case]:
    """What reads and writes 4 and 8 bits. The bytes of the weight are an input, though its view is what is read."""
    draw, N, K = _draw(device, dtype), 64, 128
    weight = ops.quantize_nf4(draw(N, K), double_quant=True)
    A, B, bound = draw(8, K), draw(N, 8), ops.weight_bounds(weight)[0]

    def quantize_nf4(x):
        made = ops.quantize_nf4(x)
        return made.packed, made.absmax

    def merged_fp8(bound, A, B, packed):
        w8, scale = ops.merged_dequantize_fp8(weight, bound, A, B, 0.5)
        return w8.float(), scale

    def rows_fp8(x):
        x8, scale = ops.quantize_rows_fp8(x)
        return x8.float(), scale

    return {
        "quantize_nf4": Case(quantize_nf4, (draw(rows, K),)),
        "dequantize_nf4": Case(lambda packed: ops.dequantize_nf4(weight), (weight.packed,)),
        "nf4_matvec": Case(lambda x, packed: ops.nf4_matvec(x, weight), (draw(rows // 4, K), weight.packed)),
        "merged_dequantize": Case(lambda A, B, packed: ops.merged_dequantize(weight, A, B, 0.5), (A, B, weight.packed)),
        "merged_dequantize_fp8": Case(merged_fp8, (bound, A, B, weight.packed)),
        "shared_scale": Case(lambda A, B: ops.shared_scale(0.5, A, B, 4.0, N), (A, B)),
        "quantize_rows_fp8": Case(rows_fp8, (draw(rows, K),)),
        "weight_bounds": Case(lambda absmax: ops.weight_bounds(weight), (weight.absmax,)),
    }
