"""Exports read back by stock transformers give the logits of base plus adapter; what a GGUF says of its model."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from export_case import (
    TEXTS,
    bpe_tokenizer,
    change_base,
    check_refused,
    fast,
    logits_with,
    make_cases,
    read_gguf,
    read_merged,
    sentencepiece_tokenizer,
)
from probe import logits
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, tiny_model
from tolerance import assert_as_close_as_torch

from fastkit.train.export import merge
from fastkit.train.gguf_file import to_gguf
from fastkit.train.gguf_tokenizer import SPLITS

try:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import set_split_regex
except ImportError:
    set_split_regex = None  # transformers that reads a tokenizer's vocabulary from a GGUF and forgets how text is cut


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return make_cases(tmp_path_factory.mktemp("export"))


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A true weight as the export may have it."""
    if kind == "bf16":
        return weight.bfloat16().double()
    if weight.dim() == 1:
        return weight.float().double()
    if kind == "f16":
        return weight.half().double()
    quantized = gguf.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    return torch.from_numpy(gguf.dequantize(quantized, gguf.GGMLQuantizationType.Q8_0)).double()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_an_export_has_the_logits_of_base_plus_adapter(cases, tmp_path, arch, tied, kind):
    _, adapter, model, truth = cases(arch, tied)
    true_logits = logits_with(model.config, truth)
    torch.testing.assert_close(logits(model).double(), true_logits, atol=1e-5, rtol=0)
    if kind == "bf16":
        exported = read_merged(merge(adapter, tmp_path / "merged", device="cpu"))
    else:
        exported = read_gguf(to_gguf(adapter, tmp_path / "model.gguf", type=kind, device="cpu"))
    assert exported.config.tie_word_embeddings == tied
    theirs = {name: rounded(weight, kind) for name, weight in truth.items()}
    for name, weight in exported.state_dict().items():
        assert_as_close_as_torch(weight, theirs[name].float(), truth[name], name)
    assert_as_close_as_torch(
        logits(exported), logits_with(model.config, theirs).float(), true_logits, scale=true_logits.abs().max()
    )
    if kind == "bf16":  # and a file from the merged folder, which is rounded already
        again = read_gguf(to_gguf(tmp_path / "merged", tmp_path / "again.gguf"))
        torch.testing.assert_close(logits(again), logits(exported), atol=2e-3, rtol=0)


# --- GGUF


def field(reader, name):
    return reader.fields[name].contents()


def test_what_a_gguf_says(cases, tmp_path):
    _, adapter, _, _ = cases("mistral")
    file = to_gguf(adapter, tmp_path / "new" / "model.gguf", type="q8_0", device="cpu")
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]
    reader = gguf.GGUFReader(file)
    said = {
        "general.architecture": "llama", "general.type": "model", "general.name": "base", "general.file_type": 7,
        "llama.context_length": 512, "llama.embedding_length": 64, "llama.block_count": 2, "llama.vocab_size": 300,
        "llama.feed_forward_length": 128, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16, "llama.attention.value_length": 16, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5e4, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }  # fmt: skip
    assert {name: field(reader, name) for name in said} == said
    assert field(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert len(field(reader, "tokenizer.ggml.merges")) > 30
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert (len(tokens), tokens[1], tokens[299]) == (300, "<|im_start|>", "[PAD299]")
    assert (types[1], types[10], types[299]) == (3, 1, 5)  # control, normal, unused
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert len(kinds) == 3 + 2 * 9
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q8_0"}


def test_rows_that_q8_0_does_not_fit_are_f16(tmp_path):
    base = tiny_model(tmp_path / "base", intermediate_size=144)
    bpe_tokenizer().save_pretrained(base)
    reader = gguf.GGUFReader(to_gguf(base, tmp_path / "model.gguf", type="q8_0"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


def test_biases_and_llama_3s_rope(tmp_path):
    """transformers reads neither from a GGUF's metadata: it is told."""
    from transformers import AutoConfig

    rope = dict(
        rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )  # fmt: skip
    base = tiny_model(tmp_path / "base", attention_bias=True, mlp_bias=True, rope_parameters=rope)
    bpe_tokenizer().save_pretrained(base)
    file = to_gguf(base, tmp_path / "model.gguf")
    expected = read_merged(base)
    exported = read_gguf(file, config=AutoConfig.from_pretrained(base))
    torch.testing.assert_close(logits(exported), logits(expected), atol=2e-3, rtol=0)
    (factors,) = (tensor.data for tensor in gguf.GGUFReader(file).tensors if tensor.name == "rope_freqs.weight")
    # each frequency by its wavelength: short ones stay, long ones are slowed by `factor`, between them a ramp
    wavelength = 2 * np.pi * 1e4 ** (np.arange(0, 16, 2) / 16)
    smooth = np.clip((64 / wavelength - 1) / (4 - 1), 0, 1)
    np.testing.assert_allclose(factors, 1 / ((1 - smooth) / 8 + smooth), rtol=1e-5)


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32},
            {"type": "yarn", "factor": 4.0, "original_context_length": 128},
        ),
    ],
)
def test_scaled_rope(tmp_path, rope, said):
    base = tiny_model(tmp_path / "base", "qwen2", rope_parameters={"rope_theta": 1e4, **rope})
    bpe_tokenizer().save_pretrained(base)
    reader = gguf.GGUFReader(to_gguf(base, tmp_path / "model.gguf"))
    assert {name: field(reader, f"qwen2.rope.scaling.{name}") for name in said} == said


def test_what_gguf_cannot_say(cases, tmp_path):
    folder, file = cases()[0], tmp_path / "m.gguf"
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for changes, message in (
        ({"rope_parameters": dynamic}, "RoPE scaled by dynamic has no place in GGUF: export it merged"),
        (
            {"rope_parameters": {**dynamic, "rope_type": "yarn", "attention_factor": 0.5}},
            "RoPE scaled by yarn, attention_factor 0.5 has no place",
        ),
        ({"hidden_act": "gelu"}, "computes gelu in its MLP: llama.cpp knows silu"),
        ({"vocab_size": 300}, None),
    ):
        base = shutil.copytree(folder, tmp_path / "base", dirs_exist_ok=True)
        change_base(base, **changes)
        if message:
            check_refused(message, to_gguf, base, file)
    from fastkit.models.random_weights import byte_tokenizer

    byte_tokenizer().save_pretrained(base)
    check_refused("merges nothing: llama.cpp reads no such tokenizer", to_gguf, base, file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_window_is_all_the_context(tmp_path):
    base = tiny_model(tmp_path / "base", "mistral", sliding_window=64)
    bpe_tokenizer().save_pretrained(base)
    reader = gguf.GGUFReader(to_gguf(base, tmp_path / "model.gguf"))
    assert field(reader, "llama.context_length") == 64


@pytest.mark.parametrize("split", [*SPLITS.values(), "sentencepiece"])
def test_tokenizers(tmp_path, split):
    from transformers import AutoTokenizer

    base = tiny_model(tmp_path / "base")
    tokenizer = sentencepiece_tokenizer() if split == "sentencepiece" else bpe_tokenizer(split)
    tokenizer.save_pretrained(base)
    file = to_gguf(base, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(file)
    if split == "sentencepiece":
        assert field(reader, "tokenizer.ggml.model") == "llama"
        assert field(reader, "tokenizer.ggml.add_bos_token") and field(reader, "tokenizer.ggml.add_space_prefix")
        tokens, scores = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.scores")
        score = dict(zip(tokens, scores, strict=True))
        assert score["lo"] > score["▁a"] > score["retu"] > score["H"]
        types = dict(zip(tokens, field(reader, "tokenizer.ggml.token_type"), strict=True))
        assert [types[t] for t in ("<unk>", "<|im_start|>", "<0x0A>", "lo")] == [2, 3, 6, 1]
    else:
        assert field(reader, "tokenizer.ggml.pre") == split
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    assert field(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in layout["model"]["merges"]]
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert {tokens[n]: n for n in range(len(tokenizer))} == tokenizer.get_vocab()
    if set_split_regex and split != "smollm":  # of which transformers does not read that it cuts between digits
        again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
        # after a special token llama.cpp puts a space, as Llama 2's own tokenizer.json does, and transformers here none
        for text in TEXTS[:1] if split == "sentencepiece" else TEXTS:
            assert again(text).input_ids == tokenizer(text).input_ids, text
        assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_tokenizers_that_gguf_has_no_name_for(cases, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    base = shutil.copytree(cases()[0], tmp_path / "base")
    odd = bpe_tokenizer()
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast(Tokenizer(models.WordLevel({"<|im_start|>": 0, "<|im_end|>": 1}, "a")))
    for tokenizer, message in (
        (odd, r"cuts text by \['Whitespace'\], for which GGUF has no name: export it merged"),
        (
            fast(Tokenizer(models.Unigram([("<|im_start|>", 0.0), ("<|im_end|>", 0.0)], 0))),
            "is of type Unigram: .* BPE",
        ),
    ):
        tokenizer.save_pretrained(base)
        check_refused(message, to_gguf, base, tmp_path / "m.gguf")
    change_base(base, vocab_size=200)
    bpe_tokenizer().save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:200].clone()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    check_refused(r"the tokenizer has ids up to 298 but .* only 200 tokens", to_gguf, base, tmp_path / "m.gguf")
