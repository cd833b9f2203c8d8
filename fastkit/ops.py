"""The operations of fastkit, gathered from `kernels/`: Triton kernels on a GPU, plain torch elsewhere."""

from fastkit.kernels.adamw import adamw
from fastkit.kernels.add_rms_norm import add_rms_norm
from fastkit.kernels.attention import attention, attention_varlen
from fastkit.kernels.cross_entropy import cross_entropy
from fastkit.kernels.fp8_rows import quantize_rows_fp8
from fastkit.kernels.fp8_scale import shared_scale, weight_bounds
from fastkit.kernels.gated_product import gated_product
from fastkit.kernels.geglu import geglu
from fastkit.kernels.linear_cross_entropy import linear_cross_entropy
from fastkit.kernels.lora import lora_gradients
from fastkit.kernels.merged_dequantize import merged_dequantize, merged_dequantize_fp8
from fastkit.kernels.nf4 import NF4Weight, dequantize_nf4
from fastkit.kernels.nf4_matvec import nf4_matvec
from fastkit.kernels.nf4_quantize import quantize_nf4
from fastkit.kernels.rms_norm import rms_norm
from fastkit.kernels.rope import rope, rope_
from fastkit.kernels.swiglu import swiglu

__all__ = [
    "NF4Weight",
    "adamw",
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "cross_entropy",
    "dequantize_nf4",
    "gated_product",
    "geglu",
    "linear_cross_entropy",
    "lora_gradients",
    "merged_dequantize",
    "merged_dequantize_fp8",
    "nf4_matvec",
    "quantize_nf4",
    "quantize_rows_fp8",
    "rms_norm",
    "rope",
    "rope_",
    "shared_scale",
    "swiglu",
    "weight_bounds",
]
