"""All adapters as one parameter, for the optimizer: one update instead of one a tensor.

A 7B model has 448 adapter tensors. An optimizer that takes them one by one launches several kernels for each, and the
GPU waits between them: a step of few tokens spends more time there than in its layers. Here every tensor becomes a view
of one flat buffer, which is what the optimizer sees. The rest of the program sees the tensors that it knows.
"""

import torch
from torch import nn

from fastkit.errors import FastkitError


class Flat:
    """`parameters` as views of one; `parameter` is that one, whose gradient is theirs for the length of a step.

    The optimizer made of `parameter` must be given to `attach`. Raises FastkitError for parameters of several dtypes or
    devices.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) != 1:
            raise FastkitError(f"the trained parameters are of several kinds, {sorted(map(str, kinds))}: use one dtype")
        self.parts = parameters
        self.parameter = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        for part, view in zip(parameters, self._views(), strict=True):
            part.data = view

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Have each step of `optimizer` gather the gradients before it and let go of them after it."""
        optimizer.register_step_pre_hook(lambda *args: self._gather())
        optimizer.register_step_post_hook(lambda *args: setattr(self.parameter, "grad", None))
        return optimizer

    def _views(self) -> list[torch.Tensor]:
        pieces = self.parameter.detach().split([p.numel() for p in self.parts])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parts, strict=True)]

    def _gather(self) -> None:
        if all(p.grad is None for p in self.parts):
            return
        for part, view in zip(self.parts, self._views(), strict=True):
            if part.data_ptr() != view.data_ptr():  # its numbers were put elsewhere; the optimizer's go on from them
                view.copy_(part.detach())
                part.data = view
        self.parameter.grad = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parts]
        )


def can_be_flat(parameters: list[nn.Parameter]) -> bool:
    """Whether `parameters` are plain tensors of one dtype on one device."""
    return (
        len({(type(p.data), p.dtype, p.device) for p in parameters}) == 1 and type(parameters[0].data) is torch.Tensor
    )
