"""Tensors kept on the device and on the host: what comes back, when it leaves, and what is let go."""

import gc

import pytest
import torch
from fused_case import BATCH, assert_same_step, fused, layers_of, model_of, step

from fastkit.errors import FastkitError
from fastkit.models import keeping
from fastkit.models.keeping import Keeper
from fastkit.models.plans import PLANS

OFFLOADED = [name for name, plan in PLANS.items() if plan.offload]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def some(device="cpu", n=1):
    return {"x": torch.randn(6, 4, device=device), "o": torch.randn(2, 3, 5, 4, device=device).transpose(1, 2)}


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_kept_comes_back_bit_by_bit_and_shaped_as_it_was(fresh_seed, device):
    keeper, given = Keeper(), [some(device) for _ in range(5)]
    copies = [{name: x.clone() for name, x in one.items()} for one in given]
    kept = []
    while given:
        kept.append(keeper.keep(given.pop(0), offload=True))
    assert [one.here is None for one in kept] == [True, True, True, False, False]
    for one, expected in zip(reversed(kept), reversed(copies), strict=True):
        for name, x in one.tensors().items():
            assert torch.equal(x, expected[name])
            assert x.shape == expected[name].shape and x.stride() == expected[name].stride()


@pytest.mark.parametrize("device", DEVICES)
def test_one_half_ahead_is_fetched_and_no_more(device):
    keeper = Keeper()
    kept = [keeper.keep(some(device), offload=True) for _ in range(5)]
    kept[4].tensors()
    assert [one.here is None for one in kept] == [True, True, True, False, False]  # 3 had not been let go yet
    kept[3].tensors()
    assert [one.here is None for one in kept] == [True, True, False, False, False]
    kept[2].tensors()
    assert [one.here is None for one in kept] == [True, False, False, False, False]


@pytest.mark.parametrize("device", DEVICES)
def test_host_memory_is_used_again(device):
    keeper = Keeper()

    def buffers():
        kept = [keeper.keep(some(device), offload=True) for _ in range(4)]
        for one in reversed(kept):
            one.tensors()
        return {buffer.data.data_ptr() for one in kept for buffer, _, _ in one.away.values()}

    first = buffers()
    gc.collect()
    assert len(first) == 6 and buffers() == first
    gc.collect()
    keeper.clear()
    assert not keeper._idle


def test_host_memory_serves_batches_of_any_shape():
    """Once the longest was seen, nothing is allocated, in whatever order they come."""
    keeper = Keeper()

    def one_pass(tokens):
        sizes = {"x": (tokens, 24), "lse": (2, tokens), "gate_up": (tokens, 100)}
        given = [{name: torch.rand(size) for name, size in sizes.items()} for _ in range(5)]
        kept = [keeper.keep(tensors, offload=True) for tensors in given]
        for one, tensors in zip(reversed(kept), reversed(given), strict=True):
            assert all(torch.equal(x, tensors[name]) for name, x in one.tensors().items())
        del one, kept
        return sorted(buffer.memory.data_ptr() for buffer in keeper._idle)

    longest = one_pass(64)
    for tokens in (64, 63, 1, 33, 17, 2, 64):
        assert one_pass(tokens) == longest
    more = one_pass(130)
    assert set(longest) < set(more)
    for tokens in (64, 129, 3, 130):
        assert one_pass(tokens) == more


def test_without_offload_nothing_moves():
    keeper, given = Keeper(), [some() for _ in range(3)]
    kept = [keeper.keep(one, offload=False) for one in given]
    for one, tensors in zip(kept, given, strict=True):
        assert not one.away
        for name, x in one.tensors().items():
            assert x.data_ptr() == tensors[name].data_ptr()


def test_a_change_in_place_is_noticed_before_it_is_copied_and_before_it_is_used():
    keeper, (first, second) = Keeper(), (some(), some())
    kept = keeper.keep(first, offload=True)
    first["x"] += 1
    with pytest.raises(RuntimeError, match="x of a decoder layer was changed in place"):
        kept.tensors()
    with pytest.raises(RuntimeError, match="x of a decoder layer was changed in place"):
        keeper.keep(second, offload=True)


def test_too_little_host_memory_says_how_much(monkeypatch):
    monkeypatch.setattr(keeping, "HOST_RESERVE", 2**60)
    keeper = Keeper()
    kept = keeper.keep(some(), offload=True)
    with pytest.raises(FastkitError, match="MiB more of host memory"):
        keeper.keep(some(), offload=True)
    assert kept.here is not None


# --- under the layers


@pytest.mark.parametrize("plan", OFFLOADED)
def test_a_step_is_the_same_and_only_the_last_halves_stay(folder, references, plan):
    model = model_of(folder, num_hidden_layers=4)
    ours = fused(model, plan)
    expected = step(model, **BATCH)
    for _ in range(2):  # the second pass reuses the host's memory
        assert_same_step(step(ours, **BATCH), expected)
    keeper = layers_of(ours)[0].forward.shared.keeper
    gc.collect()
    used = len(keeper._idle)
    loss = ours(**BATCH, use_cache=False).loss
    assert len(keeper._idle) == 0 < used
    del loss
    gc.collect()
    assert len(keeper._idle) == used  # a pass without a backward gives it back


def test_two_passes_before_their_backwards(folder, references):
    model = model_of(folder, num_hidden_layers=3)
    ours = fused(model, "recompute-mlp-qkv+offload")
    other = {name: x.flip(0) for name, x in BATCH.items()}
    found = []
    for m in (ours, model):
        m.zero_grad()
        first, second = (m(**tokens, use_cache=False).loss for tokens in (BATCH, other))
        (first + 2 * second).backward()
        found.append((second.item(), {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}))
    assert_same_step(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", OFFLOADED)
def test_offloading_on_a_gpu_changes_no_bit_and_frees_memory(folder, fresh_seed, plan):
    model = model_of(folder, device="cuda", dtype="bf16", num_hidden_layers=12)
    ids = torch.randint(3, 300, (4, 512), device="cuda")
    batch = {"input_ids": ids, "labels": ids}
    base = plan.removesuffix("+offload").replace("leanest", "recompute-mlp-qkv")
    results = {}
    for name in (base, plan):
        ours = fused(model, name)
        for _ in range(3):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            loss = ours(**batch, use_cache=False).loss
            held = torch.cuda.memory_allocated() - before
            ours.zero_grad()
            loss.backward()
        gradients = [p.grad for p in ours.parameters() if p.grad is not None]
        results[name] = loss.item(), held, gradients
    (loss, held, gradients), (same, less, again) = results[base], results[plan]
    assert less < 0.5 * held
    if PLANS[plan].chunks == 1:
        assert loss == same and all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
