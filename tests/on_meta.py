"""A patched model on meta tensors, whose GPU path runs without a GPU: launches are noted, sizes are real, numbers none.

with on_meta(model):
    account = account_of(lambda: step(model))
"""

import contextlib
import sys
from unittest import mock

import torch
from torch import nn

HERE = {  # what a GPU of sm_90 answers, by the name under which modules ask
    "on_triton": lambda op, name, x: True,
    "on_fp8_kernels": lambda op, x: True,
    "architecture": lambda device: "sm_90",
    "_runs": lambda *args: True,
    "bound": lambda weight: 1.0,
}


@contextlib.contextmanager
def on_meta(model: nn.Module, capturing: bool = False, dtype=torch.bfloat16):
    """`model`, quantized and on the CPU, on meta tensors from here on; asked for autocast, it is on, to `dtype`.

    capturing: whether a CUDA graph says that it is being captured
    """
    _move(model)
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("fastkit."):
                for asked, answer in HERE.items():
                    if hasattr(module, asked):
                        stack.enter_context(mock.patch.object(module, asked, answer))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext()))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda device_type: True))
        stack.enter_context(mock.patch.object(torch, "get_autocast_dtype", lambda device_type: dtype))
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: capturing))
        yield


def _move(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            moved = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
            if (state := getattr(parameter, "quant_state", None)) is not None:
                moved.quant_state = state
                for part in (state, state.state2):
                    for number in ("absmax", "code", "offset"):
                        if isinstance(getattr(part, number, None), torch.Tensor):
                            setattr(part, number, getattr(part, number).to("meta"))
            module._parameters[name] = moved
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")
