"""Recorded results: one schema, and no file in data/results that does not obey it."""

import json

import pytest

from fastkit.errors import FastkitError
from fastkit.lab import results
from fastkit.lab.results import RESULTS, caption, load, record, recorded

ROWS = [{"who": "ours", "median_ms": 0.05, "runs": 9, "fits": True, "limit": None}]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_recorded_result_obeys_the_schema(path):
    result = load(path)
    assert result["card"]["name"] in caption(result) and result["date"] in caption(result)


def test_what_is_recorded_can_be_loaded(tmp_path):
    path = record("trial", ROWS, "fastkit bench --record trial", folder=tmp_path / "results")
    result = recorded("trial", tmp_path / "results")
    assert path.name == "trial.json" and result == load(path)
    assert result["rows"] == ROWS and result["command"] == "fastkit bench --record trial"
    assert {"name", "arch"} <= result["card"].keys() and "torch" in result["versions"]


GOOD = {
    "name": "trial",
    "date": "2026-11-24",
    "card": {"name": "Some card", "arch": "sm_89"},
    "versions": {"python": "3.12", "torch": "2.11.0", "triton": "3.6.0"},
    "command": "fastkit bench",
    "rows": ROWS,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: [r.pop("card"), r.pop("date")], "it lacks date, card"),
        (lambda r: r.pop("versions"), "it lacks versions"),
        (lambda r: r.update(card="H100"), "of another type than it should be: card"),
        (lambda r: r.update(name="other"), "it calls itself 'other'"),
        (lambda r: r.update(date="24.11.2026"), r"its date '24\.11\.2026' is not YYYY-MM-DD"),
        (lambda r: r["card"].pop("name"), "its card has no name or no arch"),
        (lambda r: r["versions"].pop("triton"), "its versions lack python, torch or triton"),
        (lambda r: r.update(command=""), "its command is empty"),
        (lambda r: r.update(rows=[]), "it has no rows"),
        (lambda r: r["rows"].append([1]), "row 1 is no object"),
        (lambda r: r["rows"].append({"times": [1, 2]}), "row 1 holds more than text and numbers in times"),
    ],
)
def test_faults_are_named(tmp_path, change, message):
    result = json.loads(json.dumps(GOOD))
    path = tmp_path / "trial.json"
    path.write_text(json.dumps(result))
    assert load(path) == GOOD
    change(result)
    path.write_text(json.dumps(result))
    with pytest.raises(FastkitError, match=rf"trial\.json is no recorded result: .*{message}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_files_of_something_else(tmp_path):
    path = tmp_path / "trial.json"
    for text, message in (("{", "is no recorded result: "), ("[]", "it holds a list, not an object")):
        path.write_text(text)
        with pytest.raises(FastkitError, match=message):
            load(path)
    with pytest.raises(FastkitError, match=r"no recorded result 'nothing' in .*: there are trial"):
        recorded("nothing", tmp_path)


def test_a_faulty_record_is_not_written(tmp_path):
    with pytest.raises(FastkitError, match="it has no rows"):
        record("trial", [], "command", folder=tmp_path)
    assert not list(tmp_path.iterdir()) and results.SCHEMA.keys() == GOOD.keys()
