"""What limits the kernels of a step: how busy memory, instruction issue and tensor cores are, by Nsight Compute.

python tests/kernel_limits.py     on a GPU; writes data/results/limits_CARD.json

One launch each, with cold caches, at the shapes of `fastkit bench kernels`. A kernel whose memory is 90% busy from its
first to its last byte is done; one that issues instructions in nine of ten cycles would need fewer of them.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fastkit import ops
from fastkit.kernels import add_rms_norm, fp8_scale, merged_dequantize, nf4, nf4_matvec, rms_norm
from fastkit.lab.device import card
from fastkit.lab.profile import profile
from fastkit.lab.results import record

COUNTED = (
    "duration_us", "dram_read_bytes", "dram_write_bytes", "dram_busy", "issue_busy", "tensor_cores_busy", "registers",
    "occupancy", "warps_active",
)  # fmt: skip
OURS = "^_(?!quantize)[a-z]"
DTYPE = torch.bfloat16
M, K, N, RANK = 8192, 4096, 14336, 16
B, T, HEADS, KEY_HEADS, D = 4, 2048, 32, 8, 128


def launches(device: str = "cuda") -> dict[str, Callable[[], object]]:
    """{operation: one launch of it}."""
    new = partial(torch.randn, device=device, dtype=DTYPE)
    x, residual, y, h, weight, rstd = new(M, K), new(M, K), new(M, K), new(M, K), new(K), new(M).float()
    w4 = ops.quantize_nf4(new(N, K))
    w, w8, A, b = new(N, K), new(N, K).to(fp8_scale.FP8), new(RANK, K), new(N, RANK)
    inverse = torch.ones(N, device=device)
    q, k, v = new(B, HEADS, T, D), new(B, KEY_HEADS, T, D), new(B, KEY_HEADS, T, D)
    cos, sin = new(1, T, D), new(1, T, D)
    row, out = new(1, K), new(1, N)
    merge = merged_dequantize.launch
    return {
        "rms_norm forward": partial(rms_norm.launch_forward, x, weight, 1e-6, y, rstd),
        "add_rms_norm forward": partial(add_rms_norm.launch_forward, x, residual, weight, 1e-6, y, h, rstd),
        "rope in place": partial(ops.rope_, q, k, cos, sin),
        "nf4 dequantize": partial(nf4.launch, w4, w),
        "merged dequantize": partial(merge, w4, A, b, 2.0, w, False),
        "merged dequantize, to FP8": partial(merge, w4, A, b, 2.0, w8, False, inverse),
        "nf4 matvec, 1 row": partial(nf4_matvec.launch, row, w4, out),
        "attention forward": partial(ops.attention, q, k, v, causal=True),
    }


def launch_all() -> None:
    for launch in launches().values():
        launch()


def main() -> Path:
    counted = profile("kernel_limits:launch_all", COUNTED, kernel=OURS)
    rows = [{"op": op} | counters for op, counters in zip(launches(), counted, strict=True)]
    return record(f"limits_{card()['name'].split()[1].lower()}", rows, "python tests/kernel_limits.py")


if __name__ == "__main__":
    print(main().read_text())
