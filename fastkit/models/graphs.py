"""Forward and backward of a small batch as one CUDA graph: captured once for each shape, then launched as a whole.

A step of a 7B model launches some 1,900 kernels, each by 30 to 60 us of Python; with few tokens the GPU is done with
one before the next is launched (512 tokens of Mistral-7B on an H200: 192 ms a step, of which the GPU works 55). A graph
holds the launches with their addresses. So what it reads must stay where it is: inputs are copied into tensors of its
own, the adapters are updated in place (as optimizers do), and gradients are added to buffers of its own, which
parameters have as their `grad`; so accumulating, clipping and any schedule go on outside as they were.

Packed rows are captured too. Where their sequences end is read on the host before each pass and copied into a tensor of
the graph's own, filled up with sequences of no tokens; `longest` is the row, for which the launch has blocks enough.

So are the copies of plans that offload: their streams branch off the captured one and come back to it. The host memory
that they go through was taken in the pass before, which was launched one by one, and is held by the graph.

Not in a graph: dropout, whose masks would be the same in every step; attention masks, which are read on the host. A
batch padded on the right needs no mask under causal attention: leave it out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from fastkit.models.fused_layer import is_decoder_layer
from fastkit.models.patch import fused_among, fused_layers
from fastkit.models.sequences import Packed, begin, ends

SMALL = 1.5e13  # parameters times tokens of a pass, up to which launches take longer than what they launch: see above
MOST = 8  # shapes that are captured; others run launch by launch
FEWEST_SEQUENCES = 16  # that a graph of packed rows has room for; from there on, powers of two

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
    if any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        return "it has dropout, whose masks would be the same in every step"
    if any(layer.checkpointed() for layer in layers):
        return "transformers checkpoints its activations, which is its plan's part"
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
        self.layers = [module for module in model.modules() if is_decoder_layer(module)]  # sought once: 2 ms of 7B
        self.pool = torch.cuda.graph_pool_handle()
        # torch (2.11) gives its generator to the first graph that lives; where memory runs out just then, it aborts
        self._first = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._first, pool=self.pool, capture_error_mode="thread_local"):
            self.flat.zero_()
        self._captured_under = None

    def run(self, compute: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> torch.Tensor:
        """The loss, detached, of compute(inputs); compute must read nothing else that changes.

        With `position_ids` [B, T] among them, rows are packed, as `Sequences` reads it of positions: a sequence begins
        where they do not go on. Raises ValueError for an attention mask.
        """
        if "attention_mask" in inputs:
            raise ValueError("a captured step takes no attention_mask: leave it out, see fastkit.models.graphs")
        self._attach()
        now = self._addresses(), [layer.plan for layer in fused_among(self.layers)]
        if now != self._captured_under:  # what was captured is another step, such as of a plan that took too much
            self.captured.clear()
            self.seen.clear()
            self._captured_under = now
        kind, ended = tuple((name, tuple(x.shape), x.dtype) for name, x in sorted(inputs.items())), None
        if "position_ids" in inputs:
            ended = filled(ends(begin(inputs["position_ids"])))
            kind += (len(ended),)
        if kind not in self.captured:
            if kind not in self.seen or len(self.captured) == MOST:
                self.seen.add(kind)
                return self._pass(compute, inputs)
            self.captured[kind] = self._capture(compute, inputs, ended)
        graph, own, own_ended, loss, _ = self.captured[kind]
        for name, x in inputs.items():
            own[name].copy_(x)
        if ended is not None:
            own_ended.copy_(ended)
        graph.replay()
        return loss.clone()

    def launch(self, compute: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> torch.Tensor:
        """`run` of rows that are not packed: what it captures, and the copies beside that, launched one by one."""
        self._attach()
        with told(self.model, None):
            return self._pass(compute, {name: x.clone() for name, x in inputs.items()}).clone()

    def _pass(self, compute, inputs: Inputs) -> torch.Tensor:
        loss = compute(inputs)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        found = [(own, g) for own, g in zip(self.gradients, gradients, strict=True) if g is not None]
        torch._foreach_add_(*map(list, zip(*found, strict=True)))
        return loss.detach()

    def _capture(self, compute, inputs: Inputs, ended: torch.Tensor | None):
        """(the graph, its inputs, its cu_seqlens, its loss, its host memory); capturing runs nothing.

        Where memory runs out, the capture is ended in order before that is raised: the next pass finds all as it was.
        """
        own, graph = {name: x.clone() for name, x in inputs.items()}, torch.cuda.CUDAGraph()
        torch._C._cuda_clearCublasWorkspaces()  # the capturing stream takes its own, 64 MiB of 32 a thread on sm_90
        packed = None if ended is None else Packed(ended.clone(), inputs["position_ids"].shape[1])
        keepers = {layer.shared.keeper for layer in fused_among(self.layers)}
        torch.cuda.synchronize()
        for keeper in keepers:
            keeper.settled()
        failed = None
        with told(self.model, packed), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            try:
                loss = self._pass(compute, own)  # thread_local: other threads may pin memory
            except torch.cuda.OutOfMemoryError as error:
                failed = error.with_traceback(None)  # which holds on to the tensors
                for keeper in keepers:
                    keeper.join()
        torch._C._cuda_clearCublasWorkspaces()  # theirs stay in the pool, for the next capture
        if failed is not None:
            raise failed
        return graph, own, packed and packed.cu_seqlens, loss, [keeper.settled() for keeper in keepers]

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


@contextmanager
def told(model: nn.Module, packed: Packed | None) -> Iterator[None]:
    """The fused layers of `model` read no masks, and take its rows for `packed`."""
    every = [layer.shared.sequences for layer in fused_layers(model)]
    for sequences in every:
        sequences.unread, sequences.told = True, packed
    try:
        yield
    finally:
        for sequences in every:
            sequences.unread, sequences.told = False, None


def filled(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """cu_seqlens with empty sequences after the last, so that there are FEWEST_SEQUENCES times a power of two."""
    room = FEWEST_SEQUENCES
    while room < len(cu_seqlens) - 1:
        room *= 2
    return torch.cat([cu_seqlens, cu_seqlens[-1:].expand(room + 1 - len(cu_seqlens))])
