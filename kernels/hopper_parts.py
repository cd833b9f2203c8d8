"""What kernels for sm_90 by Gluon share: descriptors of their tensors, barriers in shared memory."""

import torch

from fastkit.kernels.ladders.rung import gl, gluon

try:
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:
    mbarrier = TensorDescriptor = None


def descriptor(x: torch.Tensor, box: list[int]):
    """TMA's descriptor of x, in boxes, as many sizes as x has; their rows are swizzled as widely as they are, but for
    boxes that are one row."""
    width = min(128, x.element_size() * box[-1]) if len(box) > 1 else 0
    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * x.element_size(), rank=len(box))
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


@gluon.jit
def new_barriers(COUNT: gl.constexpr, readers: gl.constexpr):
    """COUNT barriers on which `readers` arrive."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=readers)
    return barriers
