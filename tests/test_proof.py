"""The tracer's predictions against what Nsight Compute counted on a card: data/results/tracer_*.json."""

import functools

import pytest
import torch

from fastkit.errors import FastkitError
from fastkit.lab import proof
from fastkit.lab.profile import beside
from fastkit.lab.results import RESULTS, load

RECORDS = [load(path) for path in sorted(RESULTS.glob("tracer_*.json"))]
WASTEFUL = ("strided", "aos", "naive", "norm", "attention")  # a mean or a sum a row is stored as one number
PROVED = [(record, case) for record in RECORDS for case in dict.fromkeys(row["case"] for row in record["rows"])]

predicted = functools.cache(proof.predict)  # the records' cards are alike


@pytest.mark.parametrize("case", proof.cases("meta"))
def test_every_case_is_predicted_on_any_machine(case):
    for trace in predicted(case, "sm_90", 132):
        loads_and_stores = [  # an access without an instruction was given up: another gives the same
            access for access in trace.accesses if access.kind in ("load", "store") and access.instruction
        ]
        assert all(not access.unknown for access in loads_and_stores)
        whats = {row["what"] for row in beside(trace, {})}
        assert {"registers", "occupancy"} < whats and any(what.endswith("_bytes_moved") for what in whats)
        if case.endswith("full") and not any(wasteful in case for wasteful in WASTEFUL):
            assert all(access.efficiency == 1 for access in loads_and_stores)


@pytest.mark.parametrize(("record", "case"), PROVED, ids=[f"{r['card']['name']}, {case}" for r, case in PROVED])
def test_the_counters_agree(record, case):
    rows = [row for row in record["rows"] if row["case"] == case]
    for row in rows:  # as predicted on the card's own machine
        assert proof.allowed(row) is None or proof.off(row) <= proof.allowed(row), row
    traces = predicted(case, record["card"]["arch"], record["card"]["sms"])
    if {proof.layouts(trace) for trace in traces} != {row["layouts"] for row in rows}:
        pytest.skip(f"this Triton compiles it otherwise than {record['versions']['triton']}, which was measured")
    again = [row for trace in traces for row in beside(trace, {})]
    for row, before in zip(again, rows, strict=True):
        assert row["what"] == before["what"]
        row |= {"case": case, "measured": before["measured"]}
        assert proof.allowed(row) is None or proof.off(row) <= proof.allowed(row), row


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu():
    with pytest.raises(FastkitError, match="recorded proof"):
        proof.prove()
    with pytest.raises(FastkitError, match="no case 'copy'"):
        proof.predict("copy", "sm_90", 132)


def test_the_verdicts():
    row = {"case": "copy coalesced full", "kernel": "_k", "what": "load_sectors_per_request", "predicted": 4.0}
    right, wrong, absent = (row | {"measured": value} for value in (4.0, 4.01, None))
    assert [proof.off(r) <= proof.allowed(r) for r in (right, wrong, absent)] == [True, False, False]
    odd = wrong | {"case": "copy coalesced odd"}
    assert proof.off(odd) <= proof.allowed(odd) == 0.02
    assert proof.allowed(row | {"what": "registers"}) is None
    text = proof.table([right, wrong, absent])
    assert text.count("copy coalesced full") == 1 and "OFF by 0.2%, allowed 0%" in text and "not counted" in text


@pytest.mark.gpu
def test_the_counters_of_this_card():
    rows = proof.prove()
    assert {row["case"] for row in rows} == set(proof.runnable())
    for row in rows:
        assert proof.allowed(row) is None or proof.off(row) <= proof.allowed(row), row
