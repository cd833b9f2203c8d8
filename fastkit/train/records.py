"""Read training records from files, folders and the hub, and bring every form to one of three.

What comes out is `{"messages": [{"role", "content"}, ...]}`, `{"prompt", "completion"}` or `{"text"}`, and beside it
`fact` (string or None) where a record has one. Nothing here needs a tokenizer.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from fastkit.errors import FastkitError

# Tried in this order: hub sets often carry a ready-made `text` beside the structured form, which says more.
FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
ACCEPTED = "messages | conversations | prompt + completion | instruction (+ input) + output | text"
KEYS = {"messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "fact"}
ROLES = {
    **{name: name for name in ("system", "user", "assistant")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
}
MEND = "mend it there or remove the record (json.dumps writes it right)"
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_BATCH = 1000  # records held as Python objects at a time


def find_form(keys: Iterable[str], where: str) -> str:
    """Name of the record form, a key of `FORMS`, that `keys` spell; FastkitError with the keys seen if none."""
    keys = list(keys)
    for form, needed in FORMS.items():
        if all(key in keys for key in needed):
            return form
    seen = ", ".join(map(repr, keys[:12])) or "none"
    raise FastkitError(f"{where}: no known record form among the keys {seen}; accepted: {ACCEPTED}")


def normalize_record(record: dict, form: str, where: str) -> dict:
    """Check one record and bring it to `messages`, `prompt` + `completion` or `text`, with `fact` if it has one.

    `where` ("train.jsonl line 7") opens every message. Raises FastkitError for a missing key, a value of another
    type, an unknown role, and a record with nothing to learn.
    """
    missing = [key for key in FORMS[form] if key not in record]
    if missing:
        raise FastkitError(
            f"{where}: no {missing[0]!r} among its keys {', '.join(map(repr, record))}; "
            f"the first record says that all are of the form {' + '.join(FORMS[form])}"
        )
    if form in ("messages", "conversations"):
        out = {"messages": _messages(record[form], form, where)}
    elif form == "prompt":
        out = {key: _text(record[key], key, where) for key in ("prompt", "completion")}
    elif form == "instruction":
        instruction = _text(record["instruction"], "instruction", where)
        extra = _text(record.get("input") or "", "input", where, empty=True)
        question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        answer = _text(record["output"], "output", where)
        out = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    else:
        out = {"text": _text(record["text"], "text", where)}
    fact = record.get("fact")
    if fact is not None:
        out["fact"] = _text(fact, "fact", where, empty=True)
    return out


def _text(value, key: str, where: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise FastkitError(f"{where}: {key!r} must be a string, not {type(value).__name__} ({_show(value)})")
    if not empty and not value.strip():
        raise FastkitError(f"{where}: {key!r} is empty ({_show(value)}); fill it or remove the record")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FastkitError(f"{where}: {key!r} has half a surrogate pair at character {error.start}; mend it") from None
    return value


def _messages(turns, key: str, where: str) -> list[dict]:
    if not isinstance(turns, list) or not turns:
        raise FastkitError(f"{where}: {key!r} must be a list of turns, not {_show(turns)}")
    out = []
    for n, turn in enumerate(turns):
        at = f"{key}[{n}]"
        role_key, text_key = ("role", "content") if isinstance(turn, dict) and "role" in turn else ("from", "value")
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise FastkitError(f"{where}: {at} needs role and content (or from and value), not {_show(turn)}")
        role = turn[role_key]
        if not isinstance(role, str) or role not in ROLES:
            raise FastkitError(f"{where}: {at} has the role {_show(role)}; accepted: {', '.join(ROLES)}")
        out.append({"role": ROLES[role], "content": _text(turn[text_key], f"{at}.{text_key}", where, empty=True)})
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in out):
        raise FastkitError(f"{where}: {key!r} has no assistant turn with text, so nothing to learn; add one")
    return out


def _show(value) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def build(records: Iterable[tuple[str, object]], name: str) -> Dataset:
    """In-memory Dataset of normalized records; its fingerprint is a hash of the content.

    `records` yields (where, record); the first one's keys decide the form. Raises FastkitError if there are none.
    """
    form, batch, tables = None, [], []
    for where, record in records:
        if not isinstance(record, dict):
            raise FastkitError(f'{where}: not an object but {_show(record)}; a record looks like {{"text": "..."}}')
        form = form or find_form(record, where)
        batch.append(normalize_record(record, form, where))
        if len(batch) == _BATCH:
            tables.append(_table(batch))
            batch = []
    if batch:
        tables.append(_table(batch))
    if not tables:
        raise FastkitError(f"{name} has no records; add some")
    table = pa.concat_tables(tables)
    if table["fact"].null_count == len(table):
        table = table.drop_columns("fact")
    return Dataset(table)


def _table(batch: list[dict]) -> pa.Table:
    fields = [(key, _MESSAGES if key == "messages" else pa.string()) for key in batch[0] if key != "fact"]
    return pa.Table.from_pylist(batch, schema=pa.schema([*fields, ("fact", pa.string())]))


def dataset_records(dataset: Dataset, name: str) -> Iterator[tuple[str, dict]]:
    """(where, record) of a datasets.Dataset; only the columns that a form uses are decoded."""
    if not dataset.column_names or not len(dataset):
        return
    find_form(dataset.column_names, name)  # here, while the columns that belong to no form can still be named
    dataset = dataset.with_format(None).select_columns([key for key in dataset.column_names if key in KEYS])
    for n, record in enumerate(dataset):
        yield f"{name} row {n}", record


def file_records(path: Path) -> Iterator[tuple[str, object]]:
    """(where, record) of one .jsonl, .json, .csv or .parquet file; FastkitError naming file and line when malformed."""
    try:
        if path.stat().st_size == 0:
            raise _empty(path)
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        raise FastkitError(f"{path}: cannot be read: {error.strerror or error}") from None


def _empty(path: Path, how: str = "") -> FastkitError:
    return FastkitError(f"{path} is empty{how}; put records in it or remove it")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Split at \n alone, as JSON Lines asks: str.splitlines() would also cut at U+2028 inside a string.
    with path.open("rb") as file:
        for n, raw in enumerate(file, 1):
            try:
                yield n, raw.decode("utf-8-sig" if n == 1 else "utf-8")
            except UnicodeDecodeError as error:
                seen = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                raise FastkitError(f"{path} line {n}: not UTF-8 ({seen}); save the file as UTF-8") from None


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    empty = True
    for n, line in _lines(path):
        if not line.strip():
            continue
        empty = False
        yield f"{path} line {n}", _parse(line, f"{path} line {n}")
    if empty:
        raise _empty(path)


def _parse(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise FastkitError(
            f"{where}: not JSON: {error.msg} at column {error.colno} ({_show(line.strip())}); {MEND}"
        ) from None
    except RecursionError:
        raise FastkitError(f"{where}: not JSON that can be read: nested too deeply; {MEND}") from None


def _json(path: Path) -> Iterator[tuple[str, object]]:
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        raise _empty(path)
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        # Several values one after another are JSON lines under the wrong name; anything else is broken JSON.
        if getattr(error, "msg", None) == "Extra data" and "\n" in text.strip():
            yield from _jsonl(path)
            return
        line, why = getattr(error, "lineno", 1), getattr(error, "msg", "nested too deeply")
        column = getattr(error, "colno", 1)
        raise FastkitError(f"{path} line {line}: not JSON: {why} at column {column}; {MEND}") from None
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    elif isinstance(data, dict):
        data = [data]  # JSON lines with one line
    if not isinstance(data, list):
        raise FastkitError(f'{path}: holds {_show(data)}; expected an array, {{"data": [...]}} or JSON lines')
    if not data:
        raise _empty(path, " (no records)")
    for n, record in enumerate(data):
        yield f"{path} row {n}", record


def _csv(path: Path) -> Iterator[tuple[str, dict]]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header, empty = None, True
    while True:
        line = reader.line_num + 1
        where = f"{path} line {line}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise FastkitError(f"{where}: not CSV: {error}; mend the quotes, or use .jsonl for long texts") from None
        if row is None:
            break
        if not row:
            continue
        if header is None:
            header = row
            try:
                find_form(header, where)
            except FastkitError as error:
                raise FastkitError(
                    f"{error}; the first line must be a header, comma-separated: rename the columns to "
                    "prompt,completion, or add that line"
                ) from None
            if len(set(header)) != len(header):
                raise FastkitError(f"{where}: a column is named twice in {_show(header)}; rename one")
            continue
        empty = False
        if len(row) != len(header):
            raise FastkitError(f"{where}: {len(row)} fields where the header has {len(header)}; quote the texts")
        record = dict(zip(header, row, strict=True))
        record["fact"] = record.get("fact") or None  # a CSV cannot tell None from an empty string
        for key in ("messages", "conversations"):
            if key in record:
                record[key] = _parse(record[key], f"{where} column {key!r}")
        yield where, record
    if header is None:
        raise _empty(path)
    if empty:
        raise _empty(path, " below its header")


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not file.metadata.num_rows:
                raise _empty(path, " (no rows)")
            find_form(names, str(path))
            n = 0
            for batch in file.iter_batches(_BATCH, columns=[name for name in names if name in KEYS]):
                for record in batch.to_pylist():
                    yield f"{path} row {n}", record
                    n += 1
    except pa.ArrowException as error:
        raise FastkitError(f"{path}: not a Parquet file that can be read: {str(error).splitlines()[0]}") from None


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
