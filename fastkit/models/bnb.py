"""bitsandbytes, imported and prepared so that it neither fetches code nor changes the arithmetic behind our back.

Import it from here (`from fastkit.models.bnb import bnb`) before peft or transformers pull it in.
"""

import functools
import logging
import sys
from contextlib import contextmanager

import psutil
import torch


@contextmanager
def _no_remote_kernels():
    """On AVX512-BF16 CPUs `import bitsandbytes` downloads and runs a hub kernel when the package `kernels` is there.

    Nothing is fetched unless the user names a hub model, so that package is hidden during the import;
    bitsandbytes then falls back to its own C++ kernels and logs a warning that would only puzzle the reader.
    """
    missing = object()
    hidden = sys.modules.get("kernels", missing)
    sys.modules["kernels"] = None  # `import kernels` now raises ImportError
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if hidden is missing:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = hidden


with _no_remote_kernels():
    import bitsandbytes as bnb


def keep_differentiable(model):
    """Keep every `Linear4bit` of `model` on the dequantize-and-multiply path, also after it ran in eval mode on a CPU.

    On AVX512-BF16 CPUs the first forward in eval mode repacks the weights for a bf16 kernel that has no backward.
    They stay repacked, so one evaluation or generation in mid-training would silently cut the gradient of every
    step after it, and round the products of an fp32 model to bf16. The switch is an attribute of each module.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@contextmanager
def dense_on_cpu(model):
    """Within, every `Linear4bit` on the CPU multiplies by a dense copy of its weight, dequantized once at the start.

    For generation: a new token costs little more than reading each weight, and dequantizing them all for each token
    takes most of its time. The values, and so the answers, are the same. Does nothing where the copies would take
    more than half of the free memory.
    """
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit) and m.weight.device.type == "cpu"]
    layers = [m for m in layers if hasattr(m.weight, "quant_state")]  # none while it is sharded
    itemsize = max((m.weight.quant_state.dtype.itemsize for m in layers), default=0)
    need = sum(m.in_features * m.out_features for m in layers) * itemsize
    if need > psutil.virtual_memory().available / 2:
        layers = []
    try:
        for layer in layers:
            layer.forward = functools.partial(_dense_forward, layer, _dequantized(layer))
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _dequantized(layer) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _dense_forward(layer, weight, x):
    dtype = layer.compute_dtype or x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)


def nf4_config(compute_dtype: torch.dtype):
    """The one quantization of this project: NF4, blocks of 64, scales quantized again (QLoRA, arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
