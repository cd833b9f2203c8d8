"""The head and loss that hold no logits: the same loss and gradients, and logits for whoever asks."""

import copy

import pytest
import torch
from fused_case import BATCH, assert_same_step, batch, model_of, step
from torch import nn

from fastkit.models.fused_head import Logits
from fastkit.models.patch import patch, unpatch

pytestmark = pytest.mark.usefixtures("references")


def both(folder, **changes):
    ours = model_of(folder, **changes)
    theirs = copy.deepcopy(ours)
    assert patch(ours).heads == 1
    patch(theirs)
    unpatch_head(theirs)
    return ours, theirs


def unpatch_head(model):
    base = model.get_base_model()
    del base.lm_head.forward, base._loss_function


def output(model, **inputs):
    return model(**inputs, use_cache=False)


@pytest.mark.parametrize(
    "extra", [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(31)}, {"ignore_index": 5}], ids=str
)
def test_loss_and_gradients_are_those_of_the_logits(folder, fresh_seed, extra):
    ours, theirs = both(folder)
    tokens = batch([9, 14])
    if "ignore_index" in extra:
        tokens["labels"] = tokens["labels"].masked_fill(tokens["labels"] == -100, 5)
    assert_same_step(step(ours, **tokens, **extra), step(theirs, **tokens, **extra))


def test_labels_that_are_shifted_already(folder):
    ours, theirs = both(folder)
    shifted = torch.roll(BATCH["labels"], -1, 1)
    assert_same_step(step(ours, **BATCH, shift_labels=shifted), step(theirs, **BATCH, shift_labels=shifted))


def test_a_trained_head_learns(folder):
    ours, theirs = both(folder)
    for model in (ours, theirs):
        model.get_base_model().lm_head.weight.requires_grad_()
    results = [step(model, **BATCH) for model in (ours, theirs)]
    assert any("lm_head" in name for name in results[0][1])
    assert_same_step(*results)


def test_logits_are_not_computed_for_the_loss_and_are_for_who_asks(folder):
    ours, theirs = both(folder)
    found = output(ours, **BATCH)
    found.loss.backward()
    assert isinstance(found.logits, Logits)
    assert found.logits.shape == (2, 12, 300) and found.logits.dtype == torch.float32 and found.logits.requires_grad
    assert str(found.logits.device) == "cpu" and found.logits.size(-1) == 300 and len(found.logits) == 2
    assert found.logits.computed is None
    expected = output(theirs, **BATCH).logits
    assert torch.equal(found.logits[:, -1], expected[:, -1])
    assert torch.equal(found.logits.argmax(-1), expected.argmax(-1))
    assert torch.equal(torch.stack([found.logits, found.logits])[1], expected)
    assert f"{found.logits}".startswith("tensor(")


@pytest.mark.parametrize("with_loss", [True, False])
def test_a_loss_of_ones_own_has_its_gradient(folder, with_loss):
    gradients = []
    for model in both(folder):
        found = output(model, **BATCH)
        own = (found.logits.float() ** 2).mean() + (found.loss if with_loss else 0)
        own.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * theirs.abs().max().item())


def test_mixed_precision_casts_wait(folder):
    ours, theirs = both(folder, quantize=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = output(ours, **BATCH), output(theirs, **BATCH)
    assert found.logits.dtype == expected.logits.dtype == torch.bfloat16
    cast = found.logits.float()
    assert isinstance(cast, Logits) and cast.dtype == torch.float32 and cast.computed is None
    assert isinstance(found.logits.to(torch.float16), Logits)
    assert not isinstance(found.logits.to("cpu", torch.float32), Logits)
    assert torch.equal(cast + 0, expected.logits.float())
    assert abs(found.loss - expected.loss) <= 0.02


def test_evaluation_needs_no_logits_and_generation_has_them_at_once(folder):
    ours, theirs = both(folder)
    for model in (ours, theirs):
        model.eval()
    with torch.no_grad():
        found = output(ours, **BATCH)
        assert found.logits.computed is None
        torch.testing.assert_close(found.loss, output(theirs, **BATCH).loss, rtol=1e-6, atol=0.0)
        assert not found.logits.requires_grad
        one = output(ours, input_ids=BATCH["input_ids"], logits_to_keep=1)
        assert type(one.logits) is torch.Tensor
    ids = [model.generate(BATCH["input_ids"], max_new_tokens=5, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*ids)


def test_heads_that_are_left_and_why(folder):
    def left(change):
        model = model_of(folder, lora=False)
        change(model)
        report = patch(model)
        assert report.heads == 0
        unpatch(model)
        return report.left["lm_head"]

    def adapter(model):
        from peft import LoraConfig, get_peft_model

        get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))

    assert "its adapter would be ignored" in left(adapter)
    assert "bias" in left(lambda m: setattr(m, "lm_head", nn.Linear(64, 300)))
    assert "replaced its forward" in left(lambda m: setattr(m.lm_head, "forward", lambda x: x))
    assert "replaced its forward" in left(lambda m: m.lm_head.register_forward_hook(lambda *args: None))
    assert "a loss of its own" in left(lambda m: setattr(m, "loss_function", lambda *args, **kwargs: 0))


def test_unpatch_gives_head_and_loss_back(folder):
    model = model_of(folder, lora=False)
    before = dict(vars(model)), dict(vars(model.lm_head))
    patch(model)
    assert isinstance(output(model, **BATCH).logits, Logits)
    unpatch(model)
    assert (dict(vars(model)), dict(vars(model.lm_head))) == before
    assert type(output(model, **BATCH).logits) is torch.Tensor
