"""A patched model in the hands of peft: switching, disabling, merging, adding and saving adapters."""

import copy

import pytest
import torch
from fused_case import BATCH, IDS, LAYERS, assert_same_step, fused, give_b, layers_of, model_of, step

from fastkit.models.patch import patch

pytestmark = pytest.mark.usefixtures("references")  # the interpreted kernels have their own tests


def add_adapter(model, name, **options):
    from peft import LoraConfig

    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    model.add_adapter(name, LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": targets} | options)))
    give_b(model)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture(params=[True, False], ids=["nf4", "dense"])
def two_adapters(request, folder):
    """(ours, patched, and the same model as it is), with the adapters "default" and "other"."""
    model = model_of(folder, quantize=request.param)
    add_adapter(model, "other")
    model.set_adapter("default")
    return fused(model), model


def train_all_adapters(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)


def test_switching_adapters(two_adapters):
    for name in ("other", "default", "other"):
        for model in two_adapters:
            model.set_adapter(name)
        assert_same_step(*(step(model, **BATCH) for model in two_adapters))


def test_several_adapters_at_once_and_another_scale(two_adapters):
    for model in two_adapters:
        model.base_model.set_adapter(["default", "other"])
        train_all_adapters(model)
        layers_of(model)[0].mlp.up_proj.scale_layer(0.5)
    ours, theirs = (step(model, **BATCH) for model in two_adapters)
    assert any(".other." in name for name in ours[1])
    assert_same_step(ours, theirs)


def test_disabled_adapters(two_adapters):
    results = []
    for model in two_adapters:
        model.enable_input_require_grads()
        with model.disable_adapter():
            results.append(step(model, **BATCH))
    assert_same_step(*results)
    assert not results[0][1]
    assert_same_step(*(step(model, **BATCH) for model in two_adapters))


@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to 4-bit")
def test_merged_and_unmerged_adapters(two_adapters):
    for model in two_adapters:
        model.enable_input_require_grads()
        model.merge_adapter()
    assert_same_step(*(step(model, **BATCH) for model in two_adapters))
    for model in two_adapters:
        model.unmerge_adapter()
    assert_same_step(*(step(model, **BATCH) for model in two_adapters))
    for model in two_adapters:
        model.merge_adapter()
    results = []
    for model in two_adapters:
        with model.disable_adapter():  # unmerges
            results.append(step(model, **BATCH))
    assert_same_step(*results)


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_merge_and_unload(two_adapters):
    ours, theirs = (model.merge_and_unload() for model in two_adapters)
    assert torch.equal(logits(ours), logits(theirs))
    for model in (ours, theirs):
        model.enable_input_require_grads()
    assert_same_step(*(step(model, **BATCH) for model in (ours, theirs)))


def test_adapters_added_after_patch(folder):
    from peft import LoraConfig, get_peft_model

    models = []
    for take in (True, False):
        model = model_of(folder, lora=False)
        if take:
            assert patch(model).layers == LAYERS
        torch.manual_seed(0)
        models.append(get_peft_model(model, LoraConfig(target_modules=["q_proj", "gate_proj"])))
        give_b(models[-1])
    assert_same_step(*(step(model, **BATCH) for model in models))


def test_saving_writes_the_same_files(two_adapters, tmp_path):
    for name, model in zip(("ours", "stock"), two_adapters, strict=True):
        model.save_pretrained(tmp_path / name)
    ours, stock = (sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("ours", "stock"))
    assert ours == stock
    for path in ours:
        if path.suffix == ".safetensors":
            assert (tmp_path / "ours" / path).read_bytes() == (tmp_path / "stock" / path).read_bytes()
    assert two_adapters[0].state_dict().keys() == two_adapters[1].state_dict().keys()


def test_a_copy_of_a_patched_model_is_its_own(folder):
    ours = fused(model_of(folder))
    other = copy.deepcopy(ours)
    expected = step(ours, **BATCH)
    for parameter in ours.parameters():
        parameter.data.zero_()
    assert_same_step(step(other, **BATCH), expected)
