"""What the card that is here reaches: a copy's bandwidth, cuBLAS's matrix rate by dtype, the cost of a launch."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fastkit.errors import FastkitError
from fastkit.lab.cards import Card, present
from fastkit.lab.timing import empty_launch, launch_overhead_us, time_ms

COPY_BYTES = 2**30  # far beyond any cache
MATRIX_N = 8192


@dataclass(frozen=True)
class Measured:
    """Speeds measured on `card` in this process.

    copy_gbps      bytes read and written by `copy_` of 1 GiB (less on a small card), 1e9 bytes/s
    matrix_tflops  of square matmuls by torch (cuBLAS), FP32 accumulation; keys as in Card.tensor_tflops
    empty_us       an empty kernel between two device events: the least time that any kernel takes
    launch_us      the host's time for one Triton launch
    """

    card: Card
    copy_gbps: float
    matrix_tflops: dict[str, float]
    empty_us: float
    launch_us: float

    def rows(self) -> list[dict]:
        """For a table: {what, measured, peak, of_peak}; None where the peak is unknown or there is none."""
        speeds = {"copy, GB/s": (self.copy_gbps, self.card.bandwidth_gbps)}
        for dtype, tflops in self.matrix_tflops.items():
            speeds[f"matmul {dtype}, TFLOP/s"] = (tflops, self.card.tensor_tflops.get(dtype))
        speeds["an empty kernel, us"] = (self.empty_us, None)
        speeds["a launch, us of the host"] = (self.launch_us, None)
        return [
            {"what": what, "measured": measured, "peak": peak, "of_peak": peak and measured / peak}
            for what, (measured, peak) in speeds.items()
        ]


def measure(device: int | None = None) -> Measured:
    """Measure a GPU (the current one, or `device`), once a process. Raises FastkitError without a GPU."""
    if not torch.cuda.is_available():
        raise FastkitError("measuring needs a GPU: name a card of the table instead (fastkit.lab.cards.find)")
    return _measure(torch.cuda.current_device() if device is None else device)


@functools.cache
def _measure(device: int) -> Measured:
    with torch.cuda.device(device):
        card = present(device)
        found = Measured(
            card=card,
            copy_gbps=_copy_gbps(),
            matrix_tflops=_matrix_tflops(),
            empty_us=1e3 * time_ms(empty_launch()).median_ms,
            launch_us=launch_overhead_us(),
        )
        torch.cuda.empty_cache()
    return found


def _copy_gbps() -> float:
    count = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4)
    x = torch.zeros(count, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * count / time_ms(lambda: y.copy_(x)).median_ms / 1e6


def _matrix_tflops() -> dict[str, float]:
    N = MATRIX_N if torch.cuda.mem_get_info()[0] > 4 * 2**30 else MATRIX_N // 2
    found = {}
    for dtype, matmul in _matmuls(N):
        found[dtype] = 2 * N**3 / time_ms(matmul, repeat_ms=200).median_ms / 1e9
    return found


def _matmuls(N: int) -> Iterator[tuple[str, Callable]]:
    """(dtype, a function that multiplies [N, N] by [N, N]) for the dtypes that this card has matrix units for."""
    capability = (99, 0) if torch.version.hip else torch.cuda.get_device_capability()
    for dtype in (torch.float16, torch.bfloat16) if capability >= (8, 0) else (torch.float16,):
        a, b = (torch.randn(N, N, dtype=dtype, device="cuda") for _ in range(2))
        c = torch.empty_like(a)
        yield str(dtype).removeprefix("torch."), lambda a=a, b=b, c=c: torch.matmul(a, b, out=c)
    if torch.version.hip or capability < (8, 0):
        return
    a, b = (torch.randn(N, N, device="cuda") for _ in range(2))
    c = torch.empty_like(a)
    with _tf32():
        yield "tf32", lambda: torch.matmul(a, b, out=c)
    if capability >= (8, 9):
        one = torch.ones((), device="cuda")
        a, b = (matrix.to(torch.float8_e4m3fn) for matrix in (a, b))
        scales = dict(scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        yield "float8", lambda: torch._scaled_mm(a, b.T, **scales)


@contextlib.contextmanager
def _tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
