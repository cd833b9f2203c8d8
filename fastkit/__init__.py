"""fastkit: a notebook course on GPU optimization, made of the Triton kernels and the QLoRA trainer that it teaches."""

__version__ = "0.1.0"
