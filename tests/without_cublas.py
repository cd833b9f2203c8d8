"""A plugin of pytest for racecheck: what torch multiplies on a GPU is multiplied on the CPU.

compute-sanitizer 2025.3 dies under racecheck of cuBLAS's kernels for sm_90, even where they are excluded ("failed to
handle a hardware exception", on an NVIDIA H200, at the product of torch that a test compares with). They are not what
is checked.
"""

import torch
from torch.utils._pytree import tree_map_only

LIBRARY = torch.library.Library("aten", "IMPL")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
WIDER = ("mm", "addmm", "bmm", "baddbmm")  # those that may return another dtype than their factors'


def on_the_cpu(product):
    def run(*arguments, **options):
        moved, options = tree_map_only(torch.Tensor, torch.Tensor.cpu, (arguments, options))
        return product(*moved, **options).to(arguments[0].device)

    return run


def wider(run):
    """With out_dtype as last argument, which torch has on a GPU alone."""

    def run_wider(*arguments, **options):
        *factors, dtype = arguments
        return run(*(factor.to(dtype) for factor in factors), **options)

    return run_wider


def into(run):
    def run_into(*arguments, out, **options):
        return out.copy_(run(*arguments, **options))

    return run_into


for name in PRODUCTS:
    run = on_the_cpu(getattr(torch.ops.aten, name).default)
    LIBRARY.impl(name, run, "CUDA")
    LIBRARY.impl(f"{name}.out", into(run), "CUDA")
    if name in WIDER:
        LIBRARY.impl(f"{name}.dtype", wider(run), "CUDA")
        LIBRARY.impl(f"{name}.dtype_out", into(wider(run)), "CUDA")
