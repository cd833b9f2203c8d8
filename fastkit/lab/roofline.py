"""Predict a kernel's time from its declared bytes and FLOPs (Williams, Waterman & Patterson 2009, the roofline model).

    time = launch + max(bytes / bandwidth, FLOPs / rate)

Bandwidth and rate are those that this machine's card was measured to reach. For a card that is not here they are its
peaks times the fractions below, and the launch, which its host decides, is unknown.
"""

import inspect
import re
from dataclasses import dataclass

import torch

from fastkit.errors import FastkitError
from fastkit.kernels.common import Cost
from fastkit.lab.cards import Card, find
from fastkit.lab.measure import Measured, measure

# What an H100 SXM reached of its peaks: a copy 3,020 of 3,352 GB/s, a bf16 matmul in cuBLAS 715 of 989 TFLOP/s. Cards
# that are not held back by their power, such as desktop ones, reach more of the latter.
COPY_FRACTION = 0.90
MATRIX_FRACTION = 0.72

_MATRIX_KEYS = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "tf32",
    torch.float8_e4m3fn: "float8",
    torch.float8_e5m2: "float8",
}
_USES_MATRIX_UNITS = re.compile(r"\btl\.dot(_scaled)?\(|mma\w*\(")


@dataclass(frozen=True)
class Prediction:
    """A time and what limits it.

    limit       "memory", "tensor cores", "arithmetic" or "launch": the greatest of the three times
    compute_ms  of the FLOPs on the tensor cores or, the limit being called "arithmetic", on the plain FP32 units
    launch_ms   an empty kernel's time; None where that is unknown, and then left out of time_ms
    intensity   FLOPs a byte
    basis       "measured", or what of the peaks was assumed
    """

    time_ms: float
    limit: str
    memory_ms: float
    compute_ms: float
    launch_ms: float | None
    intensity: float
    card: str
    basis: str


@dataclass(frozen=True)
class Rates:
    """What a card reaches at one dtype: bytes/s and FLOP/s in 1e9 and 1e12, and an empty kernel's milliseconds."""

    gbps: float
    tflops: float
    unit: str  # "tensor cores" or "arithmetic"
    launch_ms: float | None
    card: str
    basis: str

    def attainable_tflops(self, intensity: float) -> float:
        """The roof over `intensity` FLOPs a byte."""
        return min(self.tflops, intensity * self.gbps / 1e3)

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on memory is not the limit."""
        return self.tflops * 1e3 / self.gbps


def rates(
    card: Card | Measured | str | None = None, dtype: torch.dtype = torch.bfloat16, tensor: bool = False
) -> Rates:
    """What `card` reaches: a Card, a card's name, or what `measure` gave; by default this machine's, measured.

    With `tensor`, the FLOPs run on the tensor cores in `dtype` (float32 as TF32); otherwise on the FP32 units, at peak.
    Raises FastkitError for an unknown name, or where the card has no such units or no known figures for them.
    """
    source = measure() if card is None else find(card) if isinstance(card, str) else card
    measured = isinstance(source, Measured)
    facts = source.card if measured else source
    gbps, tflops = (source.copy_gbps, facts.fp32_tflops) if measured else (facts.bandwidth_gbps, facts.fp32_tflops)
    if gbps is None:
        raise FastkitError(f"the memory bandwidth of {facts.name} is unknown: measure it (fastkit.lab.measure)")
    basis = "measured" if measured else f"{COPY_FRACTION:.2f} of the peak bandwidth"
    if tensor:
        key = _MATRIX_KEYS.get(dtype)
        table = source.matrix_tflops if measured else facts.tensor_tflops
        if key not in table:
            has = ", ".join(table) or "none known"
            raise FastkitError(f"{facts.name} has no tensor-core rate for {str(dtype)[6:]}: there is {has}")
        tflops = table[key] if measured else MATRIX_FRACTION * table[key]
        basis += "" if measured else f", {MATRIX_FRACTION:.2f} of the peak matrix rate"
    elif tflops is None:
        raise FastkitError(f"the FP32 rate of {facts.name} is unknown: name a card of the table")
    return Rates(
        gbps=gbps if measured else COPY_FRACTION * gbps,
        tflops=tflops,
        unit="tensor cores" if tensor else "arithmetic",
        launch_ms=source.empty_us / 1e3 if measured else None,
        card=facts.name,
        basis=basis,
    )


def roofline(
    kernel,
    shapes: dict | None = None,
    card: Card | Measured | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tensor: bool | None = None,
) -> Prediction | tuple[Prediction, ...]:
    """Predict the time of `kernel` on `card` (as in `rates`).

    kernel  a kernel file's module, which has `cost`, with its `shapes`: roofline(swiglu, {"M": 8192, "N": 14336}). If
            its cost is a pair, forward and backward, so is the prediction. Or a Cost, without shapes.
    tensor  whether its FLOPs run on the tensor cores; by default, if the kernel file calls tl.dot

    The least that the operation must do is predicted: a kernel that reads twice, or misses the units, takes longer, and
    that is what the comparison with a measurement shows. Data that a cache still holds is not counted as saved.
    """
    if isinstance(kernel, Cost):
        costs = kernel
        if shapes:
            raise FastkitError(f"a Cost has its shapes in it: leave out {shapes}")
    else:
        costs = _cost(kernel, shapes or {}, dtype)
        if tensor is None:
            tensor = bool(_USES_MATRIX_UNITS.search(inspect.getsource(kernel)))
    reached = rates(card, dtype, bool(tensor))
    if isinstance(costs, tuple):
        return tuple(predict(cost, reached) for cost in costs)
    return predict(costs, reached)


def predict(cost: Cost, reached: Rates) -> Prediction:
    """The roofline model itself."""
    times = {
        "memory": cost.bytes_moved / reached.gbps / 1e6,
        reached.unit: cost.flops / reached.tflops / 1e9,
        "launch": reached.launch_ms or 0.0,
    }
    return Prediction(
        time_ms=times["launch"] + max(times["memory"], times[reached.unit]),
        limit=max(times, key=times.get),
        memory_ms=times["memory"],
        compute_ms=times[reached.unit],
        launch_ms=reached.launch_ms,
        intensity=cost.flops / cost.bytes_moved if cost.bytes_moved else float("inf"),
        card=reached.card,
        basis=reached.basis,
    )


def _cost(kernel, shapes: dict, dtype: torch.dtype):
    if not hasattr(kernel, "cost"):
        raise FastkitError(f"{getattr(kernel, '__name__', kernel)!r} declares no cost: give a kernel module or a Cost")
    takes = inspect.signature(kernel.cost).parameters
    given = {"dtype": dtype} | shapes if "dtype" in takes else dict(shapes)
    try:
        inspect.signature(kernel.cost).bind(**given)
    except TypeError as error:
        raise FastkitError(f"shapes {shapes} do not fit {kernel.__name__}.cost({', '.join(takes)}): {error}") from error
    return kernel.cost(**given)
