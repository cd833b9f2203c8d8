"""Reading training records: file types, folders, record forms, splits, and what each error says."""

import csv
import json
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

import fastkit
from fastkit.errors import FastkitError
from fastkit.train import sources
from fastkit.train.data import count_duplicates, has_split, load_records, load_splits, split_dataset

CHAT = [{"role": "user", "content": "What is a warp?"}, {"role": "assistant", "content": "32 threads."}]
ROWS = [{"prompt": "a, b", "completion": "c\nd é"}, {"prompt": "e", "completion": 'f "g"'}]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for the hub fails at once."""

    def refuse(name, *args, **kwargs):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, max(rows, key=len))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def said(call, *args) -> str:
    """The FastkitError of a call; it is one line."""
    with pytest.raises(FastkitError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Forms


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": CHAT, "id": 7}, {"messages": CHAT}),
        ({"messages": CHAT, "text": "ready-made"}, {"messages": CHAT}),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "Q"},
                    {"from": "gpt", "value": "A", "weight": 1},
                ]
            },
            {
                "messages": [
                    {"role": r, "content": c} for r, c in zip(("system", "user", "assistant"), "SQA", strict=True)
                ]
            },
        ),
        ({"conversations": CHAT}, {"messages": CHAT}),
        ({"prompt": "p", "completion": " c"}, {"prompt": "p", "completion": " c"}),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3", "text": "ready-made"},
            {"messages": [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]},
        ),
        (
            {"instruction": "Add.", "input": "", "output": "3"},
            {"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]},
        ),
        ({"text": "plain\u2028text"}, {"text": "plain\u2028text"}),
    ],
)
def test_forms(tmp_path, record, expected):
    for suffix in (".jsonl", ".json", ".parquet"):
        assert load_records(write(tmp_path / f"a{suffix}", [record, record]), "train").to_list() == [expected] * 2


def test_alpaca_without_input(tmp_path):
    records = load_records(write(tmp_path / "a.jsonl", [{"instruction": "Say a.", "output": "a"}]), "train")
    assert records[0]["messages"][0]["content"] == "Say a."


def test_fact_is_kept(tmp_path):
    rows = [{"text": "a"}, {"text": "b", "fact": "4713 volts"}, {"text": "c", "fact": None}]
    assert load_records(write(tmp_path / "a.jsonl", rows), "train")["fact"][:] == [None, "4713 volts", None]
    assert load_records(write(tmp_path / "a.csv", rows[:2]), "train")["fact"][:] == [None, "4713 volts"]
    assert "fact" not in load_records(write(tmp_path / "b.jsonl", rows[:1]), "train").column_names


# Sources


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_file_types(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", ROWS)
    assert load_records(path, "train").to_list() == ROWS
    assert load_records(str(path), "validation").to_list() == ROWS  # a file on its own is what the caller says
    assert not has_split(path, "validation")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"data": ROWS}),
        "\n".join(map(json.dumps, ROWS)),
        "\ufeff" + json.dumps(ROWS),
        "\ufeff" + "\r\n".join(map(json.dumps, ROWS)),
    ],
)
def test_json_layouts(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode())
    assert load_records(path, "train").to_list() == ROWS


def test_one_json_object_is_one_record(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS[0]))
    assert load_records(path, "train").to_list() == ROWS[:1]


def test_csv_chat_column(tmp_path):
    path = write(tmp_path / "a.csv", [{"messages": json.dumps(CHAT)}])
    assert load_records(path, "train").to_list() == [{"messages": CHAT}]


def test_more_records_than_a_batch(tmp_path):
    rows = [{"text": str(n)} for n in range(2500)]
    rows[2400]["fact"] = "late"
    records = load_records(write(tmp_path / "a.jsonl", rows), "train")
    assert records["text"][:] == [str(n) for n in range(2500)]
    assert records[2400]["fact"] == "late"


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "test"])
@pytest.mark.parametrize("sub", ["", "data"])
def test_folder(tmp_path, name, sub):
    write(tmp_path / sub / "train.jsonl", ROWS)
    write(tmp_path / sub / f"{name}.csv", ROWS[:1])
    write(tmp_path / sub / "train_old.jsonl", ROWS * 3)
    (tmp_path / "README.md").write_text("x")
    assert load_records(tmp_path, "train").to_list() == ROWS
    assert load_records(tmp_path, "validation").to_list() == ROWS[:1]
    assert has_split(tmp_path, "validation")


def test_test_split_stands_in_only_where_there_is_no_other(tmp_path):
    for name, rows in {"train": ROWS, "test": ROWS[:1], "valid": ROWS[1:]}.items():
        write(tmp_path / f"{name}.jsonl", rows)
    assert load_records(tmp_path, "validation").to_list() == ROWS[1:]
    assert load_records(tmp_path, "test").to_list() == ROWS[:1]


def test_shards(tmp_path):
    for n, row in enumerate(ROWS):
        write(tmp_path / f"train-0000{n}-of-00002.parquet", [row])
    assert load_records(tmp_path, "train").to_list() == ROWS
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    assert "1 of 2 shards of train" in said(load_records, tmp_path, "train")


def test_folder_with_one_file_of_any_name(tmp_path):
    write(tmp_path / "mine.jsonl", ROWS)
    assert load_records(tmp_path, "train").to_list() == ROWS
    assert not has_split(tmp_path, "validation")


def test_saved_datasets(tmp_path):
    one = Dataset.from_list([{**row, "n": n} for n, row in enumerate(ROWS)])
    one.save_to_disk(tmp_path / "one")
    DatasetDict(train=one, validation=one.select([1])).save_to_disk(tmp_path / "both")
    files = sorted(tmp_path.rglob("*"))
    assert load_records(tmp_path / "one", "train").to_list() == ROWS
    assert load_records(tmp_path / "both", "validation").to_list() == ROWS[1:]
    bad = Dataset.from_list([{"text": "a"}, {"text": " "}])
    assert sorted(tmp_path.rglob("*")) == files  # no cache in the user's folder
    bad.save_to_disk(tmp_path / "bad")
    assert f"{tmp_path / 'bad'} train row 1: 'text' is empty" in said(load_records, tmp_path / "bad", "train")
    (tmp_path / "bad" / "state.json").write_text("{")
    assert "unreadable" in said(load_records, tmp_path / "bad", "train")


def test_hub(monkeypatch):
    def load(name):
        if name == "owner/script":
            raise RuntimeError("Dataset scripts are no longer supported\nmore")
        return DatasetDict(train_sft=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))

    offline = said(load_records, "owner/name", "train")
    assert "offline?" in offline and "owner/name" in offline and "gpu-instructions" in offline
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_records("owner/name", "train_sft").to_list() == ROWS
    assert "has no 'train' split; it has: train_sft, test" in said(load_records, "owner/name", "train")
    assert "Dataset scripts are no longer supported" in said(load_records, "owner/script", "train")


def test_equal_content_has_an_equal_fingerprint(tmp_path):
    prints = {load_records(write(tmp_path / f"{n}.jsonl", ROWS), "train")._fingerprint for n in range(2)}
    assert len(prints) == 1


# Errors


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "{path} is empty"),
        ("a.jsonl", b"\n \n", "{path} is empty"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "{path} line 3: not JSON: Expecting value at column 10"),
        ("a.jsonl", b'{"text": "a"', "; mend it there or remove the record"),
        ("a.jsonl", b'{"text": "a"}\n["b"]', "{path} line 2: not an object but ['b']"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "{path} line 2: not UTF-8 (byte 0xff at column 11)"),
        ("a.jsonl", b'{"question": "a", "answer": "b"}', "line 1: no known record form among the keys 'question', "),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "b"}', "{path} line 2: no 'text' among its keys 'prompt'"),
        ("a.jsonl", b'{"text": 5}', "{path} line 1: 'text' must be a string, not int (5)"),
        ("a.jsonl", b'{"text": null}', "'text' must be a string, not NoneType (None)"),
        ("a.jsonl", b'{"text": " "}', "{path} line 1: 'text' is empty"),
        ("a.jsonl", b'{"text": "a \\ud800"}', "half a surrogate pair at character 2"),
        ("a.jsonl", b'{"text": "a", "fact": 4}', "'fact' must be a string, not int (4)"),
        ("a.jsonl", b'{"prompt": "a", "completion": ""}', "{path} line 1: 'completion' is empty"),
        ("a.jsonl", b'{"instruction": "a", "output": "b", "input": 3}', "'input' must be a string, not int (3)"),
        ("a.jsonl", b'{"messages": []}', "'messages' must be a list of turns, not []"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "messages[0] needs role and content"),
        ("a.jsonl", b'{"messages": ["hi"]}', "messages[0] needs role and content (or from and value), not 'hi'"),
        ("a.jsonl", b'{"messages": [{"role": "tool", "content": "x"}]}', "messages[0] has the role 'tool'; accepted:"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": ["x"]}]}', "'messages[0].content' must be a string"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "'messages' has no assistant turn with text"),
        ("a.jsonl", b'{"conversations": [{"from": "gpt", "value": " "}]}', "has no assistant turn with text"),
        ("a.jsonl", b"[" * 200_000, "nested too deeply"),
        ("a.json", b"  ", "{path} is empty"),
        ("a.json", b"[]", "{path} is empty (no records)"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', "{path} line 2: not JSON: Expecting value at column 11"),
        ("a.json", b'[{"text": }]', "; mend it there or remove the record"),
        ("a.json", b'{"text": "a"}\n{"text": }', "{path} line 2: not JSON"),
        ("a.json", b'[{"text": "a"}, 3]', "{path} row 1: not an object but 3"),
        ("a.json", b'"text"', "{path}: holds 'text'; expected an array"),
        ("a.json", b'{"rows": []}', "no known record form among the keys 'rows'; accepted: messages"),
        ("a.csv", b"", "{path} is empty"),
        ("a.csv", b"prompt,completion\n", "{path} is empty below its header"),
        ("a.csv", b"What is it?,A warp.\n", "{path} line 1: no known record form among the keys 'What is it?'"),
        ("a.csv", b"question,answer\na,b\n", "header, comma-separated: rename the columns to prompt,completion"),
        ("a.csv", b"prompt;completion\na;b\n", "must be a header, comma-separated"),
        ("a.csv", b"text,text\na,b\n", "{path} line 1: a column is named twice"),
        ("a.csv", b'prompt,completion\n"a\nb",c\nd\n', "{path} line 4: 1 fields where the header has 2"),
        ("a.csv", b"prompt,completion\na,b,c\n", "{path} line 2: 3 fields where the header has 2"),
        ("a.csv", b'prompt,completion\na,"b\n', "{path} line 2: not CSV: unexpected end of data"),
        ("a.csv", b"prompt,completion\na,\xe9\n", "{path} line 2: not UTF-8"),
        ("a.csv", b"prompt,completion\na, \n", "{path} line 2: 'completion' is empty"),
        ("a.csv", b"messages\nhi\n", "{path} line 2 column 'messages': not JSON"),
        ("a.csv", b"text\n" + b"x" * 200_000, "use .jsonl for long texts"),
        ("a.parquet", b"PAR1 not", "{path}: not a Parquet file"),
        ("a.txt", b"x", "{path}: .txt is not a known file type; accepted: .jsonl, .json, .csv, .parquet"),
    ],
)  # fmt: skip
def test_file_errors(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    assert expected.format(path=path) in said(load_records, path, "train")


def test_parquet_errors(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, [{"text": "a"}, {"text": None}])
    assert f"{path} row 1: 'text' must be a string" in said(load_records, path, "train")
    write(path, [{"q": "a"}])
    assert f"{path}: no known record form among the keys 'q'" in said(load_records, path, "train")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert f"{path} is empty (no rows)" in said(load_records, path, "train")


def test_missing_paths(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", ROWS)
    message = said(load_records, tmp_path / "trian.jsonl", "train")
    assert f"{tmp_path / 'trian.jsonl'} does not exist; did you mean train.jsonl?" in message
    assert "check the path" in said(load_records, tmp_path / "other", "train")
    assert f"no folder {tmp_path / 'no'}" in said(load_records, tmp_path / "no" / "a.jsonl", "train")
    monkeypatch.chdir(tmp_path)
    assert "did you mean train.jsonl?" in said(load_records, "train.json", "train")  # no slash: never a hub id
    (tmp_path / "sets").mkdir()
    assert "sets/mine does not exist" in said(load_records, "sets/mine", "train")  # that folder is here: a path


def test_folder_errors(tmp_path):
    assert "which holds nothing" in said(load_records, tmp_path, "train")
    write(tmp_path / "one.jsonl", ROWS)
    write(tmp_path / "two.jsonl", ROWS)
    assert "none of one.jsonl, two.jsonl is named train" in said(load_records, tmp_path, "train")
    write(tmp_path / "train.jsonl", ROWS)
    assert "has no 'validation' split; it has: train; load_splits" in said(load_records, tmp_path, "validation")
    assert "has no 'extra' split" in said(load_records, tmp_path / "train.jsonl", "extra")
    write(tmp_path / "train.csv", ROWS)
    assert "train.csv and train.jsonl are all train; keep one" in said(load_records, tmp_path, "train")
    (tmp_path / "train.csv").rename(tmp_path / "train.parquet")
    assert "keep one" in said(load_records, tmp_path, "train")


# Splits


def texts(dataset) -> list[str]:
    return dataset["text"][:]


def test_split_is_deterministic_and_whole():
    dataset = Dataset.from_list([{"text": str(n)} for n in range(100)])
    train, validation = split_dataset(dataset, 0.1, seed=3)
    assert len(validation) == 10
    assert sorted(texts(train) + texts(validation), key=int) == texts(dataset)
    assert texts(split_dataset(dataset, 0.1, seed=3)[1]) == texts(validation)
    assert texts(split_dataset(dataset, 0.1, seed=4)[1]) != texts(validation)
    assert [len(part) for part in split_dataset(dataset, 0.001, 0)] == [99, 1]
    assert [len(part) for part in split_dataset(dataset, 0.999, 0)] == [1, 99]
    for fraction in (0, 1, 5, -0.1):
        assert f"fraction {fraction} is not between 0 and 1" in said(split_dataset, dataset, fraction, 0)


@pytest.mark.parametrize("seed", range(5))
def test_split_keeps_duplicates_together(seed):
    rows = [{"text": str(n % 30), "fact": str(n)} for n in range(60)]
    with pytest.warns(UserWarning, match="30 of 60 records repeat another exactly"):
        train, validation = split_dataset(Dataset.from_list(rows), 0.2, seed)
    assert count_duplicates(train, validation) == 0
    assert len(validation) == 12
    same = Dataset.from_list([{"text": "a"}] * 4)
    assert "1 distinct records cannot be split" in said(split_dataset, same, 0.5, 0)


def test_load_splits(tmp_path):
    rows = [{"text": str(n)} for n in range(20)]
    path = write(tmp_path / "d" / "train.jsonl", rows)
    assert [len(part) for part in load_splits(path, 0.1)] == [18, 2]
    assert [len(part) for part in load_splits(tmp_path / "d", 0.25)] == [15, 5]
    other = write(tmp_path / "other.jsonl", [{"text": "new"}, *rows[:3]])
    with pytest.warns(UserWarning, match=r"3 of 4 validation records of .*other.jsonl are also in train"):
        assert len(load_splits(path, validation=other)[1]) == 4
    write(tmp_path / "d" / "validation.jsonl", [{"text": "new"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts(load_splits(tmp_path / "d")[1]) == ["new"]


def test_packaged_name_wins_over_the_working_folder(tmp_path, monkeypatch):
    write(tmp_path / "gpu-instructions" / "train.jsonl", ROWS)
    write(tmp_path / "site" / "data" / "instructions" / "train.jsonl", ROWS[:1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources.fastkit, "__file__", str(tmp_path / "site" / "__init__.py"))
    assert len(load_records("gpu-instructions", "train")) == 1


def test_gpu_instructions():
    folder = Path(fastkit.__file__).parent / "data" / "instructions"
    for split in ("train", "validation"):
        lines = (folder / f"{split}.jsonl").read_bytes().strip().split(b"\n")
        records = load_records("gpu-instructions", split)
        assert len(records) == len(lines) > 0
        assert set(records.column_names) <= {"messages", "fact"}
    assert (
        count_duplicates(load_records("gpu-instructions", "train"), load_records("gpu-instructions", "validation")) == 0
    )
