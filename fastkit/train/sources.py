"""Where records come from: a file, a folder, a folder of `save_to_disk`, the packaged set, or a hub id."""

import difflib
import json
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import datasets
from datasets import Dataset

import fastkit
from fastkit.errors import FastkitError
from fastkit.train.records import READERS, build, dataset_records, file_records

PACKAGED = "gpu-instructions"
# Names a split goes by, best first. A test set stands in for a validation set only where there is no other.
ALIASES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval", "test"), "test": ("test",)}
_NAMES = ("train", "validation", "valid", "val", "dev", "eval", "test")
_TYPES = ", ".join(READERS)


def load_records(source: str | Path, split: str) -> Dataset:
    """Records of one split, in memory: columns `messages` (list of {role, content}), or `prompt` and `completion`,
    or `text` (strings), and `fact` (string or None) where any record has one.

    source: a .jsonl, .json, .csv or .parquet file (whatever split is asked for); a folder with such files named train*,
        validation* (or valid, val, dev, eval, test; shards such as train-00000-of-00002.parquet), also in a `data`
        subfolder; a folder written by `save_to_disk`; "gpu-instructions", the set that ships with fastkit, whatever
        the working folder holds; else a hub id "owner/name", the only kind that uses the network. Code that comes
        with a hub data set is never run.
    split: "train", "validation" (or an alias of it; test where there is none), "test", or another name as it stands.
    Raises FastkitError, naming file and line or row (rows count from 0, as `dataset[n]` does; lines from 1).
    """
    splits = find_splits(source)
    name = _pick(splits, split)
    if name is None and split in ALIASES and Path(source).is_file():
        name = "train"  # a file on its own is what the caller says it is
    if name is None:
        has_train = split == "validation" and "train" in splits
        remedy = "load_splits takes part of train" if has_train else "name one of these"
        raise FastkitError(f"{source} has no {split!r} split; it has: {', '.join(splits)}; {remedy}")
    found = splits[name]
    if isinstance(found, Dataset):
        where = f"{source} {name}"
        return build(dataset_records(found, where), where)
    return build(chain.from_iterable(map(file_records, found)), str(source))


def has_split(source: str | Path, split: str) -> bool:
    """Whether `load_records` finds that split in the source itself; a single file has "train" alone."""
    return _pick(find_splits(source), split) is not None


def load_splits(
    source: str | Path, fraction: float = 0.05, seed: int = 0, validation: str | Path | None = None
) -> tuple[Dataset, Dataset]:
    """(train, validation): the latter from the source `validation`, else the source's own validation split, else
    `fraction` of its train split, drawn by `seed`.

    Warns with the number of validation records that are also in train, word for word. Raises as `load_records`.
    """
    train = load_records(source, "train")
    if validation is None and not has_split(source, "validation"):
        return split_dataset(train, fraction, seed)
    held_out = load_records(source if validation is None else validation, "validation")
    shared = count_duplicates(train, held_out)
    if shared:
        warnings.warn(
            f"{shared} of {len(held_out)} validation records of {validation or source} are also in train, word for "
            f"word: the validation loss will look better than it is",
            stacklevel=2,
        )
    return train, held_out


def split_dataset(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(train, validation): about `fraction` of the records, drawn by `seed`, each part in the order of `dataset`.

    Records that are exact duplicates (`fact` aside) stay on one side, so none leaks into validation; a warning says
    how many there are. The same dataset, fraction and seed give the same split on any machine.
    Raises FastkitError if fraction is not between 0 and 1, or if there are not two distinct records to part.
    """
    if not 0 < fraction < 1:
        raise FastkitError(f"validation fraction {fraction} is not between 0 and 1; try 0.05")
    groups: dict[bytes, list[int]] = {}
    for n, key in enumerate(_keys(dataset)):
        groups.setdefault(key, []).append(n)
    if len(groups) < 2:
        raise FastkitError(f"{len(groups)} distinct records cannot be split into train and validation; add records")
    repeated = len(dataset) - len(groups)
    if repeated:
        warnings.warn(
            f"{repeated} of {len(dataset)} records repeat another exactly; each stays on the side of its twin",
            stacklevel=2,
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted, validation = fraction * len(dataset), []
    for group in order[:-1]:  # one group at least is left to train on
        if len(validation) + len(group) / 2 <= wanted:
            validation += group
    held_out = set(validation or min(order, key=len))
    parts = [n for n in range(len(dataset)) if n not in held_out], sorted(held_out)
    train, validation = (dataset.select(part, keep_in_memory=True) for part in parts)
    return train, validation


def count_duplicates(train: Dataset, validation: Dataset) -> int:
    """Number of validation records that are in train too, exactly (`fact` aside)."""
    seen = set(_keys(train))
    return sum(key in seen for key in _keys(validation))


def _keys(dataset: Dataset) -> Iterator[bytes]:
    columns = [name for name in dataset.column_names if name != "fact"]
    for row in dataset.with_format(None).select_columns(columns):
        yield blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=16).digest()


def find_splits(source: str | Path) -> Mapping[str, list[Path] | Dataset]:
    """Split name -> its files, or its Dataset. Raises FastkitError if there is no such source."""
    path = Path(source).expanduser()
    if str(source) == PACKAGED:
        path = Path(fastkit.__file__).parent / "data" / "instructions"
    if path.is_dir():
        return _saved(path) or _folder(path)
    if path.exists():
        if path.suffix.lower() not in READERS:
            raise FastkitError(f"{path}: {path.suffix or 'no suffix'} is not a known file type; accepted: {_TYPES}")
        return {"train": [path]}
    name, parent = str(source), path.parent
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and path.suffix.lower() not in READERS and not parent.is_dir():
        return _hub(name)
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else []
    hint = f"did you mean {' or '.join(near)}?" if near else "check the path"
    if not parent.is_dir():
        hint = f"there is no folder {parent} either; {hint}"
    raise FastkitError(f"{name} does not exist; {hint} (a hub data set is named owner/name, ours {PACKAGED})")


def _pick(splits: Mapping, split: str) -> str | None:
    return next((name for name in ALIASES.get(split, (split,)) if name in splits), None)


def _saved(path: Path) -> dict[str, Dataset] | None:
    if not (path / "dataset_dict.json").exists() and not (path / "state.json").exists():
        return None
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes pyarrow or json raise
        raise FastkitError(f"{path}: written by save_to_disk but unreadable: {_first_line(error)}") from None
    return {"train": saved} if isinstance(saved, Dataset) else dict(saved)


def _folder(path: Path) -> dict[str, list[Path]]:
    for folder in (path, path / "data"):  # hub repositories keep their files in data/
        files = sorted(p for p in folder.glob("*") if p.suffix.lower() in READERS and not p.name.startswith("."))
        splits: dict[str, list[Path]] = {}
        for file in files:
            # The split, alone or before a shard number: train, train-00000-of-00002, train_1; not train_old.
            match = re.fullmatch(r"([a-z]+)(?:[-_.]\d[\w.-]*)?", file.stem.lower())
            if match and match[1] in _NAMES:
                splits.setdefault(match[1], []).append(file)
        if splits:
            for name, shards in splits.items():
                _check_shards(folder, name, shards)
            return splits
        if len(files) == 1:
            return {"train": files}
        if files:
            names = ", ".join(p.name for p in files[:6])
            raise FastkitError(f"{folder}: none of {names} is named train or validation; rename one, or pass a file")
    seen = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    raise FastkitError(f"{path}: no {_TYPES} files in this folder, which holds {seen}; put train.jsonl there")


def _check_shards(folder: Path, name: str, files: list[Path]) -> None:
    stems, types = {p.stem for p in files}, sorted({p.suffix.lower() for p in files})
    if len(types) > 1 or (len(files) > 1 and name in {stem.lower() for stem in stems}):
        # Most likely the same records twice.
        raise FastkitError(f"{folder}: {' and '.join(p.name for p in files[:4])} are all {name}; keep one of them")
    totals = {int(match[1]) for stem in stems if (match := re.search(r"-\d+-of-(\d+)", stem))}
    if totals and totals != {len(files)}:
        wanted = " or ".join(map(str, sorted(totals)))
        raise FastkitError(f"{folder}: {len(files)} of {wanted} shards of {name} are there; fetch the others")


def _hub(name: str) -> dict[str, Dataset]:
    try:
        loaded = datasets.load_dataset(name)
    except (ConnectionError, TimeoutError) as error:
        raise FastkitError(
            f"{name} is no existing path, and as a hub id it cannot be reached (offline? {_first_line(error)}); "
            f"pass a local file or folder, or {PACKAGED}"
        ) from None
    except Exception as error:  # unknown id, gated, a loading script, a config to choose: the hub's own words say it
        raise FastkitError(
            f"{name} is no existing path, and the hub cannot load it: {_first_line(error)}; "
            f"check the id, or download its files and pass the folder"
        ) from None
    return dict(loaded)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
