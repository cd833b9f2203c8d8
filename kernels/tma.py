"""What kernels share whose tiles of matrices come and go by TMA, the copy engine from sm_90 on."""

import torch

from fastkit.kernels.common import tl, triton

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None  # Triton is missing and `on_triton` sees to it that nothing is launched


@triton.jit
def place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of `tile` among the tiles: stripe by stripe, GROUP_M tiles high, columns first."""
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)  # the last stripe may be lower
    within = tile % (GROUP_M * tiles_n)
    return first_m + within % height, within // height


def fits_tma(x: torch.Tensor) -> bool:
    """Whether TMA can copy the rows of x: neighbours adjacent, each row at a multiple of 16 bytes."""
    adjacent = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return adjacent and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
