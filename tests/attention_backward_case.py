"""What the tests of sm_90's own attention backward share: tensors, shapes, its kernel in Python."""

import torch

from fastkit.kernels import attention_backward_hopper, attention_backward_parts

MODULES = attention_backward_parts, attention_backward_hopper
SHAPES = [
    # B, H, H_k, T_q, T_k, D, causal
    (1, 4, 1, 192, 192, 128, True),
    (2, 2, 2, 77, 200, 128, True),
    (1, 4, 1, 200, 77, 64, True),
    (1, 2, 1, 130, 300, 128, False),
    (1, 4, 2, 7, 131, 64, True),
    (1, 2, 2, 333, 333, 64, False),
]


def tensors(B=2, H=4, H_k=2, T_q=256, T_k=256, D=128, dtype=torch.bfloat16, device="meta"):
    """do, q, k, v, o, lse, dq, dk, dv; in memory heads lie within rows."""
    q, do, o, dq = (torch.empty(B, T_q, H, D, dtype=dtype, device=device).transpose(1, 2) for _ in range(4))
    k, v, dk, dv = (torch.empty(B, T_k, H_k, D, dtype=dtype, device=device).transpose(1, 2) for _ in range(4))
    return do, q, k, v, o, torch.empty(B, H, T_q, device=device), dq, dk, dv


def simulated(monkeypatch, at_once):
    from simulated import Descriptor, Simulated

    kernel = Simulated(attention_backward_hopper._backward_hopper_kernel, *MODULES, at_once=at_once)
    monkeypatch.setattr(attention_backward_hopper, "_backward_hopper_kernel", kernel)
    monkeypatch.setattr(attention_backward_hopper, "descriptor", Descriptor)
