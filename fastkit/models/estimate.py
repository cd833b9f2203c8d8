"""The GPU memory of a training step of a patched model, before it runs: what a plan costs, part by part.

M tokens go through at a time (batch x length); s bytes a number of the compute dtype. Per layer, with K hidden, Q query
and N key columns, I intermediate ones, R heads: the plan's table in `plans.py` says what is kept. Beside that, each
half's backward holds for a while:

    MLP         gate, up and their gradient in one buffer, then the larger of
                W_d and da                                          2 M I + K I + M I
                W_gu and n or dn                                    2 M I + 2 I K + M K
    attention   the gradients of q, k and v, and the larger of
                do, and a sum for dq in fp32                        M (Q + 2 N) + M Q + 2 M Q
                with torch's, also its own gradients, and those of
                k and v for each head of q, where they are grouped  M (Q + 2 N) + 2 M Q
                W_qkv and n or dn                                   M (Q + 2 N) + (Q + 2 N) K + M K

and dy; where gate and up, or q, k and v, are computed again, these, and W_gu and W_qkv from then on. When the attention
half's turn comes, what the MLP kept is gone; where a plan offloads, the next MLP's is on its way back instead. The
MLP's forward holds less, but where a plan offloads, what was kept is there on its way out, and transformers holds the
embeddings. In FP8 a number of W is one byte, dy is there in FP8 too, and so are the gradients of gate and up, over da,
with SwiGLU's result beside them for a while; when W_gu is written, gate and up are gone, and no weight is held. Torch's
backward of attention, cuDNN's say, is counted wherever `attend.in_place` does not say that it is ours, so for packed
rows in FP8, too.

Kept over a step, beside the layers: the embeddings' output is the first layer's x; the last norm's input and output,
the loss's dx. The peak is the largest of: the loss, with all layers' tensors kept; each layer's forward and backward,
with those of the layers below it; and the optimizer's step, where all gradients are there twice, once as the one tensor
that it takes (`train/flat.py`). A layer's adapters are there a second time, rounded to the 16 bits that products take,
from its forward to the end of its backward, and then its gradients are.

An estimate is of torch's allocations, cuBLAS's workspaces included: one for the thread that goes forward and one for
autograd's. What the allocator reserves beyond (a few percent), and CUDA's own context
(some 0.5 GiB, outside of what torch counts), come on top.
"""

import re
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fastkit.errors import FastkitError
from fastkit.kernels import gated_product
from fastkit.kernels.linear_cross_entropy import PART_BYTES, PART_ROWS
from fastkit.models import attend
from fastkit.models.bnb import bnb
from fastkit.models.plans import Plan
from fastkit.models.shapes import head_dim

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "workspace", "loss")
BLOCK = 512  # bytes: torch's allocator rounds up to it
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "paged_adamw": 0.0, "paged_adamw8bit": 0.0}  # a parameter
SMALLEST_8BIT = 4096  # parameters: bitsandbytes keeps the state of smaller tensors in fp32


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, in numbers; bytes a number of the compute dtype and of the residual stream.

    in_place    whether attention's backward is ours, which writes the gradients of q, k and v where they belong
    gated       whether gate and up, where they are not kept, are not written in the forward
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int
    heads: int
    vocabulary: int
    qk_norms: bool
    itemsize: int
    fp8: bool = False
    in_place: bool = True
    gated: bool = False

    @property
    def factor(self) -> int:
        """Bytes a number of what is multiplied."""
        return 1 if self.fp8 else self.itemsize

    @classmethod
    def of(cls, config, dtype: torch.dtype, compute: str = "auto") -> "Shape":
        """Of a transformers config."""
        heads, D = config.num_attention_heads, head_dim(config)
        return cls(
            config.num_hidden_layers, config.hidden_size, heads * D, config.num_key_value_heads * D,
            config.intermediate_size, heads, config.vocab_size, config.model_type == "qwen3", dtype.itemsize,
            compute == "fp8",
        )  # fmt: skip

    @classmethod
    def on_its_device(cls, model: nn.Module, dtype: torch.dtype, compute: str, length: int) -> "Shape":
        """Of a model that is to be trained where it is, on sequences of `length` tokens."""
        device = next(iter(model.parameters())).device
        in_place = attend.in_place(device, dtype, head_dim(model.config), length, compute == "fp8")
        gated = gated_product.on_its_card(device) and dtype.itemsize == 2 and compute != "fp8"
        return replace(cls.of(model.config, dtype, compute), in_place=in_place, gated=gated)

    def kept(self, M: int, plan: Plan) -> tuple[int, int]:
        """(bytes that a layer keeps under `plan` and may offload, bytes that stay on the device in any case)."""
        numbers = self.hidden
        if plan.qkv:
            numbers += self.queries + 2 * self.keys
        if plan.attention:
            numbers += self.queries
        lse = 4 * M * self.heads if plan.attention else 0
        return M * numbers * self.itemsize + self.of_mlp(M, plan), lse + 8 * M  # and rstd of both norms, in fp32

    def in_flight(self, M: int, plan: Plan, before: Plan | None) -> tuple[int, int]:
        """Bytes of what is offloaded that are on the device in a layer's backward: its MLP's, and its attention's.

        That is what the half kept, and what the half before it did, which is on its way; before: the plan of the layer
        below. At the loss as much is there as in the backward of the last MLP.
        """
        own, below = self.kept(M, plan)[0] if plan.offload else 0, self.leaving(M, before)
        if not plan.attention:  # one half keeps for both
            return own + below, own + below
        return own, own - self.leaving(M, plan) + below

    def leaving(self, M: int, plan: Plan | None) -> int:
        """Bytes that a layer's last half offloads, of the halves that keep any; 0 where there is no layer."""
        if plan is None or not plan.offload:
            return 0
        return self.of_mlp(M, plan) if plan.attention else self.kept(M, plan)[0]

    def transient(self, M: int, plan: Plan) -> int:
        """The most bytes that a layer's backward holds beside what was kept."""
        return max(self._transients(M, plan))

    def _transients(self, M: int, plan: Plan) -> tuple[int, int]:
        """That of the MLP's backward, and of the attention's."""
        K, Q, N, s = self.hidden, self.queries, self.keys, self.itemsize
        m = -(-M // plan.chunks)
        mlp = self._mlp(m, plan.gate_up, plan.holds)
        if plan.chunks > 1:  # the parts of dx, and in the end the whole beside them
            mlp = max(mlp + (M - m) * K * s, 2 * M * K * s)
        qkv, o = M * (Q + 2 * N) * s, M * Q * s
        product, W_qkv = M * K * s, (Q + 2 * N) * K * self.factor
        held = W_qkv if plan.holds and plan.attention and not plan.qkv and not self.fp8 else 0
        again = (0 if plan.qkv else qkv) + (0 if plan.attention else o)
        attention = qkv + max(again + o + self.attending(M) + held, product + W_qkv)
        attention += M * (Q + N) * s if self.qk_norms else 0
        if not plan.attention:  # what was attended again waits for the MLP's backward
            mlp += qkv + o + M * K * s
        if not plan.offload:  # what the MLP kept is gone by then
            attention -= self.of_mlp(M, plan)
        dy = M * K * s
        return mlp + dy, attention + dy

    def backward(self, M: int, plan: Plan, before: Plan | None) -> tuple[int, int]:
        """(in_flight, bytes beside what was kept) of the half that needs most."""
        return max(zip(self.in_flight(M, plan, before), self._transients(M, plan), strict=True), key=sum)

    def attending(self, M: int) -> int:
        """Bytes of what attention's backward has for itself: a sum for dq in fp32; torch's has dq, dk and dv, too, and
        with grouped heads dk and dv of each query's head, as cuDNN's (cudnn-frontend: dK_fullhead) and Flash have."""
        total = 4 * M * self.queries
        if not self.in_place:
            total += M * (self.queries + 2 * self.keys) * self.itemsize
            total += 2 * M * self.queries * self.itemsize if self.keys < self.queries else 0
        return total

    def of_mlp(self, M: int, plan: Plan) -> int:
        """Bytes of that of `kept` which the MLP keeps and may offload."""
        numbers = (self.hidden if plan.attention else 0) + (2 * self.intermediate if plan.gate_up else 0)
        return M * numbers * self.itemsize

    def forward(self, M: int, plan: Plan, before: Plan | None) -> tuple[int, int]:
        """(bytes of what is offloaded that are on the device in the forward of a layer's MLP, the most bytes beside
        these and what the layer holds).

        What the MLP before kept is on its way out, and what the attention kept is yet to go.
        """
        K, I, s = self.hidden, self.intermediate, self.itemsize
        m = -(-M // plan.chunks)
        unwritten = self.gated and not plan.gate_up  # a comes in place of gate and up
        hidden = m * I * s * (1 if unwritten else 2)
        leaving, of_mlp = self.leaving(M, before), self.of_mlp(M, plan)
        own = self.kept(M, plan)[0] - of_mlp
        gate_up = (m * K + 2 * I * K) * self.factor + hidden
        down = (hidden if plan.gate_up else 0) + (m * I + K * I) * self.factor + m * K * s
        most = max(gate_up, down, 0 if unwritten else hidden + m * I * self.factor)
        most += M * K * s * (2 if plan.chunks > 1 else 1)  # x2, and the parts of y
        return (leaving + own, most) if plan.offload else (leaving, most - of_mlp)

    def _mlp(self, m: int, kept: bool, holds: bool) -> int:
        """The same of the MLP alone, for m tokens at a time, where gate and up are kept or not, W_gu held or not."""
        K, I, s = self.hidden, self.intermediate, self.itemsize
        gate_up, da, n = 2 * m * I * s, m * I * s, m * K * s
        if not self.fp8:
            W_gu = 2 * I * K * s
            most = gate_up + max(K * I * s + da + (W_gu if holds and not kept else 0), W_gu + n)
        else:  # in the last, gate and up are gone
            most = max(gate_up + da + max(K * I + m * K, da, n), da + 2 * I * K + n)
        return most - (gate_up if kept else 0)


@dataclass
class Estimate:
    """Bytes of a training step, by part, and its peak: their sum.

    parts       of PARTS, in bytes
    host        bytes of pinned host memory that offloading takes
    """

    parts: dict[str, int]
    host: int
    tokens: int
    plans: list[Plan] = field(repr=False)

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def as_dict(self) -> dict:
        """For metrics.json, in GiB."""
        parts = {name: round(size / 2**30, 6) for name, size in self.parts.items()}
        return parts | {
            "peak": round(self.peak / 2**30, 6),
            "host": round(self.host / 2**30, 6),
            "plans": describe(self.plans),
        }

    def __str__(self) -> str:
        lines = [f"memory of a step of {self.tokens:,} tokens, estimated ({describe(self.plans)}):"]
        lines += [f"  {name:<12}{size / 2**30:7.2f} GiB" for name, size in self.parts.items()]
        lines.append(f"  {'peak':<12}{self.peak / 2**30:7.2f} GiB")
        if self.host:
            lines.append(f"  {'on the host':<12}{self.host / 2**30:7.2f} GiB")
        return "\n".join(lines)


def describe(plans: list[Plan]) -> str:
    """ "16 layers recompute-all+offload, 16 layers keep": runs of layers with one plan, first to last."""
    runs: list[list] = []
    for plan in plans:
        if runs and runs[-1][1] == plan.name:
            runs[-1][0] += 1
        else:
            runs.append([1, plan.name])
    return ", ".join(f"{count} layer{'s' * (count != 1)} {name}" for count, name in runs)


def estimate(
    model: nn.Module, plans: list[Plan], batch: int, length: int, optimizer: str, dtype: torch.dtype,
    compute: str = "auto", captured: bool = False, buffered: bool = False, accumulated: bool = False,
) -> Estimate:  # fmt: skip
    """The Estimate of a step of `batch` x `length` tokens of `model`, with one plan a layer.

    optimizer    a name of FinetuneConfig.optimizer; dtype: what is computed in; compute: of `patch`
    captured     whether as a CUDA graph
    buffered     whether gradients are added to a buffer that is always there, as in a graph and under DDP
    accumulated  whether a step has several passes, which find the gradients of those before
    """
    shape, M = Shape.on_its_device(model, dtype, compute, length), batch * length
    frozen, trained = model_bytes(model)
    learning = [p for p in model.parameters() if p.requires_grad]
    rounded = sum(2 * p.numel() for p in learning if dtype.itemsize == 2 != p.itemsize)
    angles = 2 * length * shape.queries // shape.heads * shape.itemsize  # their cosines and sines, for RoPE
    count, buffer = len(plans), trained if captured or buffered else 0

    def moment(activations: int, work: int, forwards: int, backwards: int) -> dict[str, int]:
        """Parts, once so many layers have gone forward, and of these so many backward."""
        gradients = trained if accumulated and not buffer else buffer + trained * backwards // count
        copies = rounded * (forwards - backwards) // count
        kept = activations + angles
        return {"adapters": trained + copies, "gradients": gradients, "activations": kept, "work": work}

    layers = [shape.kept(M, plan) for plan in plans]
    held = [stays + (0 if plan.offload else may) for (may, stays), plan in zip(layers, plans, strict=True)]
    before = [None, *plans[:-1]]  # the plan of the layer below
    stream, (at_loss, _) = M * shape.hidden * shape.itemsize, shape.in_flight(M, plans[-1], before[-1])
    loss = 3 * stream + part_bytes(shape, M)  # the last norm's input and output, dx; one part's logits
    gathered = 0 if captured else trained  # after a graph a pass's own gradients are gone
    moments = [("loss", moment(sum(held) + at_loss, loss, count, 0)), ("step", moment(0, gathered, count, count))]
    embeddings = stream if plans[0].offload else 0  # which transformers holds while it goes forward
    mask = batch * length**2 if captured else 0  # which transformers makes then, though nobody reads it
    below = 0
    for i, (plan, own) in enumerate(zip(plans, held, strict=True)):
        below += own
        flight, most = shape.forward(M, plan, before[i])
        moments.append(("forward", moment(below + flight, most + embeddings + mask, i + 1, 0)))
        flight, most = shape.backward(M, plan, before[i])
        moments.append(("backward", moment(below + flight, most, count, count - i - 1)))
    where, parts = max(moments, key=lambda found: sum(found[1].values()))
    part, work = {"loss": "loss", "step": "gradients"}.get(where, "workspace"), parts.pop("work")
    parts = {name: parts.get(name, 0) + (work if name == part else 0) for name in PARTS}
    parts["weights"] = frozen
    parts["workspace"] += workspaces(learning[0].device)
    parts["optimizer"] = sum(_state_bytes(p.numel(), optimizer) for p in learning)
    host = sum(may for (may, _), plan in zip(layers, plans, strict=True) if plan.offload)
    return Estimate(parts, host, M, plans)


def workspaces(device: torch.device) -> int:
    """Bytes of cuBLAS's workspaces, of the sizes that torch gives them."""
    if device.type != "cuda":
        return 0
    return 2 * (32 * 2**20 if torch.cuda.get_device_capability(device)[0] in (9, 10) else 8320 * 2**10)


def part_bytes(shape: Shape, M: int) -> int:
    """Bytes of the logits of the rows, of M, that the loss takes at a time."""
    row = shape.vocabulary * shape.itemsize
    return min(M, max(PART_ROWS, PART_BYTES // row)) * row


def model_bytes(model: nn.Module) -> tuple[int, int]:
    """(bytes of what is frozen, with the 4-bit weights' scales; bytes of what is trained)."""
    frozen = trained = 0
    seen: set[int] = set()

    def once(tensor: torch.Tensor | None) -> int:
        if tensor is None or tensor.data_ptr() in seen or not tensor.numel():
            return 0
        seen.add(tensor.data_ptr())
        return -(-tensor.nbytes // BLOCK) * BLOCK

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                trained += once(parameter)
            else:
                frozen += once(parameter)
        for buffer in module.buffers(recurse=False):
            frozen += once(buffer)
        if isinstance(module, bnb.nn.Linear4bit) and (state := getattr(module.weight, "quant_state", None)):
            for level in filter(None, (state, state.state2)):
                frozen += once(level.absmax) + once(level.code)
            frozen += once(state.offset)
    return frozen, trained


def _state_bytes(numel: int, optimizer: str) -> int:
    if optimizer == "adamw8bit" and numel < SMALLEST_8BIT:
        return 8 * numel
    return round(OPTIMIZER_BYTES[optimizer] * numel)


def parse_bytes(text: str | float) -> int:
    """Bytes of "8GiB", "7.5 GB", "900MiB" or a number of GiB; raises FastkitError for anything else."""
    units = {"": 2**30, "b": 1, "mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    if not found or found[2].lower() not in units or not float(found[1]):
        raise FastkitError(f"{text!r} is no amount of memory: give GiB, such as 8, or 8GiB, 7.5GB, 900MiB")
    return int(float(found[1]) * units[found[2].lower()])
