"""Forward and backward of a small batch as one CUDA graph: captured once for each shape, then launched as a whole.

A step of a 7B model launches some 1,900 kernels, each by 30 to 60 us of Python; with few tokens the GPU is done with
one before the next is launched (512 tokens of Mistral-7B on an H200: 192 ms a step, of which the GPU works 55). A graph
holds the launches with their addresses. So what it reads must stay where it is: inputs are copied into tensors of its
own, the adapters are updated in place (as optimizers do), and gradients are added to buffers of its own, which
parameters have as their `grad`; so accumulating, clipping and any schedule go on outside as they were.

Not in a graph: dropout, whose masks would be the same in every step; offloading, which a small batch does not need;
attention masks and the positions of packed rows, which are read on the host. A batch padded on the right needs no mask
under causal attention: leave it out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from fastkit.models.patch import fused_layers

MOST = 8  # shapes that are captured; others run launch by launch

Inputs = dict[str, torch.Tensor]


def lacking(model: nn.Module) -> str:
    """Why the steps of `model`, which is patched, cannot be captured; "" if they can."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return "several processes share its gradients, which a captured step would not add up"
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters or any(p.device.type != "cuda" for p in parameters):
        return "it is not on a GPU"
    if len({p.dtype for p in parameters}) > 1:
        return "its trained parameters are of several dtypes"
    if not (layers := fused_layers(model)):
        return "its layers are not fused"
    if any(layer.plan is not None and layer.plan.offload for layer in layers):
        return "its plan offloads"
    if any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        return "it has dropout, whose masks would be the same in every step"
    return ""


class Graphs:
    """Runs passes of `model` and adds their gradients to the parameters' `grad`.

    The first pass of a shape runs launch by launch, which compiles what is not compiled yet; the second is captured.
    Between steps set `grad` to None, or zero it. Raises ValueError if the model cannot be captured: see `lacking`.
    """

    def __init__(self, model: nn.Module):
        if why := lacking(model):
            raise ValueError(f"a step of this model cannot be captured: {why}")
        self.model, self.parameters = model, [p for p in model.parameters() if p.requires_grad]
        first, sizes = self.parameters[0], [p.numel() for p in self.parameters]
        self.flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        pieces = self.flat.split(sizes)
        self.gradients = [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]
        self.seen, self.captured = set(), {}
        self.pool = torch.cuda.graph_pool_handle()
        self._where = self._addresses()

    def run(self, compute: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> torch.Tensor:
        """The loss, detached, of compute(inputs); compute must read nothing else that changes.

        Raises ValueError for inputs that are read on the host.
        """
        if read := {"attention_mask", "position_ids"} & inputs.keys():
            raise ValueError(
                f"a captured step takes no {' and no '.join(sorted(read))}: leave it out, see fastkit.models.graphs"
            )
        if self._where != self._addresses():  # somebody moved the adapters: what was captured reads the old place
            self.captured.clear()
            self._where = self._addresses()
        self._attach()
        kind = tuple((name, tuple(x.shape), x.dtype) for name, x in sorted(inputs.items()))
        if kind not in self.captured:
            if kind not in self.seen or len(self.captured) == MOST:
                self.seen.add(kind)
                return self._pass(compute, inputs)
            self.captured[kind] = self._capture(compute, inputs)
        graph, own, loss = self.captured[kind]
        for name, x in inputs.items():
            own[name].copy_(x)
        graph.replay()
        return loss.clone()

    def _pass(self, compute, inputs: Inputs) -> torch.Tensor:
        loss = compute(inputs)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        found = [(own, g) for own, g in zip(self.gradients, gradients, strict=True) if g is not None]
        torch._foreach_add_(*map(list, zip(*found, strict=True)))
        return loss.detach()

    def _capture(self, compute, inputs: Inputs):
        """(the graph, its inputs, its loss); capturing runs nothing."""
        own, graph = {name: x.clone() for name, x in inputs.items()}, torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with self._unread(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self._pass(compute, own)  # thread_local: other threads may pin memory
        return graph, own, loss

    @contextmanager
    def _unread(self) -> Iterator[None]:
        every = [layer.shared.sequences for layer in fused_layers(self.model)]
        for sequences in every:
            sequences.unread = True
        try:
            yield
        finally:
            for sequences in every:
                sequences.unread = False

    def _attach(self) -> None:
        """Have each parameter's `grad` be its buffer; empty where there was none."""
        none = all(p.grad is None for p in self.parameters)
        if none:
            self.flat.zero_()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not gradient:
                if not none:
                    gradient.zero_() if parameter.grad is None else gradient.copy_(parameter.grad)
                parameter.grad = gradient

    def _addresses(self) -> list[int]:
        return [p.data_ptr() for p in self.parameters]
