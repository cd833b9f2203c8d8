"""compute="fp8" in a fine-tune and its warm-up."""

import copy
import weakref

import pytest
import torch
from cards import needs_fp8
from fused_case import BATCH, fused, layers_of, model_of, step
from on_meta import on_meta
from test_trainer import inputs, train  # noqa: F401  a fixture

from fastkit.errors import FastkitError
from fastkit.lab.accounts import account_of
from fastkit.models import half, pieces
from fastkit.models.patch import _unpatch, fused_layers, patch, patched
from fastkit.models.plans import PLANS
from fastkit.models.warmup import warm_up
from fastkit.train.config import FinetuneConfig

pytestmark = needs_fp8
SETTINGS = dict(steps=4, accumulation=2, batch_size=2)


@pytest.mark.slow
def test_a_fine_tune(inputs, tmp_path, references):  # noqa: F811
    plain = train(inputs, tmp_path / "plain", kernels="on", plan="keep", **SETTINGS)
    ours = train(inputs, tmp_path / "fp8", kernels="on", plan="auto", budget="2GiB", compute="fp8", **SETTINGS)
    assert ours["config"]["compute"] == "fp8" and ours["kernels"]["layers"] == 2
    assert ours["memory"]["workspace"] <= plain["memory"]["workspace"]
    assert 0 < abs(ours["after"]["validation_loss"] - plain["after"]["validation_loss"]) <= 0.02
    with pytest.raises(
        FastkitError, match="--compute fp8 is for fused layers, and this run has none: add --kernels on"
    ):
        train(inputs, tmp_path / "none", plan="keep", compute="fp8", device="cpu", **SETTINGS)


def test_a_warm_up(folders, references):
    found = warm_up(
        str(folders["llama"]), batch=1, seq=8, rank=4, plans=["keep"], compute="fp8", every_length=False, device="cpu"
    )
    assert found.steps == 3 + 3  # three of one row, and three of packed ones
    with pytest.raises(FastkitError, match="no compute 'fp4'"):
        warm_up(str(folders["llama"]), seq=8, plans=["keep"], compute="fp4", every_length=False, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(plan="off"), "--compute fp8 is for fused layers, and --plan off fuses none: add --plan auto"),
        (dict(plan="auto", dropout=0.1), "--compute fp8 has the adapters in the weights: leave out --dropout 0.1"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(FastkitError, match=message):
        FinetuneConfig(compute="fp8", **settings).check()


def test_a_resumed_run_keeps_its_compute():
    config = FinetuneConfig(compute="fp8", plan="auto")
    assert config.differences(FinetuneConfig(plan="auto").as_dict()) == ["compute"]
    assert not config.differences(copy.deepcopy(config).as_dict())


HOOKS = {"another": lambda gradient: 1.5 * gradient, "in place": lambda gradient: gradient.mul_(1.5)}


@pytest.mark.parametrize("between", ["nothing", *HOOKS, "a sum"])
@pytest.mark.parametrize("plan", ["keep", "recompute-all", "leanest"])
def test_a_gradient_in_fp8_is_taken_for_the_one_beside_it_alone(folder, references, monkeypatch, between, plan):
    """Not where a hook between two layers changed that, or another was added; nor in parts. No bit differs for it."""
    model, taken, to_multiply = fused(model_of(folder), plan, "fp8"), [], half.Half.to_multiply

    def watched(self, dy):
        taken.append(isinstance(found := to_multiply(self, dy), pieces.FP8Rows))
        return found

    def meddle(module, args, y):
        if between in HOOKS:
            y.register_hook(HOOKS[between])  # a tensor's hook that returns what it was given changes it in place
        elif between == "a sum":
            seen.append(y)

    def run():
        seen.clear(), model.zero_grad()
        loss = model(**BATCH, use_cache=False).loss
        (loss + sum(y.square().sum() for y in seen)).backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    seen = []
    monkeypatch.setattr(half.Half, "to_multiply", watched)
    fused_layers(model)[0].layer.register_forward_hook(meddle)
    loss, gradients = run()
    expected = [False, True, between == "nothing", True]  # back from the last half
    assert taken == (expected if PLANS[plan].chunks == 1 else [False] * len(taken))
    assert not half._written
    monkeypatch.setattr(half.Half, "room", lambda self, x, group: None)
    again, expected = run()
    assert loss == again and all(torch.equal(gradients[name], each) for name, each in expected.items())


# --- a norm, taken with the sum that it is of


def ahead(monkeypatch):
    """For each half that begins, whether the norm of its input was there, in a list that fills."""
    begun, waiting = [], half._waiting

    def watched(x, norm):
        begun.append((found := waiting(x, norm)) is not None)
        return found

    monkeypatch.setattr(half, "_waiting", watched)
    return begun


def apart(monkeypatch):
    monkeypatch.setattr(half.Half, "added", lambda self, x, group, a: group.forward(a, residual=x))


def assert_the_same_apart(monkeypatch, run):
    loss, gradients = run()
    apart(monkeypatch)
    again, expected = run()
    assert loss == again and gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], each) for name, each in expected.items())


CHANGED = {
    "another": lambda y: 1.5 * y,
    "in place": lambda y: y.mul_(1.5),
    "a view": lambda y: y.view(y.shape),
    "nothing": lambda y: y,
}


@pytest.mark.parametrize("between", CHANGED)
@pytest.mark.parametrize("plan", ["keep", "recompute-mlp-qkv", "recompute-all+offload", "leanest"])
def test_a_norm_ahead_is_taken_of_the_sum_beside_it_alone(folder, references, monkeypatch, between, plan):
    """Not where a hook between two layers changed that, nor in parts. No bit differs for it."""
    model, begun = fused(model_of(folder), plan, "fp8"), ahead(monkeypatch)
    fused_layers(model)[0].layer.register_forward_hook(lambda module, args, y: CHANGED[between](y))

    def run():
        found = step(model, **BATCH)
        assert not half._normed
        return found

    run()
    expected = [False, True, between == "nothing", True]
    assert begun == (expected if PLANS[plan].chunks == 1 else [False] * 4)
    assert_the_same_apart(monkeypatch, run)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(attention_bias=True), [False, False, True, False]),
        (dict(mlp_bias=True), [False, True, False, True]),
        (dict(), [False, True, True, True]),
    ],
)
def test_a_product_with_a_bias_scales_its_rows_itself(folder, references, monkeypatch, changes, expected):
    model, begun = fused(model_of(folder, **changes), "keep", "fp8"), ahead(monkeypatch)
    step(model, **BATCH)
    assert begun == expected
    assert_the_same_apart(monkeypatch, lambda: step(model, **BATCH))


def test_in_16_bits_no_norm_is_ahead(folder, references, monkeypatch):
    model, begun = fused(model_of(folder), "keep"), ahead(monkeypatch)
    step(model, **BATCH)
    assert begun == [False] * 4


def test_a_norm_ahead_waits_for_its_own_reader_and_no_longer_than_the_sum():
    def put():
        y, found = torch.ones(2, 16), (pieces.quantized(torch.ones(2, 16)), torch.ones(2))
        half._normed[y] = y._version, norm, found
        return y, found

    norm = pieces.Norm(torch.ones(16), 1e-5)
    y, found = put()
    assert half._waiting(y, pieces.Norm(norm.weight, 1e-5)) is found and half._waiting(y, norm) is None
    for other in (pieces.Norm(norm.weight, 1e-6), pieces.Norm(norm.weight.clone(), 1e-5)):
        assert half._waiting(put()[0], other) is None
    y, _ = put()
    y.add_(1)
    assert half._waiting(y, norm) is None
    y, _ = put()
    assert half._waiting(y.clone(), norm) is None and not half._normed  # y lives, nobody waits
    y, found = put()
    rows = weakref.ref(found[0].numbers)
    del y, found
    assert rows() is None and not half._normed


def test_layers_know_the_norm_after_them(folder, references):
    model = model_of(folder)
    first, second = layers_of(model)
    with patched(model, compute="fp8"):
        ours = fused_layers(model)
        assert [layer.following for layer in ours] == [second.input_layernorm, None]
        here = torch.device("cpu")
        norm = ours[0]._following(here)
        assert norm.weight is second.input_layernorm.weight and norm.eps == second.input_layernorm.variance_epsilon
        assert ours[0]._following(torch.device("meta")) is ours[1]._following(here) is None
    assert not fused_layers(model)
    patch(model, compute="fp8")
    kept, _ = fused_layers(model)
    _unpatch(model, keep={first})
    assert fused_layers(model) == [kept] and kept.following is None
    assert patch(model, compute="fp8").layers == 1 and kept.following is second.input_layernorm


@pytest.mark.parametrize(
    ("plan", "dtype", "sums", "norms"),
    [
        ("keep", "bf16", 3, 1),
        ("recompute-all", "bf16", 3, 1 + 4),  # those of the backward by themselves
        ("keep", "fp32", 0, 4),  # of the residual stream; products take another
        ("leanest", "bf16", 0, 20),
    ],
)
def test_what_is_launched(folder, plan, dtype, sums, norms):
    model, ids = model_of(folder, dtype=dtype), torch.zeros(2, 64, dtype=torch.long, device="meta")
    with on_meta(model):
        patch(model, plan, compute="fp8")
        account = account_of(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())
    names = [launch.name for launch in account.launches]
    assert (names.count("_sum_kernel"), names.count("_norm_kernel")) == (sums, norms)
    assert not half._normed


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["keep", "recompute-all"])
def test_a_norm_ahead_on_a_gpu(folder, monkeypatch, plan):
    model = fused(model_of(folder, device="cuda", dtype="bf16"), plan, "fp8")
    begun, decoder, ids = ahead(monkeypatch), model.get_base_model().model, BATCH["input_ids"].cuda()
    ours = decoder(ids, use_cache=False).last_hidden_state
    assert begun == [False, True, True, True] and not half._normed
    apart(monkeypatch)
    assert torch.equal(ours, decoder(ids, use_cache=False).last_hidden_state)
