"""Where a step of ours spends its time, beside the least that this card could spend there.

A few steps run under torch.profiler. Marks divide each into stages: forward (embedding and layers), loss (from the
layers' output to its gradient), backward (the layers again), optimizer. Within these, the pieces of which layers are
made tell what they are: products, merging (the weights' dequantization, with the adapters), adapters (their gradients),
attention, elementwise (norms, RoPE but for a dq that attention turns back as it rounds it, SwiGLU unless its product
takes it too), quantizing (to FP8, in passes of its own); and other. On a GPU a kernel counts where it was launched, for
as long as it ran, however late; what it runs beside the main stream (copies to and from the host) is told apart. What
is left of the step as it was timed, without the profiler, are gaps, in which the GPU waits for work. On a CPU the time
itself is divided.

In a CUDA graph's replay nothing tells what a kernel belongs to. So such a step is profiled a second time, launched, and
the kernels of the replay count as those do that were launched in their turn. The times are those of the replay:
launched, a card at its power limit rests in the gaps, and its kernels run faster (products of a step of Mistral-7B: by
10% on an H200).

The floor of a stage's part is its least work, nothing computed again, at the card's measured rates: products at
cuBLAS's rate in that dtype, all else by the bytes of its kernel's declared cost at the speed of a copy; attention as
fast as the fastest of the backends by itself.
"""

import bisect
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from difflib import SequenceMatcher
from functools import wraps
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastkit.errors import FastkitError
from fastkit.kernels import adamw, linear_cross_entropy, lora, merged_dequantize, rms_norm, rope, swiglu
from fastkit.kernels.common import Cost
from fastkit.models import attend, pieces
from fastkit.models.products import FP8Group
from fastkit.models.projection import Group
from fastkit.models.shapes import SHAPES, config_of, head_dim

STAGE, PART = "fastkit stage: ", "fastkit part: "
STAGES = ("forward", "loss", "backward", "optimizer")
END, OTHER, BESIDE, UNKNOWN = "end", "other", "beside", "unknown"
ELEMENTWISE = ("norm", "norm_of_sum", "norm_backward", "rotate_", "turned_back_fp8", "gated", "gated_backward_as_")
PARTS = {  # what of a layer runs as what
    "products": (
        (Group, "gated"),
        (FP8Group, "unscaled"),
        *((owner, name) for owner in (Group, FP8Group) for name in ("forward", "input_gradient")),
    ),
    "merging": ((Group, "weight"), (FP8Group, "weight_fp8")),
    "adapters": ((Group, "gradients"),),
    "attention": ((attend, "attend"), (attend, "attend_backward")),
    "elementwise": tuple((pieces, name) for name in ELEMENTWISE),
    "quantizing": ((pieces, "quantized"),),
}


def stages(run, batches: Iterator[torch.Tensor], steps: int) -> list[dict]:
    """Rows of {stage, part, ms}, a step's mean over `steps` steps of `run`, a bench_run.Run; where it replays a graph,
    it launches from here on.

    Raises FastkitError where the profiler saw no kernel of a GPU.
    """
    events = _trace(run, batches, steps)
    if run.replays:
        run.launch()
        found = attribute_replayed(events, _trace(run, batches, steps))
    else:
        found = attribute(events, run.device.type == "cuda")
    return [{"stage": stage, "part": part, "ms": ms / steps} for (stage, part), ms in found.items()]


def _trace(run, batches: Iterator[torch.Tensor], steps: int) -> list[dict]:
    """The events of `steps` steps, in Chrome's format."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (run.device.type == "cuda")
    with _watched(run.model), profile(activities=activities) as profiler:
        for _ in range(steps):
            ids = next(batches)
            run.synchronize()
            mark("forward")
            run.gradients(ids)
            mark("optimizer")
            run.update()
            mark(END)
            run.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def mark(stage: str) -> None:
    """From here on, in time, it is `stage`."""
    with record_function(STAGE + stage):
        pass


@contextmanager
def _watched(model):
    """Within, the layers' stages and parts show in a trace of `model`."""
    decoder = model.get_base_model().model

    def at_output(module, args, output):
        mark("loss")
        hidden = output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: mark("backward"))

    with ExitStack() as stack:
        for part, places in PARTS.items():
            for owner, name in places:
                own = getattr(owner, name)
                setattr(owner, name, _shown(own, PART + part))
                stack.callback(setattr, owner, name, own)
        stack.callback(decoder.register_forward_hook(at_output).remove)
        yield


def _shown(function, name: str):
    @wraps(function)
    def call(*args, **kwargs):
        with record_function(name):
            return function(*args, **kwargs)

    return call


def attribute(events: list[dict], gpu: bool) -> dict[tuple[str, str], float]:
    """{(stage, part): milliseconds} of the events of a trace in Chrome's format, of all steps.

    The stage of kernels that ran on another stream than most is BESIDE, of those without a launch in the trace UNKNOWN.
    Raises FastkitError if there are none, with `gpu`.
    """
    if gpu:
        return _sums((place, event["dur"]) for event, place in _placed(events))
    _, places, lengths = _marked(events)
    return _sums(zip(places, lengths, strict=True))


def attribute_replayed(events: list[dict], launched: list[dict]) -> dict[tuple[str, str], float]:
    """`attribute` of steps that replay a graph, by the trace of as many that are `launched`.

    Both run the same one after the other, but for what transformers makes of masks in a capture alone, and products for
    which cuBLAS takes another kernel. So each step's kernels are laid beside the launched ones, by names in their order
    (difflib); what is between two that agree belongs where the launched ones between them do. Copies to and from the
    host run beside both, each direction in its own order.
    """
    times = []
    for steps in zip(_by_step(events), _by_step(launched), strict=True):
        for direction in ("DtoH", "HtoD", ""):
            times += _aligned(*([work for work in step if _direction(work[0]) == direction] for step in steps))
    return _sums(times)


def _aligned(ours: list[tuple], theirs: list[tuple]) -> Iterator[tuple[tuple[str, str], float]]:
    """(place, us) of each of `ours`, of _by_step; where none of `theirs` stands for it, its stage is the next one's."""
    places = [place for _, place, _ in theirs] or [(UNKNOWN, OTHER)]
    names = ([name for name, _, _ in work] for work in (theirs, ours))
    for _, first, last, start, stop in SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        stand = places[first:last] or [(places[min(first, len(places) - 1)][0], OTHER)]
        for n, (_, _, us) in enumerate(ours[start:stop]):
            yield stand[min(n, len(stand) - 1)], us


def _direction(name: str) -> str:
    """Of a copy between host and device; "" of all else."""
    return next((way for way in ("DtoH", "HtoD") if name.startswith(f"Memcpy {way}")), "")


def _by_step(events: list[dict]) -> list[list[tuple[str, tuple[str, str], float]]]:
    """(name, place, us) of the GPU's work in each step, in the order in which it began."""
    starts = sorted(event["ts"] for event in _annotations(events) if event["name"] == STAGE + STAGES[0])
    found = [[] for _ in starts]
    for event, place in _placed(events):
        if at := bisect.bisect_right(starts, event["ts"]):
            found[at - 1].append((_name(event), place, event["dur"]))
    return found


def _name(event: dict) -> str:
    """Of a kernel; one for copies within the GPU, which a graph may do by kernels (memcpy128), and one for fills."""
    for kind in ("Memcpy DtoD", "Memset"):
        if event["name"].startswith((kind, kind.split()[0].lower())):
            return kind
    return event["name"]


def _sums(times) -> dict[tuple[str, str], float]:
    found = defaultdict(float)
    for place, us in times:
        found[place] += us / 1e3
    return {place: ms for place, ms in found.items() if place[0] != END and ms}


def _placed(events: list[dict]) -> list[tuple[dict, tuple[str, str]]]:
    """The GPU's work in a trace, in the order in which it began, each with its place."""
    starts, places, _ = _marked(events)
    spans = [event for event in events if event.get("ph") == "X"]
    work = [event for event in spans if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not work:
        raise FastkitError("the profiler saw no kernel: this machine may not let programs profile its GPU")
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in spans
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    by_stream = defaultdict(float)
    for event in work:
        by_stream[event["args"]["stream"]] += event["dur"]
    main, found = max(by_stream, key=by_stream.get), []
    for event in sorted(work, key=lambda event: event["ts"]):
        at = launched.get(event["args"]["correlation"])
        place = (UNKNOWN, OTHER) if at is None else places[bisect.bisect_right(starts, at) - 1]
        if event["args"]["stream"] != main:
            place = BESIDE, "copies" if event["cat"] == "gpu_memcpy" else OTHER
        found.append((event, place))
    return found


def _marked(events: list[dict]) -> tuple[list[float], list[tuple[str, str]], list[float]]:
    """The `_timeline` of a trace."""
    named = _annotations(events)
    return _timeline(
        [(event["ts"], event["name"].removeprefix(STAGE)) for event in named if event["name"].startswith(STAGE)],
        [
            (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PART))
            for event in named
            if event["name"].startswith(PART)
        ],
    )


def _annotations(events: list[dict]) -> list[dict]:
    """What `record_function` marked, on the host."""
    return [event for event in events if event.get("ph") == "X" and event.get("cat") == "user_annotation"]


def _timeline(
    marks: list[tuple[float, str]], parts: list[tuple[float, float, str]]
) -> tuple[list[float], list[tuple[str, str]], list[float]]:
    """(starts, places, lengths) of the stretches of time between all marks and edges of parts: a place is (stage, the
    innermost part or OTHER). Before the first mark it is END."""
    edges = [(start, 1, -end, part) for start, end, part in parts if end > start]
    edges += [(end, 0, 0.0, part) for start, end, part in parts if end > start]
    edges += [(at, 2, 0.0, stage) for at, stage in marks]
    starts, places, stack, stage = [float("-inf")], [(END, OTHER)], [], END
    for at, kind, _, name in sorted(edges):
        if kind == 0:
            stack.pop()
        elif kind == 1:
            stack.append(name)
        else:
            stage = name
        starts.append(at)
        places.append((stage, stack[-1] if stack else OTHER))
    lengths = [0.0, *(end - start for start, end in pairwise(starts[1:])), 0.0]
    return starts, places, lengths[: len(starts)]


def card_facts(settings) -> dict:
    """{"gbps", "tflops" by dtype, "attention_ms": (forward, backward) of a layer, "attention_by": the backend}."""
    from fastkit.kernels.attention_choice import attend_by, choose
    from fastkit.lab.measure import measure
    from fastkit.lab.timing import median_ms
    from fastkit.models.load import resolve_dtype

    measured = measure()
    config = model_config(settings.shape)
    B, T, dtype = settings.batch, settings.seq, resolve_dtype("auto", torch.device("cuda"))
    H, H_k, D = _heads(config)
    q, k, v = (torch.randn(B, T, n, D, device="cuda", dtype=dtype).transpose(1, 2) for n in (H, H_k, H_k))
    window = getattr(config, "sliding_window", None)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    by = choose(*leaves, window=window)
    do = torch.randn(B, T, H, D, device="cuda", dtype=dtype).transpose(1, 2)

    def forward():
        with torch.no_grad():
            return attend_by(by, *leaves, window=window)

    both_ms = median_ms(lambda: torch.autograd.grad(attend_by(by, *leaves, window=window), leaves, do))
    forward_ms = median_ms(forward)
    return {
        "gbps": measured.copy_gbps,
        "tflops": measured.matrix_tflops,
        "attention_ms": (forward_ms, max(both_ms - forward_ms, 0.0)),
        "attention_by": by,
    }


def model_config(shape: str):
    """The transformers config of a named shape or a model's folder."""
    if shape in SHAPES:
        return config_of(shape)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(shape)


def _heads(config) -> tuple[int, int, int]:
    """(query heads, key heads, numbers a head)"""
    return config.num_attention_heads, config.num_key_value_heads, head_dim(config)


def floors(settings, dtype: torch.dtype, facts: dict | None) -> dict[tuple[str, str], float]:
    """{(stage, part): the least milliseconds} of one step; empty where nothing is known of the card."""
    if facts is None:
        return {}
    config = model_config(settings.shape)
    M, r, layers = settings.batch * settings.seq, settings.rank, config.num_hidden_layers
    K, I, (H, H_k, D) = config.hidden_size, config.intermediate_size, _heads(config)
    fp8 = settings.compute == "fp8"
    weights = torch.float8_e4m3fn if fp8 else dtype
    groups = (((H * D, H_k * D, H_k * D), K), ((K,), H * D), ((I, I), K), ((K,), I))  # outputs, input
    numbers = sum(N * width for Ns, width in groups for N in Ns)

    def of(cost: Cost, rate: str | None = None) -> float:
        at_copy = cost.bytes_moved / facts["gbps"] / 1e6
        return max(at_copy, cost.flops / facts["tflops"][rate] / 1e9) if rate else at_copy

    name = str(dtype).removeprefix("torch.")
    products = 2 * M * numbers / facts["tflops"]["float8" if fp8 else name] / 1e9
    merging = sum(of(merged_dequantize.cost(N, width, r, weights, torch.float32)) for Ns, width in groups for N in Ns)
    adapters = sum(of(lora.cost(M, width, Ns, r, dtype, torch.float32), name) for Ns, width in groups)
    elementwise = [
        2 * of(rms_norm.cost(M, K, dtype)[way])
        + of(rope.cost(settings.batch, settings.seq, H, H_k, D, dtype, dtype)[way])
        + of(swiglu.cost(M, I, dtype)[way])
        for way in (0, 1)
    ]
    loss = linear_cross_entropy.cost(M, K, config.vocab_size, dtype)
    trained = r * layers * sum(N + width for Ns, width in groups for N in Ns)
    per_layer = {
        ("forward", "products"): products,
        ("forward", "merging"): merging,
        ("forward", "attention"): facts["attention_ms"][0],
        ("forward", "elementwise"): elementwise[0],
        ("backward", "products"): products,
        ("backward", "merging"): merging,
        ("backward", "adapters"): adapters,
        ("backward", "attention"): facts["attention_ms"][1],
        ("backward", "elementwise"): elementwise[1],
    }
    return {place: layers * ms for place, ms in per_layer.items()} | {
        ("loss", OTHER): sum(of(cost, name) for cost in loss),
        ("optimizer", OTHER): of(adamw.cost(trained, torch.float32, torch.float32, bits=8)[1]),
    }


def breakdown(found: list[dict], floor: dict[tuple[str, str], float], median_ms: float | None) -> list[dict]:
    """`stages`, each part beside its floor, and the gaps that they leave of a step of `median_ms`; None on a CPU.

    Rows of {stage, part, ms, floor_ms}; a floor is 0 for what need not be, None where nothing is known of the card.
    """
    ms = {(row["stage"], row["part"]): row["ms"] for row in found}
    order = [*STAGES, UNKNOWN, "gaps", BESIDE]
    if median_ms is not None:
        ms["gaps", OTHER] = median_ms - sum(spent for (stage, _), spent in ms.items() if stage != BESIDE)
    rows = [
        {"stage": stage, "part": part, "ms": spent, "floor_ms": floor.get((stage, part), 0.0) if floor else None}
        for (stage, part), spent in ms.items()
    ]
    parts = [*PARTS, "copies", OTHER]
    return sorted(rows, key=lambda row: (order.index(row["stage"]), parts.index(row["part"])))
