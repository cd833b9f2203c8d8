"""The tokenizer of a GGUF file, from the `tokenizer.json` of Hugging Face's tokenizers."""

import json
from pathlib import Path

import gguf

from fastkit.errors import FastkitError
from fastkit.train.merged_weights import Merged

_CONTRACTIONS, _REST = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# How text is cut before merging, and llama.cpp's name for it
SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,): "llama-bpe",
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,): "qwen2",
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
        + _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1),
    ): "tekken",
}


def add_tokenizer(writer: gguf.GGUFWriter, merged: Merged, scratch: Path) -> None:
    """Add vocabulary, merges, special tokens and chat template to `writer`; `scratch` is a folder to write into.

    Raises FastkitError for a tokenizer that is no byte-level BPE (as GPT-2's, Llama 3's, Qwen's) nor SentencePiece's
    BPE (as Llama 2's, Mistral's), cuts text in a way that llama.cpp has no name for, or has more tokens than the model.
    """
    tokenizer = merged.tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise FastkitError(f"the tokenizer of {merged.base} has no tokenizer.json: GGUF is written from one")
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    if layout["model"]["type"] != "BPE":
        raise FastkitError(
            f"the tokenizer of {merged.base} is of type {layout['model']['type']}: GGUF export takes BPE"
        )
    if not layout["model"]["merges"]:
        raise FastkitError(f"the tokenizer of {merged.base} merges nothing: llama.cpp reads no such tokenizer")
    sentencepiece = layout["model"].get("byte_fallback", False)
    tokens, types = _tokens(tokenizer, layout, merged)
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else _split(layout, merged.base))
    writer.add_token_list(tokens)
    if sentencepiece:
        writer.add_token_scores(_scores(tokens, layout))
        writer.add_add_space_prefix(tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0] != "a")
    writer.add_token_types(types)
    merged.save_about(scratch)
    special = gguf.SpecialVocab(scratch, load_merges=True, n_vocab=len(tokens))
    ids = tokenizer("a").input_ids  # what it does, whichever of its settings says so
    special.add_special_token = {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}
    special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer, layout: dict, merged: Merged) -> tuple[list[str], list[int]]:
    """(tokens, their types) for all rows of the embedding, those beyond the tokenizer's being named and unused."""
    rows, vocabulary = merged.config.vocab_size, tokenizer.get_vocab()
    if vocabulary and max(vocabulary.values()) >= rows:
        raise FastkitError(
            f"the tokenizer has ids up to {max(vocabulary.values())} but {merged.base} only {rows} tokens: use its own"
        )
    tokens, types = [f"[PAD{n}]" for n in range(rows)], [gguf.TokenType.UNUSED] * rows
    for token, n in vocabulary.items():
        tokens[n], types[n] = token, gguf.TokenType.NORMAL
        if layout["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            types[n] = gguf.TokenType.BYTE
    for token in layout["added_tokens"]:
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    if (unknown := vocabulary.get(layout["model"].get("unk_token"))) is not None:
        types[unknown] = gguf.TokenType.UNKNOWN
    return tokens, types


def _scores(tokens: list[str], layout: dict) -> list[float]:
    """SentencePiece merges what scores highest first: the order of the merges, as scores of what they make."""
    order = {}
    for n, pair in enumerate(layout["model"]["merges"]):
        order.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), -float(n))
    return [order.get(token, -float(len(order))) for token in tokens]


def _split(layout: dict, base: str) -> str:
    before = layout["pre_tokenizer"] or {}
    steps = []
    for step in before.get("pretokenizers", [before]):
        if step.get("type") == "Split":
            steps.append(step["pattern"].get("Regex"))
        elif step.get("type") == "ByteLevel":
            steps += ["ByteLevel"] * step.get("use_regex", True)
        else:
            steps.append(step.get("type"))
    if (name := SPLITS.get(tuple(steps))) is None:
        raise FastkitError(
            f"the tokenizer of {base} cuts text by {steps}, for which GGUF has no name: export it merged"
        )
    return name
