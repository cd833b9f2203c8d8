"""bitsandbytes, imported and prepared so that it neither fetches code nor changes the arithmetic behind our back.

Import it from here (`from fastkit.models.bnb import bnb`) before peft or transformers pull it in.
"""

import logging
import sys
from contextlib import contextmanager

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


def nf4_config(compute_dtype: torch.dtype):
    """The one quantization of this project: NF4, blocks of 64, scales quantized again (QLoRA, arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
