"""The estimate of a step's memory, and the plans that a budget buys."""

import gc
import itertools
import types
from dataclasses import replace

import pytest
import torch
from cards import needs_fp8
from fused_case import BATCH, fused, layers_of, model_of
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes
from on_meta import on_meta

from fastkit.errors import FastkitError
from fastkit.kernels import gated_product
from fastkit.lab.results import recorded
from fastkit.models import attend, budget, estimate
from fastkit.models.budget import choose, device_bytes, leaner, worth_having
from fastkit.models.estimate import Shape, describe, model_bytes, parse_bytes
from fastkit.models.graphs import told
from fastkit.models.patch import patch, unpatch
from fastkit.models.plans import PLANS
from fastkit.models.shapes import SHAPES

CPU = torch.device("cpu")
MISTRAL = Shape(32, 4096, 4096, 1024, 14336, 32, 32000, False, 2)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_what_is_kept_is_what_the_estimate_says(folder, references, plan, arch):
    model = fused(model_of(folder, arch, num_hidden_layers=5), plan)
    shape, M = Shape.of(model.config, torch.float32), BATCH["input_ids"].numel()
    keeper = layers_of(model)[0].forward.shared.keeper
    made, keep = [], keeper.keep
    keeper.keep = lambda *args: made.append(keep(*args)) or made[-1]
    loss = model(**BATCH, use_cache=False).loss
    here = sum(x.nbytes for kept in made for x in (kept.here or {}).values())
    away = sum(buffer.data.nbytes for kept in made for buffer, _, _ in kept.away.values() if kept.here is None)
    expected = shape.kept(M, PLANS[plan])[0] * shape.layers
    assert here + away == expected
    if PLANS[plan].offload:
        assert here <= shape.in_flight(M, PLANS[plan], PLANS[plan])[0] and away > 0
    del loss


def test_model_bytes_are_those_of_every_tensor_once(folder):
    model = model_of(folder)
    frozen, trained = model_bytes(model)
    lora = [p for p in model.parameters() if p.requires_grad]
    assert trained == sum(-(-p.nbytes // 512) * 512 for p in lora)
    weights = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert weights < frozen < 1.5 * weights + 200 * 512
    model.get_base_model().lm_head.weight = model.get_base_model().model.embed_tokens.weight  # tied: counted once
    assert model_bytes(model)[0] < frozen


def test_the_plans_worth_having_run_from_fast_to_lean():
    for matrix_rate, link_rate in ((700e12, 50e9), (100e12, 20e9), (30e12, 6e9)):
        front = worth_having(MISTRAL, 8192, matrix_rate, link_rate)
        times = [budget.cost_seconds(MISTRAL, 8192, plan, matrix_rate, link_rate) for plan in front]
        sizes = [device_bytes(MISTRAL, 8192, plan) for plan in front]
        assert front[0].name == "keep" and front[-1].name == "leanest"
        assert times == sorted(times) and sizes == sorted(sizes, reverse=True)
    assert not any(plan.offload for plan in worth_having(MISTRAL, 8192, host=2**28))


def test_the_leanest_that_pays_in_fp8():
    """As measured on an H200, 8,192 tokens: what each adds to a step of 32 layers of 293 ms in all."""
    fp8 = replace(MISTRAL, fp8=True)
    for rate in (680e12, 710e12):  # measured: 689 to 701
        front = worth_having(fp8, 8192, rate, 55e9)
        assert next(plan.name for plan in front if plan.offload) == "recompute-mlp-qkv+offload"
        (cost,) = (
            budget.cost_seconds(fp8, 8192, plan, rate, 55e9) for plan in front if plan.name.endswith("qkv+offload")
        )
        assert 31 * cost == pytest.approx(0.068, rel=0.25)


@pytest.mark.parametrize(
    ("matrix_rate", "link_rate", "leaner"),  # an RTX 4090's, an H200's, and an H200 behind a slower link
    [(120e12, 25e9, "keep+offload"), (650e12, 56e9, "recompute-mlp+offload"), (650e12, 25e9, "recompute-all+offload")],
)
def test_as_much_is_offloaded_as_hides_behind_the_products(matrix_rate, link_rate, leaner):
    front = worth_having(MISTRAL, 8192, matrix_rate, link_rate)
    assert next(plan.name for plan in front if plan.offload) == leaner
    cost = budget.cost_seconds(MISTRAL, 8192, PLANS[leaner], matrix_rate, link_rate)
    on_device = PLANS[leaner.removesuffix("+offload")]
    hidden = budget.cost_seconds(MISTRAL, 8192, on_device, matrix_rate, link_rate)
    assert hidden < cost < 1.1 * hidden + 0.002


@pytest.fixture
def sized(monkeypatch):
    """A model of Mistral-7B's sizes without its numbers."""
    monkeypatch.setattr(estimate, "model_bytes", lambda model: (4 * 2**30, 160 * 2**20))
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=2**40))
    config = types.SimpleNamespace(**SHAPES["mistral-7b"])
    parameters = [types.SimpleNamespace(numel=lambda: 42_000_000, itemsize=4, requires_grad=True, device=CPU)]
    return types.SimpleNamespace(config=config, parameters=lambda: parameters)


def test_a_larger_budget_is_never_slower(sized):
    speeds = []
    for gib in (5.7, 6, 7, 8, 12, 16, 20, 24, 40):
        found = choose(sized, int(gib * 2**30), 4, 2048, "adamw8bit", torch.bfloat16)
        assert found.peak <= gib * 2**30 and len(found.plans) == 32
        speeds.append(sum(budget.cost_seconds(MISTRAL, 8192, plan) for plan in found.plans))
        assert sum(size for size in found.parts.values()) == found.peak
    assert speeds == sorted(speeds, reverse=True) and speeds[-1] == 0
    text = str(found)
    assert "8,192 tokens" in text and "32 layers keep" in text and "peak" in text


def test_a_captured_step_leaves_more_room(sized):
    leaner = 0
    for gib in (7, 8, 9, 12, 16, 24):
        plain, captured = (
            choose(sized, gib * 2**30, 4, 2048, "adamw8bit", torch.bfloat16, captured=each).peak
            for each in (False, True)
        )
        assert captured <= gib * 2**30 * (1 - budget.CAPTURED_MARGIN) < gib * 2**30 * (1 - budget.MARGIN)
        leaner += captured < plain
    assert leaner >= 3


def test_no_two_plans_are_faster_together(sized):
    """Of all pairs, whatever their shares of the layers, among those that fit."""
    for gib in (6.4, 8, 14):
        found = choose(sized, int(gib * 2**30), 4, 2048, "adamw8bit", torch.bfloat16, (650e12, 56e9))
        cost = {plan: budget.cost_seconds(MISTRAL, 8192, plan, 650e12, 56e9) for plan in PLANS.values()}
        for slower, faster in itertools.permutations(PLANS.values(), 2):
            for n in (31, 24, 16, 8):
                plans = [slower] * n + [faster] * (32 - n)
                if sum(map(cost.get, plans)) < sum(map(cost.get, found.plans)) - 1e-9:
                    needed = estimate.estimate(sized, plans, 4, 2048, "adamw8bit", torch.bfloat16).peak
                    assert needed > gib * 2**30 * (1 - budget.MARGIN)


def test_a_budget_too_small_says_the_least_that_fits(sized):
    with pytest.raises(FastkitError, match=r"do not fit into 4.0 GiB: the leanest plan needs (\d\.\d) GiB") as error:
        choose(sized, 4 * 2**30, 4, 2048, "adamw8bit", torch.bfloat16)
    with pytest.raises(FastkitError, match=r"do not fit into 0\.05 GiB"):
        choose(sized, 2**30 // 20, 4, 2048, "adamw8bit", torch.bfloat16)
    least = float(str(error.value).partition("needs ")[2].split()[0])
    found = choose(sized, int((least + 0.1) * 2**30), 4, 2048, "adamw8bit", torch.bfloat16)
    assert {plan.name for plan in found.plans} == {"leanest"}


def test_leaner_ends_and_never_needs_more():
    plans, seen = [PLANS["keep"]] * 16 + [PLANS["recompute-mlp"]] * 16, 0
    while (after := leaner(plans, MISTRAL, 8192)) is not None:
        for old, new in zip(plans, after, strict=True):
            assert device_bytes(MISTRAL, 8192, new) <= device_bytes(MISTRAL, 8192, old)
        plans, seen = after, seen + 1
    assert seen >= 5 and {plan.name for plan in plans} == {"leanest"}


def test_plans_are_described_in_runs():
    plans = [PLANS["leanest"]] * 3 + [PLANS["keep"]]
    assert describe(plans) == "3 layers leanest, 1 layer keep"


@given(st.floats(0.01, 1000), st.sampled_from(["", "GiB", " GiB", "gb", "MB", "mib"]))
def test_amounts_of_memory(amount, unit):
    factor = {"": 2**30, "gib": 2**30, "gb": 1e9, "mb": 1e6, "mib": 2**20}[unit.strip().lower()]
    assert abs(parse_bytes(f"{amount:f}{unit}") - float(f"{amount:f}") * factor) <= 1


@pytest.mark.parametrize("text", ["", "much", "8 XB", "-3", "0", "8GiB each"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(FastkitError, match="no amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize("compute", ["auto", "fp8"])
def test_the_peak_is_what_the_estimate_says(folder, compute, monkeypatch):
    """Counted on meta tensors, of a captured step in bf16 on Hopper whose attention's backward is ours."""
    monkeypatch.setattr(gated_product, "architecture", lambda device: "sm_90")
    sizes = dict(hidden_size=512, intermediate_size=1792, head_dim=128, num_key_value_heads=1, num_hidden_layers=3)
    model, ids = model_of(folder, "mistral", dtype="bf16", **sizes), torch.zeros(2, 512, dtype=torch.long)
    expected = {
        plan: estimate.estimate(model, [PLANS[plan]] * 3, *ids.shape, "adamw", torch.bfloat16, compute, captured=True)
        for plan in PLANS
    }
    frozen, trained = model_bytes(model)
    with on_meta(model, capturing=True):
        there = [*model.parameters(), *model.buffers()]
        for plan in PLANS:
            patch(model, plan, compute=compute)
            with told(model, None), LiveBytes(there) as live:
                model(input_ids=ids.to("meta"), labels=ids.to("meta"), use_cache=False).loss.backward()
            unpatch(model)
            model.zero_grad()
            found = live.peak + frozen + 2 * trained  # and the buffer of the gradients
            peak = expected[plan].peak - expected[plan].parts["optimizer"]
            assert abs(found - peak) <= 0.02 * found, plan


@pytest.mark.parametrize("name, tokens", [("budgets_h200", (4, 2048)), ("lean_h200", (1, 2048))])
def test_the_peaks_that_were_recorded_are_what_the_estimate_says(name, tokens, sized, monkeypatch):
    """Of an H200, whose attention is ours where there is no GPU, too."""
    monkeypatch.setattr(gated_product, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(estimate, "workspaces", lambda device: 2 * 32 * 2**20)
    rows = [row for row in recorded(name)["rows"] if row["what"] == "step"]
    assert rows
    for row in rows:
        found = [run.split(" ") for run in row["layers"].split(", ")]
        plans = [PLANS[name] for count, _, name in found for _ in range(int(count))]
        trained = 4 * row["trained"]
        there = row["loaded_gib"] * 2**30 - trained, trained
        monkeypatch.setattr(estimate, "model_bytes", lambda model, there=there: there)
        peak = estimate.estimate(sized, plans, *tokens, "adamw8bit", torch.bfloat16).peak
        assert peak == pytest.approx(row["peak_allocated_gib"] * 2**30, rel=0.01), row["who"]


def test_gradients_are_there_as_often_as_a_step_has_them(sized, monkeypatch):
    """At the peak: the last layer's forward, the first's backward, and the optimizer's step."""

    def gradients(plan, batch=4, length=2048, trained=160 * 2**20, **how):
        monkeypatch.setattr(estimate, "model_bytes", lambda model: (4 * 2**30, trained))
        step = estimate.estimate(sized, [PLANS[plan]] * 32, batch, length, "adamw8bit", torch.bfloat16, **how)
        return step.parts["gradients"] / trained

    last, first, step = ("keep",), ("recompute-mlp-qkv+offload",), ("recompute-mlp-qkv+offload", 1, 1, 2**34)
    assert [gradients(*peak) for peak in (last, first, step)] == [0, 31 / 32, 2]
    assert [gradients(*peak, captured=True) for peak in (last, first, step)] == [1, 63 / 32, 2]
    assert [gradients(*peak, buffered=True) for peak in (last, first, step)] == [1, 63 / 32, 3]
    assert [gradients(*peak, accumulated=True) for peak in (last, first)] == [1, 1]


@pytest.mark.parametrize("plan", PLANS)
def test_fp8_needs_less_memory_and_less_time(plan):
    plain, fp8 = MISTRAL, replace(MISTRAL, fp8=True)
    for M in (512, 8192):
        assert fp8.kept(M, PLANS[plan]) == plain.kept(M, PLANS[plan])
        fewer, as_many = fp8.transient(M, PLANS[plan]), plain.transient(M, PLANS[plan])
        attention_needs_most = PLANS[plan].chunks > 1
        if not (PLANS[plan].gate_up and M == 8192):  # there SwiGLU's gradients in FP8 stand beside da
            assert fewer < as_many or (attention_needs_most and fewer == as_many)
        if not PLANS[plan].offload:  # there is less to hide copies behind
            fast, slow = (budget.cost_seconds(shape, M, PLANS[plan]) for shape in (fp8, plain))
            assert slow / 2 < fast < slow or fast == slow == 0  # what is no product stays as it was


def test_what_attention_s_backward_has_for_itself(monkeypatch):
    """By cuDNN, on the sizes of Mistral-7B, 4 x 2048 tokens: dq, dk, dv, dq in fp32, and dk and dv of all heads."""
    theirs = replace(MISTRAL, in_place=False)
    assert [shape.attending(8192) / 2**20 for shape in (MISTRAL, theirs)] == [128, 128 + 96 + 128]
    assert replace(theirs, keys=4096).attending(8192) / 2**20 == 128 + 192
    monkeypatch.setattr(attend, "architecture", lambda device: arch)
    gpu = torch.device("cuda")
    arch = "sm_90"
    assert attend.in_place(gpu, torch.bfloat16, 128, 2048, in_fp8=False)
    assert not attend.in_place(gpu, torch.bfloat16, 128, 512, in_fp8=False)
    assert not attend.in_place(gpu, torch.bfloat16, 96, 2048, in_fp8=False)
    assert not attend.in_place(gpu, torch.float32, 128, 2048, in_fp8=False)
    assert not attend.in_place(gpu, torch.bfloat16, 128, 2048, in_fp8=True)
    assert attend.in_place(CPU, torch.bfloat16, 128, 512, in_fp8=True)
    arch = "sm_89"
    assert not attend.in_place(gpu, torch.bfloat16, 128, 2048, in_fp8=False)


@pytest.mark.gpu
@pytest.mark.parametrize("compute", ["auto", pytest.param("fp8", marks=needs_fp8)])
@pytest.mark.parametrize("plan", PLANS)
def test_the_peak_on_a_gpu_is_within_5_percent_of_the_estimate(plan, compute, fresh_seed, monkeypatch):
    from bitsandbytes.optim import AdamW8bit

    from fastkit.models import add_lora, load

    gc.collect()  # a patched model is a cycle
    before = torch.cuda.memory_allocated()
    monkeypatch.setitem(SHAPES, "mistral-7b", {**SHAPES["mistral-7b"], "num_hidden_layers": 6})
    base, _ = load("mistral-7b", random_weights=True, device="cuda", dtype="bf16")
    torch.cuda.empty_cache()
    model = add_lora(base, rank=16).train()
    assert patch(model, plan, compute=compute).layers == 6
    expected = estimate.estimate(model, [PLANS[plan]] * 6, 4, 2048, "adamw8bit", torch.bfloat16, compute)
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(3, 32000, (4, 2048), device="cuda")
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated() - before
    assert abs(expected.peak - measured) <= 0.05 * measured, f"{expected}\nmeasured {measured / 2**30:.2f} GiB"
