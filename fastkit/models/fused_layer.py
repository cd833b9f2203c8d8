"""A decoder layer of transformers as two fused halves: what stands in a patched layer's `forward`.

A layer is read anew in every call: which adapters are active, at what scale, merged or disabled; so peft's switches
work as they do without us. Where a call cannot go fused it takes transformers' own forward, and says so once.

Gradient checkpointing. transformers wraps a layer so that its forward runs again in the backward. A fused layer decides
by its plan what to compute again, so the wrapper must not. Up to transformers 5.17 or so the wrapper is in `__call__`,
around any forward, and works by autograd's saved tensors; the halves have none (see `half.py`), so nothing runs again.
From 5.23 it is in the class's forward, which an instance's replaces. Either way there is nothing to switch off and
nothing to restore, and a call that takes transformers' forward is checkpointed as ever. The flag is read as a wish:
without a plan of its own, a layer keeps everything while it is off and recomputes all while it is on.
Reentrant checkpointing (not the default) hides from a layer that gradients are wanted: its first pass is transformers'
own, its second one fused. That is right, but slow, and said once.
"""

import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

from fastkit.kernels.attention_forward import MAX_D
from fastkit.models import attend, pieces
from fastkit.models.attention_half import AttentionHalf
from fastkit.models.keeping import Keeper
from fastkit.models.mlp_half import MLPHalf
from fastkit.models.plans import PLANS, Plan
from fastkit.models.projection import Group, Projection, Refusal, read, rounded
from fastkit.models.sequences import Sequences

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LAYERS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Shared:
    """What the fused layers of one model share: how they multiply, where they keep, the batch's sequences, and what was
    said already."""

    group: type[Group] = Group
    keeper: Keeper = field(default_factory=Keeper)
    sequences: Sequences = field(default_factory=Sequences)
    said: set[str] = field(default_factory=set)

    def say(self, text: str) -> None:
        """Warn, once for each text."""
        if text not in self.said:
            self.said.add(text)
            warnings.warn(text, stacklevel=3)


@dataclass(frozen=True)
class Parts:
    """A layer, read: its norms and projections."""

    norms: tuple[pieces.Norm, pieces.Norm]
    qk_norms: tuple[pieces.Norm, pieces.Norm] | None
    projections: dict[str, Projection]


def is_decoder_layer(module: nn.Module) -> bool:
    """Whether `module` is a decoder layer of one of the architectures that can be fused."""
    return any(_is_own(module, arch, "DecoderLayer") for arch in LAYERS)


def _is_own(module: nn.Module, arch: str, kind: str) -> bool:
    """Whether `module` is transformers' own `kind` of `arch`, and no subclass of somebody's."""
    cls = type(module)
    return (cls.__module__, cls.__name__) == (f"transformers.models.{arch}.modeling_{arch}", LAYERS[arch] + kind)


def is_silu(activation) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def read_layer(layer: nn.Module) -> Parts:
    """The parts of a decoder layer as they stand now. Raises Refusal with what cannot be fused, by its name."""
    arch = next((arch for arch in LAYERS if _is_own(layer, arch, "DecoderLayer")), None)
    if arch is None:
        raise Refusal(f"a {type(layer).__module__}.{type(layer).__name__}")
    for name, child in layer.named_children():
        _check_untouched(child, name)
    for name, kind in (("self_attn", "Attention"), ("mlp", "MLP")):
        if not _is_own(getattr(layer, name), arch, kind):
            raise Refusal(f"{name}: a {type(getattr(layer, name)).__name__}")
    attention, mlp = layer.self_attn, layer.mlp
    if not is_silu(mlp.act_fn):
        raise Refusal(f"mlp: activation {type(mlp.act_fn).__name__.removesuffix('Activation')}")
    if attention.attention_dropout:
        raise Refusal(f"self_attn: attention dropout {attention.attention_dropout}")
    if attention.head_dim > MAX_D:
        raise Refusal(f"self_attn: heads of {attention.head_dim} numbers, above {MAX_D}")
    if not (getattr(attention, "is_causal", True) and getattr(attention.config, "is_causal", True)):
        raise Refusal("self_attn: not causal")
    norms = tuple(_read_norm(layer, name, arch) for name in ("input_layernorm", "post_attention_layernorm"))
    qk_norms = None
    if hasattr(attention, "q_norm"):
        qk_norms = tuple(_read_norm(attention, name, arch) for name in ("q_norm", "k_norm"))
        for name, norm in zip(("q_norm", "k_norm"), qk_norms, strict=True):
            if norm.weight.requires_grad:
                raise Refusal(f"self_attn.{name}: its weight is trained")
    projections = {}
    for name in (*ATTENTION, *MLP):
        try:
            projections[name] = read(getattr(attention if name in ATTENTION else mlp, name))
        except Refusal as why:
            raise Refusal(f"{name}: {why}") from None
    return Parts(norms, qk_norms, projections)


def _read_norm(parent: nn.Module, name: str, arch: str) -> pieces.Norm:
    module = getattr(parent, name)
    if not _is_own(module, arch, "RMSNorm"):
        raise Refusal(f"{name}: a {type(module).__name__}")
    return pieces.Norm(module.weight, module.variance_epsilon)


def _check_untouched(module: nn.Module, name: str) -> None:
    """Raise Refusal if somebody replaced the forward of `module`, or of one in it, or wants to be called with it."""
    own = vars(module)  # not getattr: a layer has 80 modules with its adapters, and this runs in every call
    if "forward" in own:
        raise Refusal(f"{name}: somebody else replaced its forward")
    if (own[HOOKS[0]] or own[HOOKS[1]] or own[HOOKS[2]] or own[HOOKS[3]]) and _hooked(module):
        raise Refusal(f"{name}: it has hooks, which a fused layer would not call")
    for child, inner in own["_modules"].items():
        if inner is not None:
            _check_untouched(inner, f"{name}.{child}")


def _hooked(module: nn.Module) -> bool:
    """Whether any hook of `module` would do something now.

    Once outputs were captured, transformers leaves hooks on every module for good, idle until they are asked again."""
    hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
    if all(getattr(hook, "__module__", "") == "transformers.utils.output_capturing" for hook in hooks):
        from transformers.utils.output_capturing import _active_collector

        return "attentions" in (_active_collector.get() or ())
    return True


class FusedLayer:
    """`forward` of one decoder layer, in its place on the instance.

    plan        of its backward; None: as the gradient checkpointing flag asks. It may be set between steps.
    following   the norm that the next layer begins with, if that is fused too
    """

    following: nn.Module | None = None

    def __init__(self, layer: nn.Module, shared: Shared, plan: Plan | None):
        self.layer, self.shared, self.plan = layer, shared, plan

    def __call__(self, hidden_states, attention_mask=None, **kwargs):
        if torch.is_grad_enabled():
            try:
                halves = self._halves(hidden_states, attention_mask, **kwargs)
            except Refusal as why:
                self.shared.say(f"a decoder layer goes through transformers, not fused: {why}")
            else:
                attention, mlp = halves
                return mlp.run(attention.run(hidden_states))
        elif self.checkpointed() and hidden_states.requires_grad:
            self.shared.say(
                "reentrant gradient checkpointing runs each decoder layer through transformers and then fused: "
                'set gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        return type(self.layer).forward(self.layer, hidden_states, attention_mask=attention_mask, **kwargs)

    def checkpointed(self) -> bool:
        return self.layer.gradient_checkpointing and self.layer.training

    def _halves(
        self, x, mask, position_ids=None, past_key_values=None, cache=None, position_embeddings=None, **kwargs
    ) -> tuple[AttentionHalf, MLPHalf]:
        """The two halves for this call; raises Refusal where it cannot go fused."""
        layer, attention = self.layer, self.layer.self_attn
        past_key_values = cache if past_key_values is None else past_key_values  # its name from transformers 5.24 on
        if past_key_values is not None and not self.checkpointed():  # transformers takes it away from those
            raise Refusal("it is given a cache of keys and values: pass use_cache=False to train")
        if position_embeddings is None:
            raise Refusal("it is given no position_embeddings")
        if kwargs.get("is_causal") is False or kwargs.get("position_bias") is not None:
            raise Refusal("it is asked for attention that is not causal, or biased")
        implementation = attention.config._attn_implementation or "eager"
        if implementation not in IMPLEMENTATIONS:
            raise Refusal(f"the attention is {implementation!r}, whose masks cannot be read")
        parts = read_layer(layer)
        (B, T), D, found = x.shape[:2], attention.head_dim, parts.projections
        window = window_of(attention)
        packed = self.shared.sequences.read(mask, position_ids, B, T, window, implementation)
        if window is not None and window >= T:
            window = None
        dtype = _compute_dtype(x, found)
        plan = self.plan or PLANS["recompute-all" if self.checkpointed() else "keep"]
        groups = [[found[name] for name in names] for names in (ATTENTION[:3], ATTENTION[3:], MLP[:2], MLP[2:])]
        qkv, o, gate_up, down = map(self.shared.group, groups, [dtype] * len(groups), rounded(groups, dtype))
        heads, key_heads = qkv.sizes[0] // D, qkv.sizes[1] // D
        first = AttentionHalf(
            parts.norms[0], qkv, parts.qk_norms, o, (B, T, heads, key_heads, D), position_embeddings,
            attend.Attend(attention.scaling, window, packed), plan, self.shared.keeper,
        )  # fmt: skip
        second = MLPHalf(parts.norms[1], gate_up, down, plan, self.shared.keeper, first.again)
        first.next_norm, second.next_norm = second.norm, self._following(x.device)
        return first, second

    def _following(self, device: torch.device) -> pieces.Norm | None:
        """`following`, where its weight is at hand: not elsewhere, nor in parts, as under FSDP2 until its turn."""
        weight = None if self.following is None else self.following.weight
        if type(weight) is not nn.Parameter or weight.device != device:
            return None
        return pieces.Norm(weight, self.following.variance_epsilon)


def window_of(attention: nn.Module) -> int | None:
    """How many keys a query of this layer sees; Mistral says it for all layers, Qwen for each."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)


def _compute_dtype(x: torch.Tensor, projections: dict[str, Projection]) -> torch.dtype:
    """The dtype of products: autocast's where it is on, else what the 4-bit layers are set to, else x's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    set_to = {p.compute_dtype for p in projections.values() if p.compute_dtype is not None}
    if len(set_to) > 1:
        raise Refusal(f"its 4-bit layers compute in different dtypes: {', '.join(sorted(map(str, set_to)))}")
    return set_to.pop() if set_to else x.dtype
