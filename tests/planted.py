"""Faults for compute-sanitizer to find: `python tests/planted.py memcheck|racecheck`, on a GPU (see sanitize.py)."""

import sys

import torch
import triton
import triton.language as tl


@triton.jit
def _store_beyond_kernel(x_ptr, BLOCK_N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK_N), 1.0)  # no mask


@triton.jit
def _race_kernel(x_ptr, BLOCK_N: tl.constexpr):
    """Every thread stores to one word of shared memory and loads it again, with no barrier."""
    numbers = tl.arange(0, BLOCK_N)
    met = tl.inline_asm_elementwise(
        "{ .shared .align 4 .b32 word; st.shared.b32 [word], $1; ld.shared.b32 $0, [word]; }",
        "=r,r", [numbers], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(x_ptr + numbers, met)


if __name__ == "__main__":
    if sys.argv[1] == "memcheck":
        _store_beyond_kernel[(1,)](torch.zeros(1000, device="cuda"), 1024)
    else:
        _race_kernel[(1,)](torch.zeros(128, dtype=torch.int32, device="cuda"), 128)
    torch.cuda.synchronize()
