"""Which attention is fastest here: `attention`'s own kernels or one of torch's backends.

It hangs on the card, the shapes and the library versions. So on a GPU `choose` times those that can take the tensors,
forward and backward, once for each kind of tensors, and remembers: in memory and on disk (see `choices.py`).
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastkit.kernels import choices
from fastkit.kernels.attention import attention, seen_pairs
from fastkit.kernels.attention_forward import lacking
from fastkit.kernels.common import architecture

# in the order in which they are taken where nothing may be timed
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "ours": None,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
RUNS = 5  # timed for each candidate, after two that warm up
_chosen: dict[tuple, str] = {}
_decider: str | None = None  # see `deciding`; not a context variable: backward passes run in threads of their own


def attend_by(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True, window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """`attention(q, k, v, causal, window, scale)` by one of BACKENDS: "ours", or one of torch's by its name.

    Raises ValueError for another name, RuntimeError where torch's backend cannot take these tensors. torch's own knows
    no window and counts positions from the first query, so both cost it a mask where T_q and T_k differ.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attend_by: there is no backend {backend!r}; take one of {', '.join(BACKENDS)}")
    if backend == "ours":
        return attention(q, k, v, causal, window, scale)
    plain = window is None and (not causal or q.shape[2] == k.shape[2])
    mask = None if plain else seen_pairs(q.shape[2], k.shape[2], causal, window, q.device)
    gqa = q.shape[1] != k.shape[1]
    if gqa and backend == "efficient":  # it has no grouped heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        gqa = False
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and plain, scale=scale, enable_gqa=gqa)


def candidates(
    q: torch.Tensor, k: torch.Tensor, causal: bool = True, window: int | None = None
) -> tuple[str, ...]:  # fmt: skip
    """Those of BACKENDS, in their order, that may take such tensors: all but those that would need a mask and have
    none, and our kernels where `attention` does not use them."""
    masked = window is not None or (causal and q.shape[2] != k.shape[2])
    if q.device.type != "cuda":
        return ("ours",)
    found = [name for name in BACKENDS if not (masked and name in ("cudnn", "flash"))]
    if lacking(architecture(q.device), q.dtype):
        found.remove("ours")
    if causal and q.shape[2] > k.shape[2]:  # queries that see no key are nan in torch's
        return ("ours",)
    return tuple(found)


def choose(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True, window: int | None = None,
    scale: float | None = None, force: str | None = None, timed: bool = True, among: Sequence[str] = tuple(BACKENDS),
) -> str:  # fmt: skip
    """The name to give to `attend_by` for tensors such as these.

    force    a name, which is taken if these tensors can be computed so
    timed    False: the fastest if it is known already, else the first of BACKENDS that can take them
    among    the names that may be chosen

    On a GPU the fastest, by the median of RUNS forward passes (and backward, if an input requires a gradient), timed
    once for each card, versions, dtype, shapes, layouts and options. While a CUDA graph is captured or torch.compile
    traces nothing is timed. Elsewhere than on CUDA "ours", which is the torch reference there.

    Raises ValueError for a `force` that there is not, RuntimeError where it cannot take these tensors.
    """
    if force is not None:
        if force not in BACKENDS:
            raise ValueError(f"choose: there is no backend {force!r}; take one of {', '.join(BACKENDS)}")
        if q.device.type == "cuda" and _time(force, q, k, v, causal, window, scale, runs=0) is None:
            raise RuntimeError(
                f"choose: backend {force!r} cannot take q {tuple(q.shape)}, k {tuple(k.shape)}, {q.dtype}"
            )
        return force
    names = tuple(name for name in candidates(q, k, causal, window) if name in among)
    if len(names) == 1:
        return names[0]
    if _decider in names:
        return _decider
    timed = timed or _decider == "timed"
    idle = not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    layouts = tuple((x.shape, x.stride()) for x in (q, k, v))
    key = (_card(q.device), q.dtype, layouts, causal, window, scale, trained, names)
    for known in (key,) if timed else (key, (*key, "untimed")):
        if known in _chosen:
            return _chosen[known]
    if not torch.compiler.is_compiling() and (stored := choices.stored(*_on_disk(key))) in names:
        _chosen[key] = stored
        return stored
    if not idle:  # nothing may be tried
        return "ours" if "ours" in names else names[-1]
    times = {}
    for name in names:
        milliseconds = _time(name, q, k, v, causal, window, scale, RUNS if timed else 0, trained)
        if milliseconds is not None:
            times[name] = milliseconds
            if not timed:
                break
    best = min(times, key=times.get)
    _chosen[key if timed else (*key, "untimed")] = best
    if timed:
        choices.store(*_on_disk(key), best)
    return best


def _on_disk(key: tuple) -> tuple[str, str]:
    """The file of a key of `_chosen`, and what it is called there."""
    card, dtype, layouts, causal, window, scale, trained, names = key
    tensors = ", ".join(
        f"{name} {list(shape)} by {list(strides)}" for name, (shape, strides) in zip("qkv", layouts, strict=True)
    )
    options = f"causal {causal}, window {window}, scale {scale}, backward {trained}, of {' '.join(names)}"
    return choices.file_name("attention", card), f"{str(dtype).removeprefix('torch.')} {tensors}, {options}"


@contextmanager
def deciding(how: str) -> Iterator[None]:
    """Within, `choose` times also where it is asked not to (`how` "timed"), or takes the backend `how` where it may."""
    global _decider
    before, _decider = _decider, how
    try:
        yield
    finally:
        _decider = before


@functools.cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _time(name, q, k, v, causal, window, scale, runs: int, trained: bool = False) -> float | None:
    """Median milliseconds of `runs`, 0 for none; None if the backend cannot take these tensors."""
    inputs = [x.detach().requires_grad_(trained) for x in (q, k, v)]

    def run() -> None:
        with torch.set_grad_enabled(trained):
            o = attend_by(name, *inputs, causal, window, scale)
            if trained:
                torch.autograd.grad(o, inputs, torch.ones_like(o))

    try:
        for _ in range(2):
            run()
    except (RuntimeError, NotImplementedError):  # no such kernel; out of memory, too
        return None
    return statistics.median(_milliseconds(run, q.device) for _ in range(runs)) if runs else 0.0


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    start.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end)
