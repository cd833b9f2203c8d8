"""Adapters on a loaded model, its answers, and fastkit's kernels in it."""

import copy
import json

import pytest
import torch
from probe import gradients, logits
from tiny import ARCHITECTURES, SHAPE, tiny_model

from fastkit.errors import FastkitError
from fastkit.models import add_lora, load, load_adapter
from fastkit.models.bnb import bnb, dense_on_cpu
from fastkit.models.chat import answer, plain_prompt
from fastkit.models.lora import PROJECTIONS, base_of
from fastkit.models.patch import Report, patch, unpatch

# --- LoRA


def test_add_lora(llama):
    model, _ = llama
    before = logits(model)
    model = add_lora(model, rank=4, seed=1)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(PROJECTIONS) * SHAPE["num_hidden_layers"]
    for name, p in trainable.items():
        assert p.dtype == torch.float32
        assert p.any() == ("lora_A" in name), name
    assert torch.equal(logits(model), before)


def test_add_lora_is_fp32_on_a_bf16_model(folders):
    model = add_lora(load(str(folders["llama"]), device="cpu", dtype="bf16")[0])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_add_lora_follows_the_seed_and_leaves_the_callers(llama):
    model, _ = llama
    torch.manual_seed(7)
    first = torch.rand(3)
    torch.manual_seed(7)
    a, b, c = (add_lora(copy.deepcopy(model), rank=2, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), first)
    names = [name for name in a if "lora_A" in name]
    assert all(torch.equal(a[name], b[name]) for name in names)
    assert not any(torch.equal(a[name], c[name]) for name in names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 must be 1 or more"),
        ({"dropout": 1.0}, r"dropout 1.0 must be in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout -0.1 must"),
        ({"targets": ["q_proj", "c_attn"]}, "no linear layer named 'c_attn': it has down_proj, gate_proj,"),
    ],
)
def test_add_lora_refuses(llama, settings, message):
    with pytest.raises(FastkitError, match=message):
        add_lora(llama[0], **settings)


def test_a_second_adapter_is_refused(llama):
    with pytest.raises(FastkitError, match=r"already has an adapter: .*merge"):
        add_lora(add_lora(llama[0]))


@pytest.fixture
def adapter(llama, folders, tmp_path):
    """(folder of an adapter, its logits): the tiny Llama's, with numbers in B, and no tokenizer."""
    model = add_lora(llama[0], rank=2, alpha=6)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


def test_load_adapter(adapter, llama, folders):
    folder, expected = adapter
    assert not torch.allclose(expected, logits(load(str(folders["llama"]), device="cpu")[0]))
    for base in (None, str(folders["llama"])):
        model, tokenizer = load_adapter(str(folder), model=base, device="cpu")
        torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)
        assert not model.training and tokenizer.chat_template == llama[1].chat_template


def test_load_adapter_prefers_its_own_tokenizer(adapter, llama):
    folder, _ = adapter
    tokenizer = llama[1]
    tokenizer.chat_template, tokenizer.pad_token = "mine", None
    tokenizer.save_pretrained(folder)
    _, tokenizer = load_adapter(str(folder), device="cpu")
    assert (tokenizer.chat_template, tokenizer.pad_token) == ("mine", "<|im_end|>")


def test_load_adapter_refuses(adapter, folders, tmp_path):
    folder, _ = adapter
    with pytest.raises(FastkitError, match=f"{tmp_path} holds no adapter"):
        load_adapter(str(tmp_path), device="cpu")
    other = tiny_model(tmp_path / "other", hidden_size=128)
    with pytest.raises(FastkitError, match=f"adapter {folder} does not fit {other}: "):
        load_adapter(str(folder), model=str(other), device="cpu")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/home/anna/llama"}))
    with pytest.raises(
        FastkitError, match="has /home/anna/llama for its base, which is not here: name it with --model"
    ):
        load_adapter(str(folder), device="cpu")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(FastkitError, match="names no base model"):
        load_adapter(str(folder), device="cpu")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FastkitError, match=r"no adapter_model.safetensors: pickle"):
        load_adapter(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("named", "taken"),
    [
        ("/home/anna/.cache/fastkit/SmolLM2-135M-Instruct", "smollm2"),
        ("/home/anna/llama", "/home/anna/llama"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (None, None),
    ],
)
def test_smollm2_of_another_home_is_this_ones(named, taken):
    assert base_of({"base_model_name_or_path": named}) == taken


def test_an_evaluation_does_not_cut_the_gradient(folders):
    """The trap that `keep_differentiable` tells of; it bites on CPUs with AVX512-BF16, and holds everywhere."""
    plain, evaluated = (add_lora(load(str(folders["llama"]), device="cpu")[0], rank=2) for _ in range(2))
    logits(evaluated.eval())
    expected, seen = gradients(plain), gradients(evaluated)
    assert any(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(gradient, seen[name]), name


# --- patch


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_patch_of_the_parts_alone(folders, arch, monkeypatch):
    monkeypatch.setattr("fastkit.kernels.common.INTERPRETED", False)  # the references: the kernels have their own tests
    model = add_lora(load(str(folders[arch]), device="cpu")[0], rank=2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    expected, expected_gradients = logits(model), gradients(model)
    layers = SHAPE["num_hidden_layers"]
    norms = 1 + layers * (4 if arch == "qwen3" else 2)  # Qwen3 normalizes q and k too
    report = patch(model, layers=False)
    assert (report.layers, report.norms, report.mlps, report.left) == (0, norms, layers, {})
    assert patch(model, layers=False) == Report()  # nothing twice
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4)

    mine = model.base_model.model.model.norm
    mine.forward = original = lambda hidden_states: hidden_states
    unpatch(model)
    assert [m.forward for m in model.modules() if "forward" in vars(m)] == [original]  # somebody else's stays
    del mine.forward
    assert torch.equal(logits(model), expected)


# --- answers


def test_answers_do_not_depend_on_the_batch(llama):
    model, tokenizer = llama
    model.train()
    questions = ["Hi", "A longer question, so that the first is padded"]
    together = answer(model, tokenizer, questions, max_new_tokens=6)
    assert together == [answer(model, tokenizer, [q], max_new_tokens=6)[0] for q in questions]
    assert model.training and tokenizer.padding_side == "right"


def test_answers_without_a_chat_template_use_the_plain_one(llama, monkeypatch):
    model, tokenizer = llama
    tokenizer.chat_template = None
    chat = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
    ]
    assert plain_prompt(chat, "</s>") == "### User:\nQ\n\n### Assistant:\nA</s>\n\n### User:\nR\n\n### Assistant:\n"
    asked = []
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: asked.append(input_ids) or input_ids)
    assert answer(model, tokenizer, [chat]) == [""]
    assert tokenizer.decode(asked[0][0]) == plain_prompt(chat, "<|im_end|>")
    with pytest.raises(FastkitError, match=r"temperature -1.0 must be 0 \(greedy\) or above"):
        answer(model, tokenizer, ["Q"], temperature=-1.0)


def test_dense_copies_change_no_answer_and_are_gone_after(llama, monkeypatch):
    model, _ = llama
    four_bit = logits(model)
    with dense_on_cpu(model):
        dense = logits(model)
        assert all("forward" in vars(m) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    assert torch.allclose(dense, four_bit, atol=1e-5)
    assert not any("forward" in vars(m) for m in model.modules())
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with dense_on_cpu(model):
        assert not any("forward" in vars(m) for m in model.modules()), "no memory for the copies"
