"""A model and a data set so small that a fine-tune of both takes seconds."""

import json
from pathlib import Path

import torch

from fastkit.models.random_weights import byte_tokenizer

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
SHAPE = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)


def tiny_model(folder: Path, arch: str = "llama", **changes) -> Path:
    """Save a random model of `arch` (safetensors, fp32) and a byte tokenizer to `folder`; `changes` are to SHAPE."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **{**SHAPE, **ids, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms of one and biases of zero would hide a mistake
                    parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_data(folder: Path, records: int = 16) -> Path:
    """Write `records` conversations to train.jsonl and a quarter as many to validation.jsonl in `folder`.

    Every other validation record carries a `fact`, which its answer states.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.jsonl", [_record(f"What is {n} and {n}?", f"It is {2 * n}.") for n in range(records)])
    validation = [_record(f"Add {n} to {n}.", f"That is {2 * n}.") for n in range(max(2, records // 4))]
    for n, record in list(enumerate(validation))[::2]:
        record["fact"] = str(2 * n)
    _write(folder / "validation.jsonl", validation)
    return folder


def _record(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
