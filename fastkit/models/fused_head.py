"""A causal language model's head and loss as one, without the logits: `ops.linear_cross_entropy` in their place.

transformers calls the head, whose result is the logits, and hands these to its loss. The head patched here gives
`Logits` instead, a tensor that is not computed yet; the loss patched here takes from it what it would have been
computed from. Whoever else uses it, a metric, a loss of the user's own or a Trainer that collects predictions, makes it
compute itself, by the product that would have been made, with its gradient.
"""

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastkit.models.projection import Refusal
from fastkit.ops import linear_cross_entropy

# what can be asked of a tensor, or done to it, that does not need its numbers
_ASKED = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_cpu", "is_meta")
} | {getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "__len__", "__hash__")}


class Logits(torch.Tensor):
    """hidden @ weightᵀ [..., V], computed when it is used.

    Shape, dtype and device are known before; `float()` and `to(dtype)` of it wait as well, for mixed precision calls
    them on a model's every output.
    """

    head: nn.Linear
    hidden: torch.Tensor

    @staticmethod
    def __new__(
        cls, head: nn.Linear, hidden: torch.Tensor, autocast: torch.dtype | None, to: torch.dtype | None = None
    ):
        """autocast: the dtype that autocast gives the product, if it is on. to: what the result is cast to."""
        shape = (*hidden.shape[:-1], head.out_features)
        logits = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=to or autocast or hidden.dtype, device=hidden.device
        )
        logits.head, logits.hidden, logits.autocast, logits.computed = head, hidden, autocast, None
        return logits

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden and weight, as the product takes them."""
        hidden, weight = self.hidden, self.head.weight
        return (hidden, weight) if self.autocast is None else (hidden.to(self.autocast), weight.to(self.autocast))

    def compute(self) -> torch.Tensor:
        """The logits, once, with the gradient of when they are first asked for."""
        if self.computed is None:
            with torch.autocast(self.hidden.device.type, enabled=False):
                self.computed = nn.functional.linear(*self.factors()).to(self.dtype)
        return self.computed

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _ASKED:
            if function == torch.Tensor.requires_grad.__get__:
                return args[0].hidden.requires_grad and torch.is_grad_enabled()
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function in (torch.Tensor.float, torch.Tensor.to) and (dtype := _cast_alone(function, args, kwargs)):
            waiting = args[0]
            if waiting.computed is None:
                return cls(waiting.head, waiting.hidden, waiting.autocast, dtype)
        args, kwargs = torch.utils._pytree.tree_map_only(Logits, lambda x: x.compute(), (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # from C++, below autograd
        args, kwargs = torch.utils._pytree.tree_map_only(Logits, lambda x: x.compute().detach(), (args, kwargs or {}))
        return function(*args, **kwargs)


def _cast_alone(function, args, kwargs) -> torch.dtype | None:
    """The dtype that is asked for, where nothing else is."""
    if function is torch.Tensor.float:
        return torch.float32
    found = args[1] if len(args) == 2 and not kwargs else kwargs.get("dtype") if len(args) == len(kwargs) == 1 else None
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


class FusedHead:
    """`forward` of the head, in its place on the instance.

    One position alone, as generation asks for, is computed at once.
    """

    def __init__(self, head: nn.Linear):
        self.head = head

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dim() < 2 or hidden.shape[-2] == 1 or torch.compiler.is_compiling():
            return nn.Linear.forward(self.head, hidden)
        kind = hidden.device.type
        return Logits(self.head, hidden, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)


class FusedLoss:
    """The loss of a model with a `FusedHead`: transformers' ForCausalLMLoss, of logits that are not computed."""

    def __call__(
        self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
    ) -> torch.Tensor:
        if not isinstance(logits, Logits) or logits.computed is not None:
            return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        hidden, weight = logits.factors()
        if shift_labels is None:  # so that tokens up to n predict n + 1
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(hidden.device)
        return linear_cross_entropy(
            hidden.flatten(0, -2),
            weight,
            shift_labels.to(hidden.device).flatten(),
            ignore_index=ignore_index,
            num_items_in_batch=num_items_in_batch,
        )


def check_head(model: nn.Module) -> None:
    """Raise Refusal with why the head and loss of `model`, one of transformers with `lm_head`, are left to it."""
    head = model.lm_head
    if type(head) is not nn.Linear:
        what = "its adapter would be ignored" if hasattr(head, "base_layer") else "not a plain linear layer"
        raise Refusal(f"a {type(head).__name__}: {what}")
    if head.bias is not None:
        raise Refusal("it has a bias")
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        raise Refusal("somebody else replaced its forward, or hooked it")
    if "_loss_function" in vars(model) or model.loss_function is not ForCausalLMLoss:
        raise Refusal("the model has a loss of its own")
