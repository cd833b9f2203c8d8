"""What the tests of exports share: tokenizers, adapters that change a lot, and what their models truly multiply by."""

import functools
import json

import pytest
import torch
from probe import logits
from tiny import tiny_model

from fastkit.errors import FastkitError
from fastkit.models import add_lora, load, load_adapter
from fastkit.models.bnb import bnb
from fastkit.train.gguf_tokenizer import SPLITS

TEXTS = (
    "Hello, wörld! It's 12345 o'clock.\n\n  def f(x):\treturn x**2",
    "<|im_start|>user\nHi<|im_end|>\n",
    " a  b",
    "日本",
)


def bpe_tokenizer(split: str = "gpt-2"):
    """A byte-level BPE with merges, of 299 tokens, that cuts text as `split` says."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    (steps,) = (steps for steps, name in SPLITS.items() if name == split)
    made = {
        "ByteLevel": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "Digits": pre_tokenizers.Digits(individual_digits=True),
    }
    cuts = [made.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    if "ByteLevel" not in steps:
        cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts) if len(cuts) > 1 else cuts[0]
    trainer = trainers.BpeTrainer(
        vocab_size=299,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([__doc__, *TEXTS] * 3, trainer)
    return fast(tokenizer)


def sentencepiece_tokenizer():
    """A BPE as Llama 2's: a space before the text, bytes for what is unknown, BOS first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = ["<unk>", "<|im_start|>", "<|im_end|>", *(f"<0x{n:02X}>" for n in range(256))]
    merges = [
        ("l", "o"),
        ("▁", "a"),
        ("H", "e"),
        ("▁", "He"),
        ("lo", "r"),
        ("▁", "▁"),
        ("t", "u"),
        ("r", "e"),
        ("re", "tu"),
    ]
    made = ["".join(pair) for pair in merges]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys([*pieces, *made, *sorted({*"▁aloHretu"})]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    return fast(tokenizer, unk_token="<unk>")


def fast(tokenizer, **tokens):
    from transformers import PreTrainedTokenizerFast

    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | tokens
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{{ messages[0]['content'] }}", **tokens)


def make_adapter(folder, base, quantize=True, dtype="auto", tokenizer=True, **settings):
    """An adapter that changes a lot, in `folder`."""
    model, its_tokenizer = load(str(base), device="cpu", quantize=quantize, dtype=dtype)
    model = add_lora(model, **({"rank": 4, "alpha": 6} | settings))
    fill(model).save_pretrained(folder)
    if tokenizer:
        its_tokenizer.save_pretrained(folder)
    return folder


def fill(model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    return model


def true_weights(model) -> dict[str, torch.Tensor]:
    """What `model`, of peft, multiplies by: fp64, by the name that the weight has without an adapter."""
    weights = {}
    for name, weight in model.get_base_model().state_dict().items():
        if ".lora_" not in name and name.endswith((".weight", ".bias")):
            weights[name.replace(".base_layer", "")] = weight.double()
    for name, module in model.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            if isinstance(module, bnb.nn.Linear4bit) and not name.endswith("base_layer"):
                weights[f"{name}.weight"] = dequantized(module)
            continue
        base = module.base_layer
        weight = dequantized(base) if isinstance(base, bnb.nn.Linear4bit) else base.weight.double()
        A, B = (side["default"].weight.detach().double() for side in (module.lora_A, module.lora_B))
        weights[f"{name}.weight"] = weight + module.scaling["default"] * B @ A
    return weights


def dequantized(layer) -> torch.Tensor:
    state = layer.weight.quant_state
    kept, state.dtype = state.dtype, torch.float32
    try:
        return bnb.functional.dequantize_4bit(layer.weight.data, state).double()
    finally:
        state.dtype = kept


def logits_with(config, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits on IDS of a model of `config` that has these weights, in fp64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config).double()
    missing, _ = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and (not missing or config.tie_word_embeddings)
    return logits(model)


def read_gguf(file, **settings):
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **settings,
    )


def read_merged(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def check_refused(message, call, *args, **settings):
    with pytest.raises(FastkitError, match=message) as caught:
        call(*args, **settings)
    assert "\n" not in str(caught.value)


def change_base(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def make_cases(root):
    """A function: of an architecture, tied or not, (base, adapter, the adapter's model, its true weights)."""

    @functools.cache
    def case(arch="llama", tied=False):
        folder = root / f"{arch}{tied:d}"
        changes = {"head_dim": 128} if arch == "qwen3" else {}  # transformers reads no other from Qwen3's GGUF
        rope = {"rope_type": "default", "rope_theta": 5e4}
        base = tiny_model(folder / "base", arch, tie_word_embeddings=tied, rope_parameters=rope, **changes)
        bpe_tokenizer("qwen2" if "qwen" in arch else "llama-bpe").save_pretrained(base)
        adapter = make_adapter(folder / "adapter", base)
        model, _ = load_adapter(str(adapter), device="cpu")
        return base, adapter, model, true_weights(model)

    return case
