"""Tokenizing a dataset: what is cut, left out and refused, caches, counts, batches. The masks: test_masks.py."""

import warnings

import datasets
import pytest
import torch
from chats import CHATML, byte_tokenizer, chat, chatml_tokenizer, run, said
from datasets import Dataset
from tiny import ARCHITECTURES

from fastkit.train import data
from fastkit.train.data import Collator, describe, tokenize_records
from fastkit.train.masks import Encoder

LONG = {"messages": chat("q" * 50, "a" * 50)}
SHORT = {"messages": chat("q", "a")}


def test_truncate():
    tokenizer = chatml_tokenizer()
    whole = run(tokenizer, SHORT, LONG)
    cut = len(whole[1]["input_ids"]) - 20
    with pytest.warns(UserWarning, match=f"^1 of 2 records are longer than max_length {cut} and were cut$"):
        short, long = run(tokenizer, SHORT, LONG, max_length=cut)
    assert short == whole[0]
    assert long == {key: value[:cut] for key, value in whole[1].items()}
    exact = len(whole[1]["input_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tokenizer, SHORT, LONG, max_length=exact) == whole


def test_nothing_left_to_train():
    tokenizer = chatml_tokenizer()
    (short,) = run(tokenizer, SHORT)
    length = len(short["input_ids"])
    with pytest.warns(
        UserWarning, match="1 of 2 records are longer .* cut; 1 of 2 records have no trained token"
    ) as caught:
        assert run(tokenizer, LONG, SHORT, max_length=length) == [short]
    assert len(caught) == 1
    first = next(n for n, label in enumerate(short["labels"]) if label != -100)
    message = said(run, tokenizer, LONG, SHORT, max_length=first)
    assert (
        f"all 2 records have no trained token within max_length {first}; the first answer starts at token {first + 1}"
        in message
    )
    with pytest.warns(UserWarning):
        assert len(run(tokenizer, LONG, SHORT, max_length=first + 1)) == 1


def test_drop_and_error():
    tokenizer = chatml_tokenizer()
    short, long = (run(tokenizer, record)[0] for record in (SHORT, LONG))
    length = len(short["input_ids"])
    with pytest.warns(UserWarning, match=f"^1 of 2 records are longer than max_length {length} and were left out$"):
        assert run(tokenizer, LONG, SHORT, max_length=length, on_long="drop") == [short]
    message = said(run, tokenizer, SHORT, LONG, max_length=length, on_long="error")
    assert message.startswith(f"row 1: {len(long['input_ids'])} tokens, more than max_length {length};")
    message = said(run, tokenizer, SHORT, LONG, max_length=9, on_long="drop")
    assert f"all 2 records are longer than max_length 9; the shortest has {length}" in message


def test_bad_arguments():
    tokenizer = chatml_tokenizer()
    message = said(run, tokenizer, SHORT, max_length=4096, context=2048)
    assert "max_length 4096 is more than the model's context of 2048 tokens" in message
    assert "on_long 'cut' is unknown; choose truncate, drop or error" in said(run, tokenizer, SHORT, on_long="cut")
    for bad in (0, 1, -5, 2.5, None):
        assert f"max_length {bad} leaves no room" in said(run, tokenizer, SHORT, max_length=bad)
    assert "0 records" in said(tokenize_records, Dataset.from_dict({"text": []}), tokenizer, 9)
    assert "no known record form among the keys 'q'" in said(run, tokenizer, {"q": "a"})
    assert "row 1: 'text' is empty" in said(run, tokenizer, {"text": "a"}, {"text": ""})


# The result


def test_columns_and_types():
    tokens = tokenize_records(
        Dataset.from_list([{"text": "a", "n": 1, "fact": f} for f in ("x", None)]), chatml_tokenizer(), 9
    )
    assert tokens.column_names == ["input_ids", "labels", "fact"]
    assert tokens["fact"][:] == ["x", None]
    assert tokens.features["input_ids"].feature.dtype == tokens.features["labels"].feature.dtype == "int32"


def test_caching(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    tokenizer, records = chatml_tokenizer(), Dataset.from_list([SHORT, LONG])
    first = tokenize_records(records, tokenizer, 500)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)  # leaves its settings in the tokenizer
    assert tokenize_records(records, tokenizer, 500)._fingerprint == first._fingerprint
    assert not list(tmp_path.rglob("*"))  # small: in memory
    monkeypatch.setattr(data, "_SMALL", 0)
    assert tokenize_records(records, tokenizer, 500).to_list() == first.to_list()
    assert len(list(tmp_path.rglob("*.arrow"))) == 1
    monkeypatch.setattr(Encoder, "__call__", None)
    assert tokenize_records(records, tokenizer, 500).to_list() == first.to_list()  # read back
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(data, "_SMALL", 0)
    for other in (
        byte_tokenizer(CHATML),
        chatml_tokenizer(CHATML.replace("kind", "good")),
        chatml_tokenizer(trim=True),
    ):
        tokenize_records(records, other, 500)
    tokenize_records(records, tokenizer, 499)
    assert len(list(tmp_path.rglob("*.arrow"))) == 5


def test_describe():
    tokenizer = chatml_tokenizer()
    tokens = tokenize_records(Dataset.from_list([SHORT, LONG]), tokenizer, 500)
    lengths = [len(row["input_ids"]) for row in tokens]
    assert describe(tokens) == {"records": 2, "tokens": sum(lengths), "target_tokens": 2 + 51, "longest": max(lengths)}
    assert "no labels among the columns text; call tokenize_records" in said(
        describe, Dataset.from_dict({"text": ["a"]})
    )


# Batches


def test_collator_pads_right_and_masks_by_length():
    eos = 2  # also the pad token: an EOS of the record's own is attended to and trained
    rows = [
        {"input_ids": [5, 6, eos], "labels": [-100, 6, eos], "fact": "x"},
        {"input_ids": [7, eos, 8, eos, 9], "labels": [7] * 5},
    ]
    batch = Collator(pad_token_id=eos)(rows)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, eos, eos, eos], [7, eos, 8, eos, 9]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "labels": [[-100, 6, eos, -100, -100], [7, 7, 7, 7, 7]],
        "logits_to_keep": [0, 1, 2, 3],
        "shift_labels": [[6, eos, -100, -100], [7, 7, 7, 7]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}
    for multiple, width in ((1, 5), (4, 8), (5, 5), (8, 8)):
        padded = Collator(eos, pad_to_multiple_of=multiple)(rows)
        assert all(padded[key].shape == (2, width) for key in ("input_ids", "attention_mask", "labels"))
        assert padded["logits_to_keep"].tolist() == [0, 1, 2, 3]
        assert padded["attention_mask"].sum(1).tolist() == [3, 5]
        assert (padded["labels"][:, 5:] == -100).all()


def test_collator_takes_a_tokenized_dataset():
    tokenizer = chatml_tokenizer()
    tokens = tokenize_records(Dataset.from_list([SHORT, LONG]), tokenizer, 500)
    batch = Collator(tokenizer.pad_token_id, 8)([tokens[0], tokens[1]])
    assert batch["input_ids"].shape[1] % 8 == 0
    assert (batch["labels"] != -100).sum() == describe(tokens)["target_tokens"]
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in tokens]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_loss_of_the_columns_with_targets_is_the_whole_loss(folders, arch):
    from fastkit.models import load

    model, _ = load(str(folders[arch]), device="cpu")
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length, prompt in ((23, 9), (17, 11), (20, 16)):
        ids = torch.randint(3, 60, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    batch = Collator(0)(rows)
    assert batch["logits_to_keep"].tolist() == list(range(8, 22))
    whole = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    few, all_ = model(**batch), model(**whole)
    assert few.logits.shape[1] == 14
    torch.testing.assert_close(few.loss, all_.loss, rtol=1e-6, atol=0)


def test_collator_errors():
    assert "pad_token_id is None" in said(Collator, None)
    assert "pad_to_multiple_of 0 is less than 1" in said(Collator, 0, 0)
    assert "1 labels for 2 tokens" in said(Collator(0), [{"input_ids": [1, 2], "labels": [1]}])
