"""Compile and tune all kernels of a model's training step ahead of time, so that no step has to wait for it.

    report = warm_up("mistral-7b", batch=4, seq=2048)

What runs is the step itself, on a model of the same config with as few layers as show everything (two: the first of a
model needs no gradient of its input), random weights and adapters. Binaries stay in Triton's cache on disk, which knows
card and versions; attention backends are timed, and the fastest stays in fastkit's (see `choices.py`).

Which shapes. Triton compiles anew for each integer argument that is 1, or divisible by 16, or neither, and for each
constant. Constants of the launches hang on the model, the rank and the dtype alone; only whether attention has a window
hangs on the length of a row. Integers hang on

* the records of a batch: `batch`, and what is left at the end of an epoch, 1 to batch - 1;
* their length, for a batch is as wide as its longest record: every length up to SHORT, where sums are split into 1, 16
  or another number of parts, and a dense sample of those above, with every remainder by 16;
* the columns with labels: all. With fewer, the rows of the loss are as many as those of a shorter batch;
* where sequences begin within rows, packed or padded on the left, which is another kernel for attention: few rows show
  all that it can become, see `warmup_rows.py`.

Data pointers are aligned to 16 bytes in all of them: allocations are, by 512, and rows and parts begin at multiples of
16 numbers. Every length and all packed rows are run under one plan, and every plan at three lengths: plans launch the
same kernels, some on parts of the rows, though attention on whole batches alone. torch's and bitsandbytes' kernels, the
optimizers' among them, come compiled.
"""

import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastkit.errors import FastkitError
from fastkit.kernels import choices
from fastkit.kernels.attention_choice import deciding
from fastkit.lab.compilations import Compilation, compilations
from fastkit.models import random_weights
from fastkit.models.fused_layer import window_of
from fastkit.models.graphs import told
from fastkit.models.load import config_for, resolve_device, resolve_dtype
from fastkit.models.lora import add_lora
from fastkit.models.patch import fused_layers, patch, patched, set_plan, unpatch
from fastkit.models.plans import PLANS, plan_of
from fastkit.models.warmup_rows import Heads, Rows, packed_rows

SHORT = 128  # tokens
ALL = (*PLANS, "off")


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up did.

    compiled    each kernel, once for each time that it was compiled
    cached      how many were in Triton's cache already
    steps       forward and backward passes that ran
    seconds     of all of it
    binaries    Triton's cache; None where nothing is compiled
    choices     the folder of the timed choices
    """

    compiled: tuple[Compilation, ...]
    cached: int
    steps: int
    seconds: float
    binaries: Path | None
    choices: Path

    def __str__(self) -> str:
        by_kernel: dict[str, list[float]] = {}
        for one in self.compiled:
            by_kernel.setdefault(one.kernel, []).append(one.seconds)
        lines = [f"  {kernel:<32} {len(times):>3} x {sum(times):7.2f} s" for kernel, times in sorted(by_kernel.items())]
        total = sum(one.seconds for one in self.compiled)
        return "\n".join([
            *lines,
            f"{len(self.compiled)} kernels compiled in {total:.1f} s, {self.cached} were there already; "
            f"{self.steps} steps, {self.seconds:.1f} s in all",
            f"binaries: {self.binaries or 'none, nothing compiles on this device'}",
            f"timed choices: {self.choices}",
        ])  # fmt: skip


def warm_up(
    model: str,
    *,
    batch: int = 4,
    seq: int = 2048,
    rank: int = 16,
    dropout: float = 0.0,
    plans: Sequence[str] = ALL,
    compute: str = "auto",
    every_length: bool = True,
    device: str = "auto",
    dtype: str = "auto",
) -> WarmUp:
    """Run the training step of `model` at the shapes that a fine-tune meets, so that its kernels are compiled.

    Args:
        model: as `load` takes it, or a named shape; only its config is read.
        batch, seq: records of a forward pass, and tokens of the longest.
        rank, dropout: of the adapters.
        plans: names of `plans.PLANS`, and "off" for layers that are not fused.
        compute: of fused layers, as in `patch`.
        every_length: False for batches of that one shape alone, packed ones among them.
        device, dtype: as in `load`; without a GPU the steps run, and compile nothing.

    Raises FastkitError for what `load` refuses, a bad value, an unknown plan, more tokens than the model's context.
    """
    config = config_for(model)
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    _check(config, batch, seq, plans)
    begun, fused = time.perf_counter(), [plan for plan in plans if plan != "off"]
    net = _small(config, dtype, device, rank, dropout)
    every = shapes(batch, seq) if every_length else [(batch, seq)]
    few = [(batch, seq - less) for less in ((0, 1, 4) if every_length else (0,)) if seq > less]
    steps = 0
    with compilations() as found:
        if fused:
            with patched(net, fused[0], compute):
                with deciding("timed"):
                    steps += _steps(net, dtype, [(batch, seq)])
                with deciding("ours"):  # cuDNN would make a plan of its own for each length
                    steps += _steps(net, dtype, every)
                    steps += _packed_steps(net, dtype, packings(net, dtype, batch, seq, every_length))
                    for plan in fused:
                        set_plan(net, plan)
                        steps += _steps(net, dtype, few)
        if "off" in plans:
            patch(net, layers=False)
            steps += _steps(net, dtype, every)
            unpatch(net)
    return WarmUp(
        tuple(found.compiled),
        len(found.cached),
        steps,
        time.perf_counter() - begun,
        _binaries(device),
        choices.folder(),
    )


def shapes(batch: int, seq: int) -> list[tuple[int, int]]:
    """(records, tokens) of the batches that stand for all of up to `batch` records and `seq` tokens."""
    lengths = {*range(1, min(SHORT, seq) + 1), *range(SHORT, seq, 11), *range(16, seq, 16), seq}
    found = [(records, tokens) for records in {1, batch} for tokens in lengths]
    found += [(records, seq - less) for records in range(2, batch) for less in range(0, 16, 3) if seq > less]
    return sorted(found, reverse=True)  # what does not fit in memory fails first


def packings(net: nn.Module, dtype: torch.dtype, batch: int, seq: int, every_length: bool = True) -> list[Rows]:
    """The packed batches that stand for all of up to `batch` rows of `seq` tokens, or for all of just so many; none for
    a model without fused layers, whose attention is not ours."""
    attentions = [layer.layer.self_attn for layer in fused_layers(net)]
    if not attentions:
        return []
    config, windows = net.config, {window_of(attention) for attention in attentions} - {None}
    heads = Heads(
        config.num_attention_heads, config.num_key_value_heads, attentions[0].head_dim, dtype, tuple(sorted(windows))
    )
    least = (1, 1) if every_length else (batch, seq)
    return packed_rows(range(least[0], batch + 1), range(least[1], seq + 1), heads)


def _check(config, batch: int, seq: int, plans: Sequence[str]) -> None:
    for name, value in (("batch", batch), ("seq", seq)):
        if value < 1:
            raise FastkitError(f"{name} {value} must be 1 or more")
    if seq > (context := getattr(config, "max_position_embeddings", None) or seq):
        raise FastkitError(f"seq {seq} is more than the model's context of {context} tokens; give {context} or less")
    if not plans:
        raise FastkitError(f"no plan is named: use some of {', '.join(ALL)}")
    for plan in plans:
        if plan != "off":
            plan_of(plan)


def _small(config, dtype: torch.dtype, device: torch.device, rank: int, dropout: float) -> nn.Module:
    """A model of `config` with adapters and random weights, of two layers, or one more than it has kinds of layers."""
    config = copy.deepcopy(config)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or [None]))
    config.num_hidden_layers = len(kinds) + 1
    if kinds != [None]:
        config.layer_types = [kinds[0], *kinds]
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return add_lora(random_weights.build(config, dtype, device), rank=rank, dropout=dropout).train()


def _steps(net: nn.Module, dtype: torch.dtype, sizes: list[tuple[int, int]]) -> int:
    """A step with a batch of each size; how many there were."""
    for records, tokens in sizes:
        _step(net, dtype, records, tokens)
    return len(sizes)


def _packed_steps(net: nn.Module, dtype: torch.dtype, batches: list[Rows]) -> int:
    """A step with each batch; how many there were."""
    for one in batches:
        packed = one.packed(net.device)
        with nullcontext() if packed is None else told(net, packed):
            _step(net, dtype, one.rows, one.tokens, position_ids=one.position_ids(net.device))
    return len(batches)


def _step(net: nn.Module, dtype: torch.dtype, records: int, tokens: int, **inputs: torch.Tensor) -> None:
    """Forward and backward, and a validation's forward."""
    device = net.device
    mixed = device.type == "cuda" and dtype != torch.float32
    ids = torch.randint(net.config.vocab_size, (records, tokens), device=device)
    inputs |= {"input_ids": ids, "labels": ids, "use_cache": False}
    with torch.autocast(device.type, dtype) if mixed else nullcontext():
        net(**inputs, num_items_in_batch=torch.tensor(ids.numel(), device=device)).loss.backward()
        with torch.no_grad():
            net(**inputs, num_items_in_batch=torch.ones((), device=device))
    net.zero_grad(set_to_none=True)


def _binaries(device: torch.device) -> Path | None:
    if device.type != "cuda":
        return None
    import triton

    return Path(triton.knobs.cache.dir)
