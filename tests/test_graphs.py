"""Steps of small batches captured as CUDA graphs: the losses and gradients of steps that are launched one by one."""

import copy

import pytest
import torch
from fused_case import model_of
from on_meta import on_meta

from fastkit.lab.accounts import account_of
from fastkit.models.graphs import MOST, Graphs, filled, lacking, told
from fastkit.models.patch import patch
from fastkit.models.sequences import Packed, Sequences, begin, ends


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
@pytest.mark.parametrize("plan", ["keep", "recompute-all", "keep+offload", "recompute-mlp+offload"])
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


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["keep", "recompute-mlp+offload"])
def test_memory_that_runs_out_in_a_capture(folder, fresh_seed, plan):
    model = model_of(folder, device="cuda", dtype="bf16")
    patch(model, plan)
    graphs, (inputs,) = Graphs(model), batches_of([512])

    def compute(inputs):
        return model(**inputs, use_cache=False).loss

    expected = graphs.run(compute, inputs).item()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            graphs.run(compute, inputs)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not graphs.captured
    again = [graphs.run(compute, inputs).item() for _ in range(3)]
    assert len(graphs.captured) == 1 and again == pytest.approx([expected] * 3, rel=1e-3)


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
    dropping = model_of(folder, device="cuda", dtype="bf16", dropout=0.1)
    patch(dropping, "keep")
    assert "dropout" in lacking(dropping)


# --- packed rows


def test_sequences_end_where_positions_do_not_go_on(fresh_seed):
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, -2, -1], [0, 1, 2, 3, 4, 5, 6, 7], [5, 6, 0, 0, 1, 2, 3, 4]])
    cu_seqlens = ends(begin(positions))
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 5, 6, 8, 16, 18, 19, 24]
    row = positions[:1]
    read = Sequences().read(row, row, 1, 8, None, "flash_attention_2")
    assert read.cu_seqlens.tolist() == [0, 3, 5, 6, 8] and read.longest == 3


@pytest.mark.parametrize(("count", "room"), [(1, 16), (16, 16), (17, 32), (100, 128)])
def test_the_sequences_of_a_graph_are_filled_up(count, room):
    cu_seqlens = torch.arange(count + 1, dtype=torch.int32) * 3
    full = filled(cu_seqlens)
    assert len(full) == room + 1 and full.dtype == torch.int32
    assert torch.equal(full[: count + 1], cu_seqlens) and (full[count + 1 :] == 3 * count).all()


@pytest.mark.parametrize(
    ("arch", "packed", "compute"),
    [("llama", False, "auto"), ("qwen2", True, "auto"), ("llama", False, "fp8"), ("qwen3", True, "fp8")],
)
def test_nothing_of_a_captured_pass_waits_for_the_gpu(folder, arch, packed, compute):
    """On meta tensors, with the launches that a GPU would see. Launch by launch, a pass does wait."""
    model, ids = model_of(folder, arch), torch.zeros(2, 64, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids} | ({"position_ids": ids} if packed else {})
    sequences = Packed(torch.zeros(17, dtype=torch.int32, device="meta"), 64) if packed else None
    accounts = []
    for capturing in (True, False):
        with on_meta(model, capturing):
            patch(model, "keep", compute=compute)
            with told(model, sequences):
                accounts.append(account_of(lambda: model(**inputs, use_cache=False).loss.backward()))
    captured, launched = accounts
    assert not captured.waits and launched.waits
    names = [launch.name for launch in captured.launches]
    assert names.count("_merge_kernel") == 4 * 7 - 3  # nothing asks for the first layer's input's gradient
    assert ("_quantize_kernel" in names) == (compute == "fp8")
    attention = [launch for launch in captured.launches if launch.name == "_backward_dq_kernel"]
    assert len(attention) == 2


def packed_batches(count, width=96):
    """Rows of sequences of random lengths, the last one's end padded."""
    for _ in range(count):
        lengths = [sorted(torch.randint(1, width, (3,)).tolist()) for _ in range(2)]
        rows = [torch.tensor([0, *row]).diff().tolist() for row in lengths]
        ids = torch.randint(3, 250, (2, width))
        labels, positions = torch.full_like(ids, -100), torch.empty_like(ids)
        for row, parts in enumerate(rows):
            positions[row] = torch.cat([*map(torch.arange, parts), torch.arange(sum(parts) - width, 0)])
            labels[row] = torch.where(positions[row] > 0, ids[row], -100)
        yield {name: x.cuda() for name, x in (("input_ids", ids), ("labels", labels), ("position_ids", positions))}


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("compute", ["auto", "fp8"])
def test_packed_rows_in_a_graph(folder, fresh_seed, arch, compute):
    model = model_of(folder, arch, device="cuda", dtype="bf16")
    other = copy.deepcopy(model)
    for each in (model, other):
        patch(each, "keep", compute=compute)
    batches = list(packed_batches(8))
    captured, after, graphs = losses(model, batches, graphs=True)
    launched, expected, _ = losses(other, batches, graphs=False)
    assert len(graphs.captured) == 1
    assert captured == pytest.approx(launched, rel=2e-3)
    for ours, theirs in zip(after, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-3)
