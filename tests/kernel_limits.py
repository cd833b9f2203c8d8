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
from fastkit.lab import bench_kernels
from fastkit.lab.bench_case import rows
from fastkit.lab.bench_kernels import EPS, random
from fastkit.lab.device import card
from fastkit.lab.profile import profile
from fastkit.lab.results import record

COUNTED = (
    "duration_us", "dram_read_bytes", "dram_write_bytes", "dram_busy", "issue_busy", "tensor_cores_busy", "registers",
    "occupancy", "warps_active",
)  # fmt: skip
OURS = "^_(?!quantize)[a-z]"


def launches() -> dict[str, Callable[[], object]]:
    """{operation: one launch of it}."""
    M, K, N, r = rows(), bench_kernels.HIDDEN, bench_kernels.INTERMEDIATE, bench_kernels.RANK
    heads, key_heads, T, D = (getattr(bench_kernels, name) for name in ("HEADS", "KEY_HEADS", "TOKENS", "HEAD"))
    x, residual, y, h, weight, rstd = *(random(M, K) for _ in range(4)), random(K), random(M, dtype=torch.float32)
    w4, w = ops.quantize_nf4(random(N, K)), random(N, K)
    w8, inverse, A, b = w.to(fp8_scale.FP8), random(N, dtype=torch.float32), random(r, K), random(N, r)
    q, k, v = (random(M // T, count, T, D) for count in (heads, key_heads, key_heads))
    cos, sin, row, out = random(1, T, D), random(1, T, D), random(1, K), random(1, N)
    merge = merged_dequantize.launch
    return {
        "rms_norm forward": partial(rms_norm.launch_forward, x, weight, EPS, y, rstd),
        "add_rms_norm forward": partial(add_rms_norm.launch_forward, x, residual, weight, EPS, y, h, rstd),
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
    found = [{"op": op} | counters for op, counters in zip(launches(), counted, strict=True)]
    return record(f"limits_{card()['name'].split()[1].lower()}", found, "python tests/kernel_limits.py")


if __name__ == "__main__":
    print(main().read_text())
