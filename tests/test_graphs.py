"""Steps of small batches captured as CUDA graphs: the losses and gradients of steps that are launched one by one."""

import copy

import pytest
import torch
from fused_case import model_of

from fastkit.models.graphs import MOST, Graphs, lacking
from fastkit.models.patch import patch


def losses(model, batches, graphs: bool, accumulation=2):
    """Of each pass while AdamW moves the adapters at a falling rate; and the adapters after it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    captured, found = Graphs(model) if graphs else None, []

    def compute(inputs):
        with torch.autocast("cuda", torch.bfloat16):
            return model(**inputs, use_cache=False).loss / accumulation

    for number, inputs in enumerate(batches):
        if graphs:
            loss = captured.run(compute, inputs)
        else:
            loss = compute(inputs)
            loss.backward()
        found.append(loss.item())
        if number % accumulation == accumulation - 1:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return found, [p.detach().clone() for p in trained], captured


def batches_of(lengths):
    for length in lengths:
        ids = torch.randint(3, 250, (2, length), device="cuda")
        labels = ids.clone()
        labels[:, : length // 3] = -100
        yield {"input_ids": ids, "labels": labels}


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("plan", ["keep", "recompute-all"])
def test_losses_are_those_of_single_launches(folder, fresh_seed, arch, plan):
    model = model_of(folder, arch, device="cuda", dtype="bf16")
    other = copy.deepcopy(model)
    assert patch(model, plan).layers == patch(other, plan).layers > 0
    batches = list(batches_of([64, 64, 64, 48, 48, 64, 48, 48, 64, 64]))
    captured, after, graphs = losses(model, batches, graphs=True)
    launched, expected, _ = losses(other, batches, graphs=False)
    assert len(graphs.captured) == 2
    assert captured == pytest.approx(launched, rel=2e-3)
    for ours, theirs in zip(after, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-3)


@pytest.mark.gpu
def test_more_shapes_than_are_captured(folder, fresh_seed):
    model = model_of(folder, device="cuda", dtype="bf16")
    patch(model, "keep")
    lengths = [16 + 8 * n for n in range(MOST + 2)]
    found, _, graphs = losses(model, list(batches_of(lengths + lengths)), graphs=True)
    assert len(graphs.captured) == MOST and all(map(torch.isfinite, torch.tensor(found)))


@pytest.mark.gpu
def test_adapters_that_were_moved_are_captured_anew(folder, fresh_seed):
    model = model_of(folder, device="cuda", dtype="bf16")
    patch(model, "keep")
    graphs, (inputs,) = Graphs(model), batches_of([32])

    def compute(inputs):
        return model(**inputs, use_cache=False).loss

    before = [graphs.run(compute, inputs).item() for _ in range(3)]
    assert before[2] == pytest.approx(before[0], rel=1e-3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.zeros_like(parameter)
    after = graphs.run(compute, inputs).item()
    assert after == pytest.approx(compute(inputs).item(), rel=1e-3) and after != before[2]


def test_what_cannot_be_captured_says_why(folder):
    model = model_of(folder)
    assert lacking(model) == "it is not on a GPU"
    with pytest.raises(ValueError, match="cannot be captured: it is not on a GPU"):
        Graphs(model)


def test_a_step_of_several_processes_is_not_captured(folder, monkeypatch):
    """autograd.grad does not run the hooks by which DDP adds gradients up."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert "several processes" in lacking(model_of(folder))


@pytest.mark.gpu
def test_what_cannot_be_captured_on_a_gpu(folder):
    model = model_of(folder, device="cuda", dtype="bf16")
    assert lacking(model) == "its layers are not fused"
    patch(model, "keep+offload")
    assert lacking(model) == "its plan offloads"
    dropping = model_of(folder, device="cuda", dtype="bf16", dropout=0.1)
    patch(dropping, "keep")
    assert "dropout" in lacking(dropping)
