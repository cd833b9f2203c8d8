"""Every stored answer of the exercises is examined: right ones pass, wrong ones are rejected for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from examine_answers import stored

from fastkit.lab.exercises.catalog import EXERCISES
from fastkit.lab.sources import child_environment

pytestmark = [pytest.mark.course, pytest.mark.xdist_group("answers")]  # examined together, for minutes

STORED = stored()
RIGHT = [*(f"solution/{name}" for name in EXERCISES), *(name for name in STORED if name.startswith("right/"))]
WRONG = {name: fault for name, (_, _, fault) in STORED.items() if fault}
TRACED = {name for name, fault in WRONG.items() if fault == "demand"}  # right, as far as the interpreter can tell


@pytest.fixture(scope="module")
def examined():
    """What the checker finds in every solution and stored answer, by its name."""
    script = Path(__file__).parent / "examine_answers.py"
    env = child_environment(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    children = [
        subprocess.Popen([sys.executable, script, f"{part}/2"], env=env, stdout=subprocess.PIPE, text=True)
        for part in range(2)
    ]
    lines = [line for child in children for line in child.communicate()[0].splitlines()]
    assert not any(child.returncode for child in children)
    return {result["name"]: result for result in map(json.loads, lines)}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass(name, examined):
    result = examined[name]
    assert result["property"] == "" and result["passed"] >= 12 and result["left_out"] == 0, result


@pytest.mark.parametrize("name", [name for name in WRONG if name not in TRACED])
def test_wrong_answers_are_rejected_for_what_is_wrong(name, examined):
    result = examined[name]
    assert result["property"] == WRONG[name], result
    assert "=" in result["case"] and result["message"][0]
    seen_in_the_run = {"out of bounds", "race", "dtype", "reads unwritten", "calls torch", "masked lanes"}
    assert result["property"] not in seen_in_the_run or result["place"][0] == "<answer>", result


@pytest.mark.parametrize(
    ("name", "case", "message"),
    [
        ("vector_add__mask_one_too_far", "N=1", "program (0,) reads x_ptr + 1; x is [1]"),
        ("vector_add__grid_rounded_down", "N=1025", "1 of 1025 have no value: out[1024]"),
        ("vector_add__one_shape", "N=1", "is right for one shape only, N=1024"),
        ("softmax_rows__rows_taken_for_neighbours", "M=2, N=1, rows apart", "not for rows that lie apart"),
        ("softmax_rows__zeros_for_masked_lanes", "N=3", "is right only where N is a power of two"),
        ("softmax_rows__long_rows_unwritten", "M=1, N=1025", "1 of 1025 have no value: out[0, 1024]"),
        ("row_sum__adds_without_atomics", "M=1, N=257", "reads out[0], which another program wrote in the same launch"),
        ("vector_add__returns_its_input", "N=1", "returns its input x"),
        ("vector_add__stores_float16", "N=1", "writes out in numbers of 2 bytes; it holds float32"),
        ("vector_add__overwrites_its_input", "N=1", "writes x[0], an input"),
    ],
)
def test_messages_show_the_smallest_case(name, case, message, examined):
    result = examined[f"wrong/{name}"]
    assert result["case"].endswith(case) and message in "\n".join(result["message"]), result
