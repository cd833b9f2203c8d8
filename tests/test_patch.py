"""`patch` and `unpatch`: what they take and say, that nothing else changes, and life with peft and transformers."""

import inspect
import json
import warnings

import pytest
import torch
from fused_case import BATCH, IDS, LAYERS, assert_same_step, fused, layers_of, model_of, step, table
from tiny import ARCHITECTURES, SHAPE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from fastkit.errors import FastkitError
from fastkit.models import add_lora, attend
from fastkit.models.bnb import bnb
from fastkit.models.patch import patch, patched, unpatch
from fastkit.models.plans import PLANS

pytestmark = pytest.mark.usefixtures("references")  # the interpreted kernels have their own tests


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


# --- what is taken


@pytest.mark.parametrize("lora", [True, False], ids=["peft", "plain"])
def test_layers_of_another_architecture_are_named(lora):
    """Their norms and MLPs are taken, where they are such as others have. fastkit's `load` refuses the model."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", **SHAPE)).train()
    if lora:
        model = add_lora(model, rank=4)
    report = patch(model)
    assert report.layers == 0 and report.mlps == LAYERS and report.heads == 1
    assert len(report.left) == LAYERS and all("layers." in name for name in report.left)
    assert (
        str(report)
        .splitlines()[1]
        .endswith("layers.0 and 1 more: a Olmo2DecoderLayer, and only layers of Llama, Mistral, Qwen2, Qwen3 are fused")
    )
    unpatch(model)
    assert not patch(model, layers=False).left


@pytest.mark.parametrize("lora", [True, False], ids=["peft", "plain"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_layer_is_taken_and_nothing_twice(folder, arch, lora):
    model = model_of(folder, arch, lora=lora)
    report = patch(model)
    assert report.as_dict() == {"layers": LAYERS, "rms_norm": 1, "swiglu": 0, "head": 1, "left": {}, "notes": {}}
    assert str(report) == "fastkit runs 2 fused layers, 1 norm, 1 head"
    json.dumps(report.as_dict())
    again = patch(model).as_dict()
    assert again == {"layers": 0, "rms_norm": 0, "swiglu": 0, "head": 0, "left": {}, "notes": {}}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_unpatch_leaves_every_attribute_as_it_was(folder, arch):
    model = model_of(folder, arch)
    classes = {cls for module in model.modules() for cls in type(module).__mro__}

    def state():
        own = {(m, name): value for m in model.modules() for name, value in vars(m).items()}
        inner = {
            (m, name, key): value
            for (m, name), held in own.items()
            if isinstance(held, dict)
            for key, value in held.items()
        }
        return own | inner | {(cls, name): value for cls in classes for name, value in vars(cls).items()}

    before, expected = state(), logits(model)
    patch(model, "recompute-all")
    step(model, **BATCH)
    model.zero_grad()
    unpatch(model)
    after = state()
    assert before.keys() == after.keys()
    changed = [key for key, value in before.items() if after[key] is not value]
    assert not changed, changed
    assert torch.equal(logits(model), expected)


def test_patched_is_for_the_length_of_a_with_statement(folder):
    model = model_of(folder)
    norm = model.base_model.model.model.norm
    patch(norm)
    with patched(model, "recompute-mlp") as report:
        assert report.layers == LAYERS and report.norms == 0
        assert "forward" in vars(layers_of(model)[0])
    assert "forward" not in vars(layers_of(model)[0]) and "forward" in vars(norm)
    with pytest.raises(ZeroDivisionError), patched(model):
        1 / 0  # noqa: B018
    assert "forward" not in vars(layers_of(model)[0])


def test_somebody_elses_forward_stays(folder):
    model = model_of(folder)
    layers, norm = layers_of(model), model.base_model.model.model.norm
    theirs = [layers[0], layers[1].mlp, norm]
    for module in theirs:
        module.forward = lambda *args, **kwargs: None
    forwards = [m.forward for m in theirs]
    report = patch(model)
    path = "base_model.model.model"
    assert report.layers == 0 and report.norms == 4  # of both layers
    assert report.left == {
        f"{path}.layers.0": "somebody else replaced its forward",
        f"{path}.layers.1": "mlp: somebody else replaced its forward",
        f"{path}.layers.1.mlp": "somebody else replaced its forward",
        f"{path}.norm": "somebody else replaced its forward",
    }
    assert str(report).splitlines()[1:] == [
        f"  not {path}.layers.0 and 2 more: somebody else replaced its forward",
        f"  not {path}.layers.1: mlp: somebody else replaced its forward",
    ]
    unpatch(model)
    assert [m.forward for m in model.modules() if "forward" in vars(m)] == forwards


def int8(layer):
    layer.self_attn.q_proj = bnb.nn.Linear8bitLt(64, 64, bias=False)


def trained(name):
    def train(layer):
        layer.get_parameter(name).requires_grad_(True)

    return train


def hooked(layer):
    layer.mlp.up_proj.register_forward_hook(lambda *args: None)


def subclassed(layer):
    layer.mlp.up_proj = type("MyLinear", (nn.Linear,), {})(64, 128, bias=False)


def other_mlp(layer):
    layer.mlp = type("MyMLP", (type(layer.mlp),), {})(layer.mlp.config)


@pytest.mark.parametrize(
    ("arch", "spoil", "why"),
    [
        ("llama", int8, "q_proj: quantized as int8"),
        ("llama", trained("self_attn.v_proj.weight"), "v_proj: its weight is trained"),
        ("qwen2", trained("self_attn.k_proj.bias"), "k_proj: its bias is trained"),
        ("qwen3", trained("self_attn.q_norm.weight"), "self_attn.q_norm: its weight is trained"),
        ("llama", hooked, "mlp.up_proj: it has hooks, which a fused layer would not call"),
        ("llama", subclassed, "up_proj: a test_patch.MyLinear"),
        ("llama", other_mlp, "mlp: a MyMLP"),
    ],
)
def test_a_layer_that_cannot_be_fused_is_named_and_takes_its_kernels(folder, arch, spoil, why):
    model = model_of(folder, arch, quantize=False, lora=False)
    spoil(model.model.layers[1])
    report = patch(model)
    assert report.left == {"model.layers.1": why}
    assert (report.layers, report.norms, report.mlps) == (1, 3 + 2 * (arch == "qwen3"), 1)
    assert "forward" in vars(model.model.layers[1].input_layernorm)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_act": "gelu"}, "mlp: activation GELU"),
        ({"attention_dropout": 0.1}, "self_attn: attention dropout 0.1"),
        ({"head_dim": 512}, "self_attn: heads of 512 numbers, above 256"),
    ],
)
def test_a_model_that_cannot_be_fused_says_why_of_each_layer(folder, changes, why):
    model = model_of(folder, lora=False, quantize=False, **changes)
    report = patch(model)
    assert report.left == {f"model.layers.{n}": why for n in range(LAYERS)}
    assert (report.layers, report.norms) == (0, 1 + 2 * LAYERS)
    assert report.mlps == (0 if "hidden_act" in changes else LAYERS)


def test_lora_variants_and_large_ranks_are_refused_and_dropout_is_noted(folder):
    from peft import LoraConfig, get_peft_model

    for options, why in (
        ({"use_dora": True}, "q_proj: LoRA variant DoraLinearVariant"),
        ({"r": 300}, "q_proj: LoRA of rank 300, above 256"),
    ):
        base = model_of(folder, lora=False, quantize=False)
        report = patch(get_peft_model(base, LoraConfig(target_modules=["q_proj"], **options)))
        assert set(report.left.values()) == {why}
    report = patch(model_of(folder, dropout=0.1).eval())
    assert report.layers == LAYERS and len(report.notes) == 7 * LAYERS
    assert set(report.notes.values()) == {"LoRA dropout 0.1: two products instead of a merged weight"}
    assert f"q_proj and {7 * LAYERS - 1} more: LoRA dropout 0.1" in str(report)


def test_an_unknown_plan_is_refused(folder):
    with pytest.raises(FastkitError, match="there is no plan 'lean': use one of keep, recompute-mlp, "):
        patch(model_of(folder, lora=False), "lean")


def test_what_turns_out_in_a_call_is_said_once_and_goes_through_transformers(folder):
    model = model_of(folder)
    patch(model)
    layers_of(model)[0].self_attn.q_proj.base_layer.register_forward_hook(lambda *args: calls.append(1))
    calls = []
    with pytest.warns(UserWarning, match=r"not fused: self_attn.q_proj.base_layer: it has hooks") as said:
        step(model, **BATCH)
        step(model, **BATCH)
    assert len([w for w in said if "not fused" in str(w.message)]) == 1 and len(calls) == 2
    model = model_of(folder)
    patch(model)
    with pytest.warns(UserWarning, match="a cache of keys and values: pass use_cache=False to train"):
        model(**BATCH, use_cache=True).loss.backward()


# --- with transformers


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_without_gradients_every_bit_is_that_of_transformers(folder, arch, attends, monkeypatch):
    model = model_of(folder, arch)  # one object: a copy of a weight, elsewhere in memory, may be multiplied otherwise
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, output_scores=True, return_dict_in_generate=True)

    def run():
        generated = model.eval().generate(input_ids=IDS, **options)
        return [logits(model.train()), logits(model.eval()), generated.sequences, *generated.scores]

    with patched(model) as report:
        assert report.layers == LAYERS
        with monkeypatch.context() as patcher:
            patcher.setattr("fastkit.models.patch.rms_norm", None)
            ours = run()
    assert all(map(torch.equal, ours, run())) and not attends


def test_captured_outputs(folder, attends):
    model = model_of(folder)
    ours = fused(model)
    for name in ("hidden_states", "attentions"):
        for m in (model, ours):
            m.base_model.model.set_attn_implementation("eager")
        options = {f"output_{name}": True, "use_cache": False}
        if name == "attentions":
            with pytest.warns(UserWarning, match="self_attn: it has hooks"):
                found = getattr(ours(IDS, **options), name)
        else:
            found = getattr(ours(IDS, **options), name)
        expected = getattr(model(IDS, **options), name)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    attends.clear()
    step(ours, **BATCH)  # the hooks are still there, but idle
    assert len(attends) == LAYERS


@pytest.fixture
def attends(monkeypatch):
    """How often the fused attention ran."""
    calls, run = [], attend.attend
    monkeypatch.setattr(attend, "attend", lambda *args: calls.append(1) or run(*args))
    return calls


def enable_checkpointing(model, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not in every version
        model.gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": kwargs} if kwargs else {}))


@pytest.mark.parametrize(
    ("plan", "runs"), [(None, 2), *((name, 1 if plan.attention else 2) for name, plan in PLANS.items())]
)
def test_gradient_checkpointing_recomputes_what_the_plan_says(folder, attends, plan, runs):
    model = model_of(folder)
    ours, expected = fused(model, plan), step(model, **BATCH)
    enable_checkpointing(ours)
    assert_same_step(step(ours, **BATCH), expected)
    assert len(attends) == runs * LAYERS
    if plan is None:
        layers_of(ours)[0].gradient_checkpointing = False
        attends.clear()
        assert_same_step(step(ours, **BATCH), expected)
        assert len(attends) == 2 * LAYERS - 1


def test_gradient_checkpointing_takes_the_cache_away(folder, attends, recwarn):
    model = model_of(folder)
    ours, expected = fused(model), step(model, **BATCH)
    enable_checkpointing(ours)
    loss = ours(**BATCH, use_cache=True).loss
    assert abs(loss.item() - expected[0]) < 1e-5 and len(attends) == LAYERS
    cache, x = DynamicCache(), ours.get_input_embeddings()(IDS)
    takes = inspect.signature(type(layers_of(ours)[0]).forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # from transformers 5.24 on; before
    y = layers_of(ours)[0](x, position_embeddings=table(ours, IDS.shape[1]), use_cache=True, **{name: cache})
    assert y.requires_grad and len(attends) == LAYERS + 1 and cache.get_seq_length() == 0
    assert not [w for w in recwarn if "not fused" in str(w.message)]


def test_a_layer_left_to_transformers_is_checkpointed_as_ever(folder, attends):
    model = model_of(folder)
    ours, expected = fused(model), step(model, **BATCH)
    enable_checkpointing(ours)
    calls = []
    for layer in layers_of(ours):
        layer.mlp.up_proj.register_forward_hook(lambda *args: calls.append(1))
    with pytest.warns(UserWarning, match="not fused"):
        assert_same_step(step(ours, **BATCH), expected)
    assert len(calls) == 2 * LAYERS and not attends


@pytest.mark.filterwarnings("ignore:reentrant gradient checkpointing")  # where transformers lets it come so far
def test_reentrant_checkpointing_is_right(folder):
    model = model_of(folder)
    ours, expected = fused(model), step(model, **BATCH)
    enable_checkpointing(ours, use_reentrant=True)
    ours.enable_input_require_grads()
    assert_same_step(step(ours, **BATCH), expected)


def test_trainer_has_the_same_losses(folder, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = Dataset.from_dict({"input_ids": IDS.tolist() * 4, "labels": IDS.tolist() * 4})
    model = model_of(folder)
    curves = []
    for name, one in (("ours", fused(model)), ("stock", model)):
        args = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
            logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
            gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = Trainer(model=one, args=args, train_dataset=rows)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 4 and curves[1][0] - curves[1][-1] > 0.05
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) <= 1e-4
