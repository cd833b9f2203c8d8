"""Run a transformers model's norms and gated MLPs through fastkit's kernels, and give it back as it was."""

import types

from fastkit.ops import rms_norm, swiglu


def patch(model) -> dict[str, int]:
    """Replace the forward of each RMSNorm and each SwiGLU MLP of `model` by one that calls fastkit's kernels.

    Only this model object changes: a `forward` attribute on the modules, nothing global. Returns how many of each
    were replaced. A second call replaces nothing more; `unpatch` takes them off again.
    """
    counts = {"rms_norm": 0, "swiglu": 0}
    for module in model.modules():
        if "forward" in vars(module):  # patched already, by us or by somebody else
            continue
        if _is_rms_norm(module):
            module.forward = types.MethodType(_rms_norm_forward, module)
            counts["rms_norm"] += 1
        elif _is_swiglu_mlp(module):
            module.forward = types.MethodType(_swiglu_mlp_forward, module)
            counts["swiglu"] += 1
    return counts


def unpatch(model) -> None:
    """Take every forward that `patch` set off `model` again."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in (_rms_norm_forward, _swiglu_mlp_forward):
            del module.forward


def _is_rms_norm(module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _is_swiglu_mlp(module) -> bool:
    projections = all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))
    return projections and type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _rms_norm_forward(self, hidden_states):
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _swiglu_mlp_forward(self, x):
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
