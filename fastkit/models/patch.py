"""Run a transformers model's decoder layers through fastkit's kernels while it learns, and give it back as it was."""

import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from fastkit.errors import FastkitError
from fastkit.models.fused_head import FusedHead, FusedLoss, check_head
from fastkit.models.fused_layer import LAYERS, MLP, FusedLayer, Shared, is_decoder_layer, is_silu, read_layer
from fastkit.models.plans import Plan, plan_of
from fastkit.models.products import GROUPS, FP8Group, bound, lacking
from fastkit.models.projection import Group, Refusal
from fastkit.ops import rms_norm, swiglu


@dataclass
class Report:
    """What `patch` took.

    layers     decoder layers that run as two fused halves
    norms      RMSNorms outside of these, by their kernel
    mlps       SwiGLU MLPs outside of these, by their kernel
    heads      heads with a loss that needs no logits
    left       what was not taken, by its name, and why
    notes      what was taken in a way worth knowing, by its name
    """

    layers: int = 0
    norms: int = 0
    mlps: int = 0
    heads: int = 0
    left: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict:
        """For metrics.json."""
        return {
            "layers": self.layers,
            "rms_norm": self.norms,
            "swiglu": self.mlps,
            "head": self.heads,
            "left": dict(self.left),
            "notes": dict(self.notes),
        }

    def left_by_reason(self) -> list[tuple[str, str]]:
        """[(why, the first that was left for that and how many others)]."""
        return _by_reason(self.left)

    def __str__(self) -> str:
        counts = ((self.layers, "fused layer"), (self.norms, "norm"), (self.mlps, "MLP"), (self.heads, "head"))
        taken = [f"{n} {what}" + "s" * (n != 1) for n, what in counts if n]
        lines = [f"fastkit runs {', '.join(taken) or 'nothing of this model'}"]
        lines += [f"  not {names}: {why}" for why, names in self.left_by_reason()]
        lines += [f"  {names}: {what}" for what, names in _by_reason(self.notes)]
        return "\n".join(lines)


def _by_reason(said: dict[str, str]) -> list[tuple[str, str]]:
    """[(what is said, the first it is said of and how many others)]."""
    of = {}
    for name, what in said.items():
        of.setdefault(what, []).append(name)
    return [(what, names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")) for what, names in of.items()]


Plans = str | Plan | Sequence[str | Plan] | None


def patch(model: nn.Module, plan: Plans = None, layers: bool = True, compute: str = "auto") -> Report:
    """Let `model`, of transformers or peft, learn through fastkit's kernels; only this object changes.

    Each decoder layer of Llama, Mistral, Qwen2, Qwen2.5 and Qwen3 becomes two halves with a backward of their own (see
    `attention_half.py`, `mlp_half.py`); where one cannot, its norms and its SwiGLU MLP take their kernels, like the
    norms outside of layers. The head and the loss become one that never holds the logits (see `fused_head.py`).
    `forward` is set on these modules, `_loss_function` on the model, and nothing else, so saving, merging and switching
    of adapters, Trainer and generation go on as they were. Layers, norms and MLPs act where gradients are enabled:
    without, as in `generate`, every module runs its own forward, bit by bit.

    plan    what layers keep for their backward, of `plans.py`: one for all, or a sequence with one a layer; None:
            everything or, with gradient checkpointing turned on, now or later, their input alone
    layers  False: no layer is fused; all norms and SwiGLU MLPs take their kernels
    compute what the products of frozen weights run in: "auto", the model's own dtype; "fp8", e4m3 (see `products.py`),
            on GPUs from sm_89 on, for weights in 4 bits, and without LoRA dropout
    returns what was taken, and what was not and why. A second call takes nothing more.

    Raises FastkitError for an unknown plan or compute, plans for another number of layers, and, before anything is
    taken, for a layer that cannot be computed as asked.
    """
    shared, report = Shared(_group(model, compute, layers)), Report()
    plans = iter(_plans(plan, sum(map(is_decoder_layer, model.modules()))))
    others = _layers_of_others(model) if layers else set()
    within: set[nn.Module] = set()  # modules of fused layers
    for name, module in model.named_modules():
        if type(module).__name__ in others and not is_decoder_layer(module):
            report.left[name] = f"a {type(module).__name__}, and only layers of {', '.join(LAYERS.values())} are fused"
        if module in within or isinstance(vars(module).get("forward"), FusedLayer):
            within.update(module.modules())
        elif layers and is_decoder_layer(module):
            its_plan = next(plans)
            if why := _why_not(module, name, report):
                report.left[name] = why
            else:
                module.forward = FusedLayer(module, shared, its_plan)
                within.update(module.modules())
                report.layers += 1
        elif (forward := _kernel_forward(module)) is not None:
            if "forward" not in vars(module):
                module.forward = types.MethodType(forward, module)
                report.norms += forward is _rms_norm_forward
                report.mlps += forward is _swiglu_mlp_forward
            elif not _is_ours(module):
                report.left[name] = "somebody else replaced its forward"
        elif "lm_head" in module._modules and hasattr(module, "loss_function") and not _has_our_loss(module):
            try:
                check_head(module)
            except Refusal as why:
                report.left[f"{name}.lm_head".lstrip(".")] = str(why)
            else:
                module.lm_head.forward, module._loss_function = FusedHead(module.lm_head), FusedLoss()
                report.heads += 1
    _link(model)
    return report


def _layers_of_others(model: nn.Module) -> set[str]:
    """Names of the classes that transformers' models here call their layers."""
    kinds = {kind for module in model.modules() for kind in getattr(module, "_no_split_modules", None) or ()}
    return {kind for kind in kinds if kind.endswith(("Layer", "Block"))}


def _link(model: nn.Module) -> None:
    """Tell each fused layer of `model` what comes after it."""
    forwards = [vars(module).get("forward") for module in model.modules() if is_decoder_layer(module)]
    for ours, after in pairwise([*forwards, None]):
        if isinstance(ours, FusedLayer):
            ours.following = after.layer.input_layernorm if isinstance(after, FusedLayer) else None


def set_plan(model: nn.Module, plan: Plans) -> None:
    """Give the fused layers of a patched `model` another plan, from their next forward on. Raises as `patch` does."""
    layers = fused_layers(model)
    for layer, its_plan in zip(layers, _plans(plan, len(layers)), strict=True):
        layer.plan = its_plan
        layer.shared.keeper.clear()  # host memory of sizes that the old plan kept


def fused_layers(model: nn.Module) -> list[FusedLayer]:
    """The fused layers of `model`, first to last."""
    return fused_among(model.modules())


def fused_among(modules: Iterable[nn.Module]) -> list[FusedLayer]:
    """What those of `modules` that are fused layers run as."""
    return [vars(m)["forward"] for m in modules if isinstance(vars(m).get("forward"), FusedLayer)]


def _plans(plan: Plans, layers: int) -> list[Plan | None]:
    if plan is None or isinstance(plan, str | Plan):
        return [None if plan is None else plan_of(plan)] * layers
    if len(plan) != layers:
        raise FastkitError(
            f"{len(plan)} plans are given for {layers} decoder layers: give one for each, or one for all"
        )
    return [plan_of(one) for one in plan]


def _group(model: nn.Module, compute: str, layers: bool) -> type[Group]:
    """How layers multiply under `compute`, once all of them can."""
    if compute not in GROUPS:
        raise FastkitError(f"there is no compute {compute!r}: use one of {', '.join(GROUPS)}")
    group = GROUPS[compute]
    if any(layer.shared.group is not group for layer in fused_layers(model)):
        raise FastkitError(f"the model is patched with another compute than {compute!r}: unpatch it first")
    if group is FP8Group:
        if not layers:
            raise FastkitError('compute="fp8" is for fused layers, and layers=False fuses none: leave out one of them')
        for name, module in model.named_modules():
            if is_decoder_layer(module) and "forward" not in vars(module):
                _prepare_fp8(module, name)
    return group


def _prepare_fp8(layer: nn.Module, name: str) -> None:
    """Raise FastkitError if `layer` lacks something for FP8; compute what no step should have to."""
    try:
        projections = read_layer(layer).projections
    except Refusal:
        return  # it will not be fused
    for its, projection in projections.items():
        if why := lacking(projection):
            raise FastkitError(f'compute="fp8": {name}: {its}: {why}')
        bound(projection.weight)


def unpatch(model: nn.Module) -> None:
    """Take all that `patch` set off `model` again; all else is as it was, for nothing else was touched."""
    _unpatch(model, keep=set())


@contextmanager
def patched(model: nn.Module, plan: Plans = None, compute: str = "auto") -> Iterator[Report]:
    """`patch` for the length of a with statement. Parts that were patched before stay so after it."""
    before = {module for module in model.modules() if _is_ours(module) or _has_our_loss(module)}
    try:
        yield patch(model, plan, compute=compute)
    finally:
        _unpatch(model, keep=before)


def _unpatch(model: nn.Module, keep: set[nn.Module]) -> None:
    for module in model.modules():
        if module not in keep:
            if _is_ours(module):
                del module.forward
            if _has_our_loss(module):
                del module._loss_function
    _link(model)


def _why_not(layer: nn.Module, name: str, report: Report) -> str | None:
    """Why `layer` cannot be fused, or None; notes what is worth knowing of one that can."""
    if "forward" in vars(layer):
        return "somebody else replaced its forward"
    try:
        read_layer(layer)
    except Refusal as why:
        return str(why)
    for child, module in layer.named_modules():
        if p := max(
            (d.p for d in getattr(module, "lora_dropout", {}).values() if isinstance(d, nn.Dropout)), default=0
        ):
            report.notes[f"{name}.{child}"] = f"LoRA dropout {p}: two products instead of a merged weight"
    return None


def _is_ours(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    kernels = (_rms_norm_forward, _swiglu_mlp_forward)
    return isinstance(forward, FusedLayer | FusedHead) or getattr(forward, "__func__", None) in kernels


def _has_our_loss(module: nn.Module) -> bool:
    return isinstance(vars(module).get("_loss_function"), FusedLoss)


def _kernel_forward(module: nn.Module):
    """The forward by a kernel of a norm or an MLP; None for other modules."""
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return _rms_norm_forward
    gated = all(hasattr(module, name) for name in MLP) and is_silu(getattr(module, "act_fn", None))
    return _swiglu_mlp_forward if gated else None


def _rms_norm_forward(self, hidden_states):
    if not torch.is_grad_enabled():
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _swiglu_mlp_forward(self, x):
    if not torch.is_grad_enabled():
        return type(self).forward(self, x)
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
