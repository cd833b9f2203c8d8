"""A merged export holds the base plus the adapter, rounded once, never all of it in memory."""

import ctypes
import errno
import json
import math
import platform
import shutil
import threading
import time

import gguf
import psutil
import pytest
import torch
from export_case import (
    TEXTS,
    bpe_tokenizer,
    change_base,
    check_refused,
    fill,
    logits_with,
    make_adapter,
    make_cases,
    read_gguf,
    read_merged,
    true_weights,
)
from probe import IDS, logits
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from fastkit.cli import main
from fastkit.errors import FastkitError
from fastkit.models import add_lora, load, load_adapter
from fastkit.train import export
from fastkit.train.export import merge
from fastkit.train.gguf_file import to_gguf


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return make_cases(tmp_path_factory.mktemp("export"))


all_cases = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def test_a_merged_folder_is_an_ordinary_checkpoint(cases, tmp_path):
    from transformers import AutoTokenizer

    base, adapter, _, truth = cases()
    (base / "generation_config.json").write_text(
        '{"temperature": 0.5, "do_sample": false}'
    )  # save_pretrained refuses it
    output = merge(adapter, tmp_path / "a" / "merged", dtype="fp32", device="cpu", shard_size="100KB")
    shards = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(shards) > 2 and all((output / name).stat().st_size < 110_000 for name in shards)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.numel() * 4 for weight in truth.values())
    assert index["weight_map"].keys() == truth.keys()
    for name in shards:
        for key, weight in load_file(output / name).items():
            assert index["weight_map"][key] == name
            torch.testing.assert_close(weight.double(), truth[key], atol=1e-6, rtol=1e-6)
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert json.loads((output / "generation_config.json").read_text())["temperature"] == 0.5
    tokenizer, own = AutoTokenizer.from_pretrained(output), AutoTokenizer.from_pretrained(base)
    assert tokenizer(TEXTS[0]).input_ids == own(TEXTS[0]).input_ids and tokenizer.chat_template == own.chat_template
    assert [path.name for path in output.parent.iterdir()] == ["merged"]
    model, _ = load(str(output), device="cpu", quantize=False)
    torch.testing.assert_close(logits(model).double(), logits_with(model.config, truth), atol=1e-5, rtol=0)


@all_cases
def test_an_adapter_of_the_head(tmp_path, tied):
    """A tied head that has learned is no longer the embedding."""
    base = tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    with pytest.warns(UserWarning, match="embedding layers"):
        adapter = make_adapter(tmp_path / "adapter", base, targets=["q_proj", "lm_head"])
    model, _ = load_adapter(str(adapter), device="cpu")
    exported = read_merged(merge(adapter, tmp_path / "merged", dtype="fp32", device="cpu"))
    assert not exported.config.tie_word_embeddings
    torch.testing.assert_close(logits(exported), logits(model), atol=1e-5, rtol=0)


def test_a_tied_model_may_hold_either_or_both(cases, tmp_path):
    """As transformers loads it: tied to the one that is there; apart where both are there and differ."""
    base, adapter, _, _ = cases("llama", True)
    weights = load_file(base / "model.safetensors")
    embedding = weights.pop("model.embed_tokens.weight")
    for n, (ties, held) in enumerate([
        (True, {"lm_head.weight": embedding}),
        (True, {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding.clone()}),
        (False, {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding * 2}),
    ]):  # fmt: skip
        folder = shutil.copytree(base, tmp_path / f"base{n}")
        save_file(weights | held, folder / "model.safetensors", {"format": "pt"})
        expected, _ = load_adapter(str(adapter), model=str(folder), device="cpu")
        exported = read_merged(merge(adapter, tmp_path / f"m{n}", model=str(folder), dtype="fp32", device="cpu"))
        assert exported.config.tie_word_embeddings == ties
        torch.testing.assert_close(logits(exported), logits(expected), atol=1e-5, rtol=0)


def test_a_base_that_is_stored_in_4_bits(cases, tmp_path):
    base, adapter, _, truth = cases("qwen2")
    model, tokenizer = load(str(base), device="cpu")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    output = merge(adapter, tmp_path / "merged", model=str(tmp_path / "base"), dtype="fp32", device="cpu")
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    for name, weight in load_file(output / "model.safetensors").items():
        torch.testing.assert_close(weight.double(), truth[name], atol=1e-6, rtol=1e-6)


def test_an_adapter_of_a_dense_base(cases, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", cases()[0], quantize=False)
    model = add_lora(load(str(cases()[0]), device="cpu", quantize=False)[0], rank=4, alpha=6)
    truth = true_weights(fill(model))
    output = merge(adapter, tmp_path / "merged", dtype="fp32", device="cpu", quantize=False)
    for name, weight in load_file(output / "model.safetensors").items():
        torch.testing.assert_close(weight.double(), truth[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("said", [True, False])
def test_the_base_is_quantized_from_the_dtype_of_the_run(cases, tmp_path, said):
    """A base in fp32 that was trained in bf16 was rounded before it was quantized."""
    adapter = make_adapter(tmp_path / "adapter", cases()[0], dtype="bf16")
    truths = {d: true_weights(load_adapter(str(adapter), device="cpu", dtype=d)[0]) for d in ("bf16", "fp32")}
    name = "model.layers.0.mlp.up_proj.weight"
    assert (truths["bf16"][name] - truths["fp32"][name]).abs().max() > 1e-3
    if said:
        (tmp_path / "metrics.json").write_text('{"dtype": "bfloat16"}')
    output = merge(adapter, tmp_path / "merged", dtype="fp32", device="cpu")
    weight = load_file(output / "model.safetensors")[name]
    torch.testing.assert_close(weight.double(), truths["bf16" if said else "fp32"][name], atol=1e-6, rtol=1e-6)


def test_scales_of_other_kinds(cases, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, _ = load(str(cases()[0]), device="cpu")
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
        rank_pattern={"down_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 9},
    )  # fmt: skip
    model = fill(get_peft_model(model, config))
    model.save_pretrained(tmp_path / "adapter")
    output = merge(tmp_path / "adapter", tmp_path / "merged", dtype="fp32", device="cpu")
    for name, weight in load_file(output / "model.safetensors").items():
        torch.testing.assert_close(weight.double(), true_weights(model)[name], atol=1e-6, rtol=1e-6)


# --- refusals


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder, change):
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "{f} holds no adapter: it has no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot read the adapter {f}: .*; save it anew"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "{f} has no adapter_model.safetensors: pickle"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 20), "cannot read the adapter {f}: "),
        (lambda f: change_config(f, use_dora=True), r"{f} is no plain LoRA adapter \(use_dora\): merge it with peft"),
        (lambda f: change_config(f, a_new_one={"x": 1}), r"no plain LoRA adapter \(a_new_one\)"),
        (lambda f: change_config(f, modules_to_save=["lm_head"]), r"\(modules_to_save\)"),
        (lambda f: change_config(f, bias="all"), r"\(bias all\)"),
        (lambda f: change_config(f, init_lora_weights="pissa"), r"\(init_lora_weights pissa\)"),
        (lambda f: change_config(f, peft_type="LOHA"), r"\(peft_type LOHA\)"),
        (lambda f: change_config(f, base_model_name_or_path=None), "names no base model: name it with model"),
        (lambda f: change_config(f, base_model_name_or_path="mistral-7b"), "trained on random weights of mistral-7b"),
        (lambda f: change_config(f, base_model_name_or_path="nosuch"), "model 'nosuch' is no folder, hub id"),
        (lambda f: change_weights(f, lambda w: w.pop(f"{Q}.lora_A.weight")), "holds half of the adapter of .*q_proj"),
        (
            lambda f: change_weights(f, lambda w: w.update({f"{Q}.lora_magnitude_vector": torch.ones(64)})),
            "holds .*magnitude.*, which is no LoRA matrix",
        ),
        (
            lambda f: change_weights(f, lambda w: w[f"{Q}.lora_B.weight"].fill_(math.nan)),
            "model.layers.0.self_attn.q_proj.weight has numbers beyond the range of torch.bfloat16, or none",
        ),
    ],
)  # fmt: skip
def test_a_damaged_adapter(cases, tmp_path, damage, message):
    folder = shutil.copytree(cases()[1], tmp_path / "adapter")
    damage(folder)
    check_refused(message.format(f=folder), merge, folder, tmp_path / "merged", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def to_index(folder):
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 20), "cannot read the weights of {f}: .*; download"),
        (to_index, "{f} has no model-00001-of-00001.safetensors, which its index names: download it anew"),
        (lambda f: drop(f, "model.norm.weight"), "{f} lacks the weight model.norm.weight: download"),
        (
            lambda f: change_base(f, intermediate_size=64),
            r"model.layers.0.mlp.gate_proj.weight is \(128, 64\), by its config.json \(64, 64\)",
        ),
    ],
)  # fmt: skip
def test_a_damaged_base(cases, tmp_path, damage, message):
    folder = shutil.copytree(cases()[0], tmp_path / "base")
    damage(folder)
    check_refused(message.format(f=folder), merge, cases()[1], tmp_path / "m", model=str(folder), device="cpu")


def test_a_wrong_base(cases, tmp_path):
    small, deep = cases()[0], tmp_path / "deep"
    adapter = make_adapter(tmp_path / "adapter", tiny_model(deep, num_hidden_layers=3))
    message = r"adapter .* does not fit .*/base: it changes model.layers.2.* which there is absent; name its base"
    check_refused(message, merge, adapter, tmp_path / "m", model=str(small), device="cpu")
    other = tiny_model(tmp_path / "wide", hidden_size=128, head_dim=32)
    message = r"does not fit .*/wide: it changes .* of shape \(64, .*\), which there is \(128, .*\)"
    check_refused(message, merge, cases()[1], tmp_path / "m", model=str(other), device="cpu")


def test_bad_arguments(cases, tmp_path):
    base, adapter, _, _ = cases()
    (tmp_path / "there").mkdir()
    check_refused("dtype 'int8' is unknown: use bf16, fp16, fp32", merge, adapter, tmp_path / "m", dtype="int8")
    check_refused("m.gguf names a GGUF file, and a merged model is a folder: add --to", merge, adapter, "m.gguf")
    check_refused("GGUF type 'q4_k' is unknown: use f16, q8_0", to_gguf, adapter, tmp_path / "m", type="q4_k")
    check_refused("there exists already: name another", merge, adapter, tmp_path / "there", device="cpu")
    check_refused("there exists already: name another", to_gguf, adapter, tmp_path / "there", device="cpu")
    check_refused(f"{base} holds no adapter", merge, base, tmp_path / "m")
    check_refused("device 'tpu' is unknown", merge, adapter, tmp_path / "m", device="tpu")


def test_a_weight_beyond_fp16(cases, tmp_path):
    folder = shutil.copytree(cases()[0], tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = r"lm_head.weight has numbers beyond the range of torch.float16.*use another dtype"
    check_refused(message, to_gguf, cases()[1], tmp_path / "m", model=str(folder), device="cpu")
    check_refused(message, merge, cases()[1], tmp_path / "m", model=str(folder), dtype="fp16", device="cpu")
    assert merge(cases()[1], tmp_path / "m", model=str(folder), device="cpu").is_dir()


@pytest.mark.parametrize("call", [merge, to_gguf])
def test_too_little_disk(cases, tmp_path, monkeypatch, call):
    output = call(cases()[1], tmp_path / "fits", device="cpu")
    size = sum(p.stat().st_size for p in (output, *output.rglob("*")) if p.is_file())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = r"m needs ([\d,]+) bytes and the disk has 1,000 left: free some"
    with pytest.raises(FastkitError, match=message) as caught:
        call(cases()[1], tmp_path / "m", device="cpu")
    needs = int(str(caught.value).split(" needs ")[1].split()[0].replace(",", ""))
    assert 0.8 * size < needs < size  # the rest are names and the tokenizer
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    check_refused(r"the disk is full: .*m needs [\d,]+ bytes; nothing is left", call, cases()[1], tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["fits"]


# --- memory


class Peak:
    """Bytes of memory of its own (not of files that are mapped) that this process takes within, beyond those before."""

    def __enter__(self):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be taken again unseen
        self.bytes, self.before, self.ends = 0, self.now(), False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ends = True
        self.thread.join()

    @staticmethod
    def now() -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared

    def watch(self):
        while not self.ends:
            self.bytes = max(self.bytes, self.now() - self.before)
            time.sleep(0.002)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts memory as Linux and glibc do")
def test_never_the_whole_model_in_memory(cases, tmp_path):
    base = tiny_model(tmp_path / "base", hidden_size=256, intermediate_size=1024, num_hidden_layers=24, head_dim=64)
    bpe_tokenizer().save_pretrained(base)
    adapter = make_adapter(tmp_path / "adapter", base, rank=2, quantize=False)
    in_bf16 = 2 * sum(weight.numel() for weight in load_file(base / "model.safetensors").values())
    merge(cases()[1], tmp_path / "warm", device="cpu")  # what is imported on the way
    to_gguf(cases()[1], tmp_path / "warm.gguf", device="cpu")
    with Peak() as merging:
        merge(adapter, tmp_path / "merged", device="cpu", shard_size="4MB")
    with Peak() as f16:
        to_gguf(adapter, tmp_path / "f16.gguf", device="cpu", quantize=False)
    with Peak() as q8_0:
        to_gguf(tmp_path / "merged", tmp_path / "q8_0.gguf", type="q8_0")
    for peak in (merging, f16, q8_0):
        assert peak.bytes < in_bf16 / 2, f"{peak.bytes:,} of {in_bf16:,}"
    with Peak() as whole:  # one file holds the model: the meter sees it
        merge(adapter, tmp_path / "whole", device="cpu", quantize=False)
    assert whole.bytes > 0.9 * in_bf16, f"{whole.bytes:,} of {in_bf16:,}"


# --- the command line


def test_the_command(cases, tmp_path, capsys):
    adapter = str(cases()[1])
    flags = ["export", "--adapter", adapter, "--device", "cpu", "--output"]
    assert main([*flags, str(tmp_path / "merged")]) == 0
    assert f"merged: {tmp_path}/merged, " in capsys.readouterr().out
    assert main([*flags, str(tmp_path / "m.gguf"), "--to", "gguf", "--type", "q8_0"]) == 0
    assert f"gguf: {tmp_path}/m.gguf, " in capsys.readouterr().out
    assert logits(read_gguf(tmp_path / "m.gguf")).shape == (*IDS.shape, 300)
    assert main([*flags, str(tmp_path / "merged")]) == 2
    assert "exists already" in capsys.readouterr().err
