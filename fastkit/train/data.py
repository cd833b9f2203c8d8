"""Records to batches: tokenize with exact label masks, pad, describe.

    train, validation = load_splits("gpu-instructions")
    tokens = tokenize_records(train, tokenizer, max_length=1024)
    batch = Collator(tokenizer.pad_token_id)([tokens[0], tokens[1]])

Reading is in `sources` and `records`, the masks are in `masks`; their public names are here too.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from fastkit.errors import FastkitError
from fastkit.models.chat import PLAIN_TEMPLATE, plain_prompt
from fastkit.train.masks import IGNORE, Encoder
from fastkit.train.records import find_form, normalize_record
from fastkit.train.sources import count_duplicates, has_split, load_records, load_splits, split_dataset

__all__ = [
    "IGNORE",
    "PLAIN_TEMPLATE",
    "Collator",
    "count_answers",
    "count_duplicates",
    "describe",
    "has_split",
    "load_records",
    "load_splits",
    "plain_prompt",
    "split_dataset",
    "tokenize_records",
]

_VERSION = 1  # raise it when the same records would give other tokens: older caches are then not read
_SMALL = 2**28  # bytes of records up to which the result stays in memory
_FEATURES = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
_COUNTS = {"_length": Value("int32"), "_first": Value("int32")}


def tokenize_records(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_long: str = "truncate",
    context: int | None = None,
) -> Dataset:
    """Token ids and labels of every record: columns `input_ids` and `labels` (lists of int32, one length, no padding),
    and `fact` where `dataset` has it.

    dataset: from `load_records`, or any Dataset with the columns of an accepted form.
    labels: -100 except on the assistant turns (or the completion) and the token that ends each; in a `text` record
        every token. The last trained token of a record that was not cut is EOS, once.
    max_length: most tokens of a record, BOS and EOS included. on_long: what happens to a longer one: "truncate" cuts
        its end, "drop" leaves it out, "error" raises with its row and length.
    context: the model's; a larger max_length raises.
    A record in which cutting leaves no trained token is left out. One warning counts all that was cut or left out.
    Without a chat template, messages are written with PLAIN_TEMPLATE, and a warning says so.
    Up to 256 MB of records the result is in memory and nothing is cached; above, it is cached under
    `datasets.config.HF_DATASETS_CACHE`/fastkit by a hash of records, tokenizer, template and arguments.
    Raises FastkitError for bad arguments and records, and if nothing is left to train on.
    """
    if on_long not in ("truncate", "drop", "error"):
        raise FastkitError(f"on_long {on_long!r} is unknown; choose truncate, drop or error")
    if not isinstance(max_length, int) or max_length < 2:
        raise FastkitError(f"max_length {max_length!r} leaves no room for a prompt and an answer; give 2 or more")
    if context is not None and max_length > context:
        raise FastkitError(
            f"max_length {max_length} is more than the model's context of {context} tokens; give {context} or less"
        )
    if not len(dataset):
        raise FastkitError("the dataset has 0 records; load some")
    form = find_form(dataset.column_names, "the dataset")
    encode = Encoder(tokenizer)
    if encode.plain and form not in ("prompt", "text"):
        warnings.warn(
            "the tokenizer has no chat template: messages are written as '### User:' and '### Assistant:' blocks "
            "(fastkit.train.data.PLAIN_TEMPLATE); prompt the tuned model the same way",
            stacklevel=2,
        )
    keep_fact = "fact" in dataset.column_names

    def tokenize(record: dict, row: int) -> dict:
        where = f"row {row}"
        ids, labels = encode(normalize_record(record, form, where), where)
        if on_long == "error" and len(ids) > max_length:
            raise FastkitError(
                f"{where}: {len(ids)} tokens, more than max_length {max_length}; raise it, or choose truncate or drop"
            )
        first = next((n for n, label in enumerate(labels) if label != IGNORE), -1)
        out = {"input_ids": ids[:max_length], "labels": labels[:max_length], "_length": len(ids), "_first": first}
        return {**out, "fact": record["fact"]} if keep_fact else out

    fingerprint = Hasher.hash(
        [_VERSION, dataset._fingerprint, form, max_length, on_long, encode.template, _state(tokenizer)]
    )
    cache = {"keep_in_memory": True, "load_from_cache_file": False}
    if dataset.data.nbytes > _SMALL:
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "fastkit"
        folder.mkdir(parents=True, exist_ok=True)
        cache = {"cache_file_name": str(folder / f"{fingerprint}.arrow"), "load_from_cache_file": True}
    tokens = dataset.with_format(None).map(
        tokenize,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features({**_FEATURES, **_COUNTS, **({"fact": Value("string")} if keep_fact else {})}),
        new_fingerprint=fingerprint,
        desc="Tokenizing",
        **cache,
    )
    return _leave_out(tokens, max_length, on_long)


def _leave_out(tokens: Dataset, max_length: int, on_long: str) -> Dataset:
    """Drop the records that teach nothing, and say in one warning what was cut and dropped."""
    lengths, firsts = tokens["_length"][:], tokens["_first"][:]
    tokens, total = tokens.remove_columns(list(_COUNTS)), len(tokens)
    long = [length > max_length for length in lengths]
    bare = [not 0 <= first < max_length for first in firsts]
    out = [(is_long and on_long == "drop") or is_bare for is_long, is_bare in zip(long, bare, strict=True)]
    if all(out):
        if on_long == "drop" and all(long):
            why, need = "are longer than", min(lengths)
            remedy = f"the shortest has {need}: raise max_length, or choose truncate"
        else:
            why, need = "have no trained token within", min((n for n in firsts if n >= 0), default=0) + 1
            remedy = f"the first answer starts at token {need}: raise max_length above that, or shorten the prompts"
        raise FastkitError(f"all {total} records {why} max_length {max_length}; {remedy}")
    if any(out) or any(long):
        says = []
        if any(long):
            done = {"truncate": "cut", "drop": "left out"}[on_long]
            says.append(f"{sum(long)} of {total} records are longer than max_length {max_length} and were {done}")
        lost = sum(is_bare and not (is_long and on_long == "drop") for is_long, is_bare in zip(long, bare, strict=True))
        if lost:
            says.append(f"{lost} of {total} records have no trained token within max_length and were left out")
        warnings.warn("; ".join(says), stacklevel=3)
    if any(out):
        tokens = tokens.select([n for n, is_out in enumerate(out) if not is_out], keep_in_memory=True)
    return tokens


def _state(tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides a tokenizer's output, as text; not its padding and truncation, which every call may change."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("padding"), backend.pop("truncation")
    return json.dumps([backend, tokenizer.special_tokens_map], default=str)


class Collator:
    """Tokenized records -> one batch, padded on the right to its longest.

    pad_token_id: fills input_ids; it may be the EOS id, since nothing is told apart by it. pad_to_multiple_of: the
    width is rounded up to it (8 or more suits tensor cores).
    The call takes a list of {input_ids, labels} and returns LongTensors of shape (records, width): `input_ids`,
    `attention_mask` (1 on the record's own tokens, by its length) and `labels` (-100 on padding). Other keys are left
    out. With them go two that spare the model the logits of columns in which no record has a target (with SmolLM2's
    49,152 words the head is a fifth of the arithmetic): `logits_to_keep`, the columns that are left, and `shift_labels`
    (records, columns), the label of each one's next token; transformers' models take both.

    Raises FastkitError for a tokenizer without a pad token, and for labels of another length than input_ids.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None):
        if pad_token_id is None:
            raise FastkitError("pad_token_id is None; pass tokenizer.eos_token_id where the tokenizer has no pad token")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise FastkitError(f"pad_to_multiple_of {pad_to_multiple_of} is less than 1; try 8, or None")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, records: Sequence[dict]) -> dict[str, torch.Tensor]:
        step = self.pad_to_multiple_of
        width = -(-max(len(record["input_ids"]) for record in records) // step) * step
        shape = (len(records), width)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE, dtype=torch.long)
        for n, record in enumerate(records):
            length = len(record["input_ids"])
            if len(record["labels"]) != length:
                raise FastkitError(f"{len(record['labels'])} labels for {length} tokens; tokenize the record again")
            input_ids[n, :length] = torch.as_tensor(record["input_ids"])
            attention_mask[n, :length] = 1
            labels[n, :length] = torch.as_tensor(record["labels"])
        next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        columns = (next_labels != IGNORE).any(0).nonzero().squeeze(1)
        columns = columns if len(columns) else torch.zeros(1, dtype=torch.long)  # no model is asked for no logits
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "logits_to_keep": columns,
            "shift_labels": next_labels[:, columns],
        }


def count_answers(dataset: Dataset) -> int:
    """How many stretches of trained tokens a tokenized dataset has: one an answer, and one a plain text."""
    labels = dataset.with_format(None)["labels"]
    return sum(a == IGNORE != b for row in labels for a, b in zip([IGNORE, *row], row, strict=False))


def describe(dataset: Dataset) -> dict[str, int]:
    """Counts of a tokenized dataset: `records`, `tokens`, `target_tokens` (trained ones) and `longest` (in tokens).

    Raises FastkitError if the dataset is not tokenized.
    """
    if "labels" not in dataset.column_names:
        seen = ", ".join(dataset.column_names)
        raise FastkitError(f"no labels among the columns {seen}; call tokenize_records first")
    counts = {"records": len(dataset), "tokens": 0, "target_tokens": 0, "longest": 0}
    for row in dataset.with_format(None).select_columns("labels"):
        counts["tokens"] += len(row["labels"])
        counts["target_tokens"] += sum(label != IGNORE for label in row["labels"])
        counts["longest"] = max(counts["longest"], len(row["labels"]))
    return counts
