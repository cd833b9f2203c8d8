"""Decoder layers three ways for the tests of the fused ones: fused, as transformers runs them, and in float64."""

import copy

import torch
from tiny import SHAPE, tiny_model

from fastkit.kernels import nf4, rms_norm
from fastkit.models import add_lora, load
from fastkit.models.bnb import bnb
from fastkit.models.patch import patch

LAYERS = SHAPE["num_hidden_layers"]
IDS = torch.arange(3, 27).view(2, 12)
BATCH = {"input_ids": IDS, "labels": IDS}
WINDOWED = {
    "mistral": dict(sliding_window=5),
    "qwen2": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
}


def model_of(folder, arch="llama", quantize=True, lora=True, dropout=0.0, device="cpu", dtype="fp32", **changes):
    """A tiny model of `arch` with adapters of rank 4 that do something; `changes` are to its config."""
    folder = folder / "-".join([arch, *(f"{k}={v}" for k, v in changes.items())])
    if not folder.exists():
        tiny_model(folder, arch, **changes)
    model, _ = load(str(folder), device=device, dtype=dtype, quantize=quantize)
    model.requires_grad_(False)
    if lora:
        model = add_lora(model, rank=4, alpha=8, dropout=dropout)
        give_b(model)
    return model.train()


def give_b(model):
    """B starts at zero, which hides what is done with it."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.normal_(0, 0.1)


def layers_of(model):
    return next(m for name, m in model.named_modules() if name.rpartition(".")[2] == "layers")


def in_float64(model):
    """A copy of `model` whose every number and operation is float64, with 4-bit weights dequantized exactly."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                weight = nf4.NF4Weight.from_bitsandbytes(child.weight.data, child.weight.quant_state)
                dense = torch.nn.Linear(1, 1, bias=False)
                dense.weight = torch.nn.Parameter(nf4.reference(weight, torch.float64), requires_grad=False)
                dense.bias = child.bias
                setattr(module, name, dense)
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # transformers' computes in fp32
            module.forward = lambda x, m=module: rms_norm.reference(x, m.weight, m.variance_epsilon)
    return model


def table(model, T, dtype=torch.float32):
    """cos and sin for T tokens, the same numbers for every dtype."""
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    device = rotary.inv_freq.device
    return tuple(x.to(dtype) for x in rotary(torch.zeros(1, device=device), torch.arange(T, device=device)[None]))


def window_mask(arch, T, device):
    """What transformers gives the first layer of a WINDOWED `arch`; None where that layer has no window."""
    if arch != "mistral":
        return None
    behind = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
    return ((behind >= 0) & (behind < WINDOWED[arch]["sliding_window"]))[None, None]


def run_layer(model, x, dy, mask=None, x_grad=True):
    """The first layer's y and its gradients, by name: of x and of every parameter that requires one."""
    layer = layers_of(model)[0]
    x = x.detach().clone().requires_grad_(x_grad)
    layer.zero_grad()
    y = layer(x, attention_mask=mask, position_embeddings=table(model, x.shape[1], x.dtype))
    y.backward(dy)
    found = {"y": y.detach()} | ({"x": x.grad} if x_grad else {})
    return found | {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}


def model_in_16_bits(folder, device, dtype):
    """`model_of` in a 16-bit dtype; on a CPU not in 4 bits, whose products are in fp32 there."""
    if device == "cuda":
        return model_of(folder, device=device, dtype={torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype])
    return model_of(folder, quantize=False).to(dtype)


def assert_same_layer(found, expected, dtype):
    """Two results of `run_layer` differ by twice what rounding to a 16-bit dtype may change, at most."""
    for name, true in expected.items():
        error = (found[name].double() - true.double()).norm() / true.double().norm()
        assert error <= 2 * torch.finfo(dtype).eps, f"{name}: {error:.1e}"


def fused(model, plan=None, compute="auto"):
    """A copy of `model`, patched; every layer must have been taken."""
    model = copy.deepcopy(model)
    report = patch(model, plan, compute=compute)
    assert report.layers == len(layers_of(model)) and not report.left, str(report)
    return model


def step(model, **inputs):
    """The loss of a batch, and the gradient of every parameter that has one."""
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, theirs):
    """The two results of `step` differ by fp32's rounding alone."""
    assert abs(ours[0] - theirs[0]) <= 1e-5
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        error = (ours[1][name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
        assert error <= 2e-5, f"{name}: {error:.1e}"


def batch(lengths, left=False, width=None):
    """Rows of `lengths` tokens, padded on the right (or left), and labels that leave padding out."""
    T = width or max(lengths)
    ids, mask = torch.randint(3, 300, (len(lengths), T)), torch.zeros(len(lengths), T, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[T - length :] = 1 if left else row[T - length :]
        row[:length] = row[:length] if left else 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)  # else the first is what padding predicts
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
