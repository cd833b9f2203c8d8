"""Recorded results: one JSON file a run in `data/results/`, with its card, versions and date.

A number is shown with the card that it was measured on, or not at all.
"""

import datetime
import json
from pathlib import Path

from fastkit.errors import FastkitError
from fastkit.lab.device import card, versions

RESULTS = Path(__file__).parent.parent / "data" / "results"
SCHEMA = {"name": str, "date": str, "card": dict, "versions": dict, "command": str, "rows": list}


def record(name: str, rows: list[dict], command: str, folder: Path = RESULTS) -> Path:
    """Write `rows` with this machine's card and versions, today's date and the command that gave them.

    A row is a dict of strings, numbers, booleans and None. Raises FastkitError for rows or a name that `load` refuses.
    """
    result = {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "card": card(),
        "versions": versions(),
        "command": command,
        "rows": rows,
    }
    path = folder / f"{name}.json"
    _check(result, path)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def recorded(name: str, folder: Path = RESULTS) -> dict:
    """The recorded result `name`. Raises FastkitError that lists what there is when there is none of that name."""
    path = folder / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none"
        raise FastkitError(f"no recorded result {name!r} in {folder}: there are {there}")
    return load(path)


def load(path: Path) -> dict:
    """A recorded result's file, checked. Raises FastkitError that says what it lacks."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FastkitError(f"{path.name} is no recorded result: {error}") from error
    _check(result, path)
    return result


def caption(result: dict) -> str:
    """The line that goes under a recorded number or onto its plot."""
    return f"recorded on {result['card']['name']}, {result['date']}"


def _check(result, path: Path) -> None:
    if wrong := list(_faults(result, path)):
        raise FastkitError(f"{path.name} is no recorded result: {'; '.join(wrong)}")


def _faults(result, path: Path):
    if not isinstance(result, dict):
        yield f"it holds a {type(result).__name__}, not an object"
        return
    if missing := [key for key in SCHEMA if key not in result]:
        yield f"it lacks {', '.join(missing)}"
        return
    if wrong := [key for key, kind in SCHEMA.items() if not isinstance(result[key], kind)]:
        yield f"of another type than it should be: {', '.join(wrong)}"
        return
    if result["name"] != path.stem:
        yield f"it calls itself {result['name']!r}"
    try:
        datetime.date.fromisoformat(result["date"])
    except ValueError:
        yield f"its date {result['date']!r} is not YYYY-MM-DD"
    if not {"name", "arch"} <= result["card"].keys():
        yield "its card has no name or no arch"
    if not {"python", "torch", "triton"} <= result["versions"].keys():
        yield "its versions lack python, torch or triton"
    if not result["command"]:
        yield "its command is empty"
    if not result["rows"]:
        yield "it has no rows"
    for number, row in enumerate(result["rows"]):
        if not isinstance(row, dict) or not row:
            yield f"row {number} is no object or is empty"
        elif odd := [key for key, value in row.items() if not isinstance(value, str | int | float | bool | None)]:
            yield f"row {number} holds more than text and numbers in {', '.join(odd)}"
