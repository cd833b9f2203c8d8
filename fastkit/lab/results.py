"""Recorded results: one JSON file a run in `data/results/`, with its card, versions and date.

A number is shown with the card that it was measured on, or not at all.
"""

import datetime
import json
from pathlib import Path

from fastkit.errors import FastkitError
from fastkit.lab.device import card, versions

RESULTS = Path(__file__).parent.parent / "data" / "results"


def record(name: str, rows: list[dict], command: str, folder: Path = RESULTS) -> Path:
    """Write `rows` with this machine's card and versions, today's date and the command that gave them."""
    result = {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "card": card(),
        "versions": versions(),
        "command": command,
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def recorded(name: str, folder: Path = RESULTS) -> dict:
    """The recorded result `name`. Raises FastkitError that lists what there is when there is none of that name."""
    path = folder / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none"
        raise FastkitError(f"no recorded result {name!r} in {folder}: there are {there}")
    return json.loads(path.read_text())


def caption(result: dict) -> str:
    """The line that goes under a recorded number or onto its plot."""
    return f"recorded on {result['card']['name']}, {result['date']}"
