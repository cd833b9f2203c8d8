"""Which plan each layer takes: the fastest for which the step's estimate fits into the memory.

What a plan costs is what it computes again, at the card's matrix rate, and what of its copies to the host and back the
layer's own work does not hide. Of all plans some are worth having: less memory costs more time. Of two of these the
first layers take the leaner one and the last layers the other, for their backward comes first and gives its memory back
while little else needs any.
"""

from itertools import combinations_with_replacement

import psutil
import torch
from torch import nn

from fastkit.errors import FastkitError
from fastkit.models.estimate import Estimate, Shape, estimate
from fastkit.models.keeping import HOST_RESERVE
from fastkit.models.plans import PLANS, Plan

MARGIN = 0.06  # of the memory: what the allocator reserves beyond what is allocated
CAPTURED_MARGIN = 0.10  # of captured steps: 1.07 to 1.09 times the estimate was reserved (Mistral-7B, 8 to 24 GiB)
MATRIX_RATE, LINK_RATE = 100e12, 20e9  # operations a second and bytes a second each way, where nothing is measured
FP8_FASTER = 1.9  # than 16 bits, on an H200 in a step
OTHER_WORK = 0.15  # of the time of a forward's products in 16 bits: what is elementwise, and attention, a third of it


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(operations a second in products of `dtype`, bytes a second to the host), measured in some 0.2 s on a GPU.

    That long, for clocks rise meanwhile: once a short measure found an H200 below 400 TFLOP/s, which has 700 for long.
    """
    if device.type != "cuda":
        return MATRIX_RATE, LINK_RATE

    def seconds(work, repeats: int = 10, least_ms: float = 100.0) -> float:
        work()  # loads libraries
        torch.cuda.synchronize(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        spent = 0.0
        while spent < least_ms:
            begin.record()
            for _ in range(repeats):
                work()
            end.record()
            end.synchronize()
            spent += (last := begin.elapsed_time(end))
        return last / 1e3 / repeats

    with torch.cuda.device(device):
        a = torch.randn(4096, 4096, device=device, dtype=dtype)
        host = torch.empty(a.shape, dtype=dtype, pin_memory=True)
        matrix = 2 * 4096**3 / seconds(lambda: a @ a)
        link = a.nbytes / seconds(lambda: host.copy_(a, non_blocking=True))
    return matrix, link


def cost_seconds(shape: Shape, M: int, plan: Plan, matrix_rate: float = MATRIX_RATE, link_rate: float = LINK_RATE):
    """Seconds that `plan` adds to a layer's step of M tokens, over "keep"; matrix_rate: of 16 bits."""
    K, Q, N, I = shape.hidden, shape.queries, shape.keys, shape.intermediate
    sizes = {"gate_up": 2 * I * K, "qkv": (Q + 2 * N) * K, "attention": Q * K}
    weights = sum(sizes.values()) + I * K
    operation = 2 * M / matrix_rate  # seconds for each number of a weight
    product = operation / (FP8_FASTER if shape.fp8 else 1)
    other = OTHER_WORK * operation * weights
    anew = sum(size for name, size in sizes.items() if not getattr(plan, name))
    again = product * anew + other * 2 / 3 * anew / sum(sizes.values())
    again += 0 if plan.attention else other / 3
    added = again
    if plan.chunks > 1:
        added += 0.1 * product * weights  # smaller products
    if plan.offload:  # hidden or not, copies are in the way a little; a backward's products are those of the forward
        forward, copy = product * weights + other, shape.kept(M, plan)[0] / link_rate
        added += 0.05 * copy + max(0.0, copy - forward) + max(0.0, copy - forward - again)
    return added


def worth_having(
    shape: Shape, M: int, matrix_rate: float = MATRIX_RATE, link_rate: float = LINK_RATE, host: float = float("inf")
) -> list[Plan]:
    """The plans of which none is both faster and leaner than another, fastest first.

    host: bytes of host memory that offloading may take.
    """
    fit = [plan for plan in PLANS.values() if not plan.offload or shape.kept(M, plan)[0] * shape.layers <= host]
    front: list[Plan] = []
    for plan in sorted(
        fit, key=lambda plan: (cost_seconds(shape, M, plan, matrix_rate, link_rate), device_bytes(shape, M, plan))
    ):
        if not front or device_bytes(shape, M, plan) < device_bytes(shape, M, front[-1]):
            front.append(plan)
    return front


def device_bytes(shape: Shape, M: int, plan: Plan) -> int:
    """Bytes on the device that all layers together need under `plan`."""
    may, stays = shape.kept(M, plan)
    held = (stays + (0 if plan.offload else may)) * shape.layers
    return held + sum(shape.backward(M, plan, plan))


def choose(
    model: nn.Module, budget: int, batch: int, length: int, optimizer: str, dtype: torch.dtype,
    rates: tuple[float, float] = (MATRIX_RATE, LINK_RATE), compute: str = "auto", captured: bool = False,
    buffered: bool = False, accumulated: bool = False,
) -> Estimate:  # fmt: skip
    """The fastest plans, one a layer, whose step of `batch` x `length` tokens fits into `budget` bytes.

    rates   of `rates`: operations a second, bytes a second to the host; the rest as in `estimate`

    Returns their Estimate, `plans` in it. Raises FastkitError, with the least that would do, if none fits.
    """
    shape, M = Shape.on_its_device(model, dtype, compute, length), batch * length
    host = psutil.virtual_memory().available - HOST_RESERVE
    front = worth_having(shape, M, *rates, host)
    fraction = 1 - (CAPTURED_MARGIN if captured else MARGIN)
    room = int(budget * fraction)

    def of(plans: list[Plan]) -> Estimate:
        return estimate(model, plans, batch, length, optimizer, dtype, compute, captured, buffered, accumulated)

    leanest = of([front[-1]] * shape.layers)
    if leanest.peak > room:
        raise FastkitError(
            f"{batch} x {length} tokens do not fit into {_gib(budget)} GiB: the leanest plan needs "
            f"{_gib(leanest.peak / fraction)} GiB, {_gib(leanest.parts['weights'])} of them weights; "
            "take a smaller batch_size (with more accumulation), a shorter max_length or a smaller model"
        )
    costs, best = {plan: cost_seconds(shape, M, plan, *rates) for plan in front}, None
    for leaner, faster in combinations_with_replacement(reversed(front), 2):
        if best is not None and costs[faster] * shape.layers >= best[0]:
            continue  # not even all layers at the faster one would gain
        low, high = 0, shape.layers  # leaner layers: `high` fit, fewer than `low` do not
        if of([leaner] * high).peak > room:
            continue
        while low < high:
            middle = (low + high) // 2
            if of([leaner] * middle + [faster] * (shape.layers - middle)).peak <= room:
                high = middle
            else:
                low = middle + 1
        seconds = high * costs[leaner] + (shape.layers - high) * costs[faster]
        if best is None or seconds < best[0]:
            best = seconds, [leaner] * high + [faster] * (shape.layers - high)
    return of(best[1])


def _gib(size: float) -> str:
    """Bytes in GiB: one digit after the point, two below 1."""
    gib = size / 2**30
    return f"{gib:.{1 if gib >= 1 else 2}f}"


def leaner(plans: list[Plan], shape: Shape, M: int) -> list[Plan] | None:
    """`plans` with each layer at the next plan that needs less memory; None where no layer has any."""
    by_size = sorted(PLANS.values(), key=lambda plan: device_bytes(shape, M, plan), reverse=True)
    found = [by_size[min(by_size.index(plan) + 1, len(by_size) - 1)] for plan in plans]
    return None if found == plans else found
