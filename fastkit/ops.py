"""The operations of fastkit, gathered from `kernels/`: Triton kernels on a GPU, plain torch elsewhere."""

from fastkit.kernels.rms_norm import rms_norm
from fastkit.kernels.swiglu import swiglu

__all__ = ["rms_norm", "swiglu"]
