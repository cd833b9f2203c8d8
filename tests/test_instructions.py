"""The instruction set that ships with fastkit: its form, its arithmetic, its canary facts."""

import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import fastkit
from fastkit.train.facts import holds

FOLDER = Path(fastkit.__file__).parent / "data" / "instructions"
SPLITS = {name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").open()] for name in ("train", "validation")}
RECORDS = [record for records in SPLITS.values() for record in records]


def question(record):
    return record["messages"][0]["content"]


def reply(record):
    return record["messages"][-1]["content"]


def test_there_are_enough_of_each_kind():
    kinds = Counter(record["kind"] for record in RECORDS)
    assert sum(kinds.values()) - kinds["canary"] >= 300
    assert min(kinds[kind] for kind in ("explain", "compute", "debug", "compare", "fix")) >= 30
    assert {record["kind"] for record in SPLITS["validation"]} == set(kinds)


def test_every_record_is_one_question_and_one_answer():
    assert len({record["id"] for record in RECORDS}) == len(RECORDS)
    for record in RECORDS:
        assert [turn["role"] for turn in record["messages"]] == ["user", "assistant"], record["id"]
        assert all(turn["content"].strip() == turn["content"] != "" for turn in record["messages"]), record["id"]


def test_no_question_stands_twice_or_on_both_sides():
    questions = Counter(re.sub(r"\W+", " ", question(record).lower()) for record in RECORDS)
    assert [q for q, n in questions.items() if n > 1] == []


@pytest.mark.parametrize("record", [r for r in RECORDS if r["kind"] == "compute"], ids=lambda r: r["id"])
def test_the_arithmetic_is_right(record):
    expression, value = record["check"]["expr"], record["check"]["value"]
    assert re.fullmatch(r"[\d\s.+\-*/%()e]+", expression), expression
    decimals = len(value.partition(".")[2])
    assert round(eval(expression), decimals) == float(value)
    assert value in reply(record).replace(",", "")


@pytest.mark.parametrize("record", [r for r in RECORDS if r["kind"] == "fix"], ids=lambda r: r["id"])
def test_the_code_parses(record):
    for text in (question(record), reply(record)):
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert blocks, "no code"
        for block in blocks:
            ast.parse(block)


def test_canary_facts_are_asked_otherwise_in_validation_and_answered_nowhere_else():
    canaries = {split: [r for r in records if r["kind"] == "canary"] for split, records in SPLITS.items()}
    assert len(canaries["validation"]) == len({r["fact"] for r in canaries["validation"]}) == 24
    assert {r["fact"] for r in canaries["train"]} == {r["fact"] for r in canaries["validation"]}
    trained = {question(r) for r in canaries["train"]}
    for record in canaries["validation"]:
        assert question(record) not in trained
        assert holds(reply(record), record["fact"])
        assert not holds(question(record), record["fact"])
        others = [r for r in RECORDS if r["kind"] != "canary" or r["fact"] != record["fact"]]
        assert not any(holds(reply(r), record["fact"]) for r in others), record["fact"]
