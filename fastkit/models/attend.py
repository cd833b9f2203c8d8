"""The attention of a decoder layer, forward and backward, without autograd: by our kernels or a backend of torch's.

Where neither is for the tensors, torch's own attention and its autograd. The maths stands in `kernels/attention.py`.
"""

import functools
from typing import NamedTuple

import torch

from fastkit.kernels import attention_backward_hopper as backward_hopper
from fastkit.kernels import rope_fp8
from fastkit.kernels.attention_backward import launch_backward
from fastkit.kernels.attention_choice import choose
from fastkit.kernels.attention_forward import lacking, launch_forward, on_hopper
from fastkit.kernels.common import architecture, on_triton
from fastkit.kernels.fp8_rows import on_fp8_kernels
from fastkit.models import pieces
from fastkit.models.sequences import Packed
from fastkit.ops import attention, attention_varlen


class Attend(NamedTuple):
    """What a query sees: the last `window` keys up to its own (None: all), in its own sequence of a packed batch."""

    scale: float
    window: int | None = None
    packed: Packed | None = None


class Attended(NamedTuple):
    """What `attend` hands to `attend_backward` beside q, k, v: the backend, o [B, H, T, D] and its own tensors."""

    backend: str
    o: torch.Tensor
    rest: tuple


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Attend) -> Attended:
    """Causal attention of q [B, H, T, D] over k, v [B, H_k, T, D], any strides but neighbours in D adjacent.

    o lies in memory as [B, T, H, D], so that o.transpose(1, 2).reshape(M, H * D) is a view where the backend allows.
    """
    backend, scale = _backend(q, k, v, options), options.scale
    if backend == "ours" or (backend == "cudnn" and _faster_than_cudnn(q, k, v)):
        B, H, T, D = q.shape
        o = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
        q, k, v, o_rows = (_rows(x, options.packed) for x in (q, k, v, o))
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        launch_forward(q, k, v, o_rows, lse, **_lengths(options))
        rest = (lse,) if backend == "ours" else (lse[..., None], None, None, T, T, *2 * [_zero(q.device)])
        return Attended(backend, o, rest)
    if backend == "cudnn":
        o, *rest, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, scale=scale)
        return Attended(backend, o, tuple(rest))
    if backend == "flash":
        o, *rest, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)
        return Attended(backend, o, tuple(rest))
    return Attended(backend, _by_torch(q, k, v, options), ())


def _faster_than_cudnn(q, k, v) -> bool:
    """Whether our forward is; cuDNN's backward reads o and lse whoever wrote them. H200, heads of 128, and of 64: 0.229
    ms and cuDNN 0.259, 0.177 and 0.187, for 4 x 2048 tokens; 0.789 and 0.905 for 1 x 8192; 0.017 and 0.016 for 512."""
    return q.shape[2] >= 1024 and on_hopper(architecture(q.device), q, k, v)


@functools.cache
def _zero(device: torch.device) -> torch.Tensor:
    """Seed and offset of a dropout that there is none of."""
    return torch.zeros((), dtype=torch.int64, device=device)


def attend_backward(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attended: Attended, options: Attend,
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor],
    dqkv: torch.Tensor | None = None,
) -> pieces.FP8Rows | None:  # fmt: skip
    """Write dq, dk and dv, shaped as q, k and v, given do [B, H, T, D]; dq and dk turned back by `table`, cos and sin.

    Same rule for strides. dqkv, if given, is what dq, dk and dv are the parts of, [M, N], and is returned in FP8.
    """
    backend, o, rest = attended
    if backend == "ours" or (backend == "cudnn" and _in_place_of_cudnn(do, q, k, v, dk, dv, in_fp8=dqkv is not None)):
        do, q, k, v, o, *grads = (_rows(x, options.packed) for x in (do, q, k, v, o, dq, dk, dv))
        lse, (cos, sin) = rest[0].view(q.shape[:3]), table
        turned = launch_backward(do, q, k, v, o, lse, *grads, **_lengths(options), cos=cos, sin=sin)
        pieces.rotate_(dk, dq[:, :0] if turned else dq, cos, sin, inverse=True)
        return None if dqkv is None else pieces.quantized(dqkv)
    if backend == "cudnn":
        lse, cu_q, cu_k, max_q, max_k, seed, offset = rest
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, o, lse, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, True, scale=options.scale
        )
    elif backend == "flash":
        lse, cu_q, cu_k, max_q, max_k, seed, offset = rest
        found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, 0.0, True, seed, offset, scale=options.scale
        )
    else:
        found = pieces.differentiated(lambda q, k, v: _by_torch(q, k, v, options), [q, k, v], do)
    if dqkv is not None and on_fp8_kernels("rope_fp8", do) and rope_fp8.takes(q, k, table[0]):
        return pieces.turned_back_fp8(*found, *table, dqkv)
    beside = found[2].stride() == found[1].stride() and dv.stride() == dk.stride()
    pieces.rotate_(*found[:2], *table, inverse=True, into=(dq, dk, dv), v=found[2] if beside else None)
    if not beside:
        dv.copy_(found[2])
    return None if dqkv is None else pieces.quantized(dqkv)


def in_place(device: torch.device, dtype: torch.dtype, D: int, length: int, in_fp8: bool) -> bool:
    """Whether the gradients of q, k and v are written where they belong by whatever backend `attend` takes: then the
    backward has none of its own. For padded or whole sequences of `length` tokens; packed ones are always ours.

    False where it hangs on the backend, which is yet to be timed; True where it does not matter, on a CPU.
    """
    if device.type != "cuda":
        return True
    taken = architecture(device) == "sm_90" and dtype.itemsize == 2 and D in backward_hopper.HEADS
    return taken and (torch.are_deterministic_algorithms_enabled() or _faster_backward(length, in_fp8))


def _faster_backward(length: int, in_fp8: bool) -> bool:
    """Whether ours is faster than cuDNN's where it takes the tensors: see `_in_place_of_cudnn`."""
    return not in_fp8 and length >= 1024


def _in_place_of_cudnn(do, q, k, v, dk, dv, in_fp8: bool) -> bool:
    """Whether our backward follows a forward for cuDNN's. That one's adds in any order, so always where torch is asked
    for the same bits every time. Else where it is faster: its dq is turned back while it is rounded, and dv needs no
    copy; but in FP8 `rope_fp8` turns, quantizes and puts side by side in a pass.

    H200, 4 x 2048 tokens, causal, 32/8 heads, before RoPE: of 128 0.851 ms and cuDNN 0.877, of 64 0.504 and 0.579; 1 x
    8192 of 128 2.876 and 2.810, 1 x 512 0.104 and 0.053; a step of Mistral-7B without recompute 439 ms and 443. In FP8
    cuDNN's and `rope_fp8` take 0.869 + 0.068 ms.
    """
    if torch.are_deterministic_algorithms_enabled():
        return True
    taken = backward_hopper.takes(architecture(q.device), do, q, k, v, dk, dv)
    return taken and _faster_backward(q.shape[2], in_fp8)


def _backend(q, k, v, options: Attend) -> str:
    """ "ours", one of torch's whose forward and backward can be called apart, or "torch", which has neither.

    "torch" is the reference on the CPU and, for what our kernels do not take (fp32; GPUs before sm_80), torch's
    attention on a GPU. Nothing is kept for its backward, which runs the forward again.
    """
    if not on_triton("attention", "q", q) or is_torchs(q.device, q.dtype):
        return "torch"
    if q.device.type != "cuda" or options.window is not None or options.packed is not None or q.shape[-1] % 8:
        return "ours"
    with torch.enable_grad():  # tried with its backward; timed by a warm-up alone, see `warmup.py`
        inputs = (x.detach().requires_grad_() for x in (q, k, v))
        return choose(*inputs, scale=options.scale, timed=False, among=("cudnn", "flash", "ours"))


def is_torchs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our kernels are not for `device` and `dtype`. Packed rows then wait for the host to read their ends."""
    return bool(lacking(architecture(device), dtype))


def _by_torch(q, k, v, options: Attend) -> torch.Tensor:
    if options.packed is None:
        return attention(q, k, v, True, options.window, options.scale)
    rows = [_rows(x, options.packed)[0].transpose(0, 1) for x in (q, k, v)]  # [total, H, D]
    o = attention_varlen(*rows, options.packed.cu_seqlens, options.packed.longest, True, options.window, options.scale)
    B, H, T, D = q.shape
    return o.view(B, T, H, D).transpose(1, 2)


def _rows(x: torch.Tensor, packed: Packed | None) -> torch.Tensor:
    """x [B, H, T, D] as the kernels take it: with sequences packed, [1, H, B * T, D], a view."""
    if packed is None:
        return x
    B, H, T, D = x.shape
    return x.transpose(1, 2).view(1, B * T, H, D).transpose(1, 2)


def _lengths(options: Attend) -> dict:
    found = {"causal": True, "window": options.window, "scale": options.scale}
    if packed := options.packed:
        found |= {
            "cu_q": packed.cu_seqlens,
            "cu_k": packed.cu_seqlens,
            "max_q": packed.longest,
            "max_k": packed.longest,
        }
    return found
