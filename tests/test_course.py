"""What notebooks share: recorded or measured, predictions held against measurements, what a card can, questions."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from test_plots import check as check_picture
from test_plots import says

from fastkit.errors import FastkitError
from fastkit.kernels.ladders import copy
from fastkit.lab import course, install, notebook, results
from fastkit.lab.cards import KNOWN, find
from fastkit.lab.course import (
    Measurement,
    compare,
    draw,
    known_ceilings,
    measured,
    measured_now,
    modelled_card,
    supports,
)
from fastkit.lab.exercises import check, exercises, hint, solution
from fastkit.lab.exercises.catalog import COURSE, EXERCISES, QUESTIONS
from fastkit.lab.exercises.question import Question
from fastkit.lab.measure import Measured
from fastkit.lab.notebook import show_source, show_step, table

ROWS = [{"stride": 1, "times": 1.0}, {"stride": 8, "times": 7.5}, {"stride": 8.5, "times": None}]
SOURCE = "recorded on a card of the test, 2026-11-24"


def never():
    raise AssertionError("measured without a GPU")


@pytest.fixture
def folder_of_results(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for function in (results.record, results.recorded):
        monkeypatch.setattr(function, "__defaults__", (tmp_path,))
    return tmp_path


@pytest.fixture
def lane(monkeypatch):
    return lambda name: monkeypatch.setattr(course, "lane", lambda: name)


# --- measured


def test_without_a_gpu_the_recorded_rows_are_shown_with_their_card(folder_of_results, lane):
    lane("cpu")
    assert not measured("03_strides", never) and measured("03_strides", never).source == "not measured yet"
    results.record("03_strides", ROWS, "command")
    result = measured("03_strides", never)
    assert result and result.rows == ROWS
    assert re.fullmatch(r"recorded on .+, \d{4}-\d\d-\d\d", result.source)


def test_on_a_gpu_it_is_measured_and_recorded_only_when_asked(folder_of_results, lane, monkeypatch):
    lane("gpu")
    monkeypatch.delenv("FASTKIT_RECORD", raising=False)
    result = measured("03_strides", lambda: ROWS)
    assert (
        result.rows == ROWS and result.source.startswith("measured now on ") and not list(folder_of_results.iterdir())
    )
    monkeypatch.setenv("FASTKIT_RECORD", "1")
    measured("03_strides", lambda: ROWS)
    record = json.loads((folder_of_results / "03_strides.json").read_text())
    assert record["rows"] == ROWS and "notebooks/03_" in record["command"]
    assert measured("03_strides", lambda: []).source.startswith("recorded on ")  # what cannot be measured on this card


def test_values():
    result = Measurement("03_strides", ROWS, SOURCE)
    assert result.value("times", stride=8) == 7.5 and result.value("times", stride=8.5) is None
    assert Measurement("03_strides").value("times", stride=8) is None
    for keys in ({"stride": 9}, {}):
        with pytest.raises(FastkitError, match=r"give keys that choose one of 3, with the columns stride, times"):
            result.value("times", **keys)
    with pytest.raises(FastkitError, match="'ms' for stride=8"):
        result.value("ms", stride=8)


def test_draw():
    result = Measurement("03_strides", ROWS, SOURCE)
    assert draw(result, lambda given: given) is result
    picture = draw(Measurement("03_strides"), lambda given: never())
    check_picture(picture)
    assert says(picture, "not measured yet")


# --- the card that predictions are of


def test_without_a_gpu_predictions_are_of_the_card_of_the_record(lane):
    lane("cpu")
    result = results.recorded("01_ceilings")
    assert modelled_card() is modelled_card("float16") is find(result["card"]["name"])
    reached, source = known_ceilings()
    assert reached.rows() == result["rows"] and reached.card is modelled_card()
    assert source == results.caption(result) == measured("01_ceilings", never).source


def test_on_a_gpu_predictions_are_of_the_card_that_is_here(lane, monkeypatch):
    lane("gpu")
    unknown = dataclasses.replace(KNOWN["RTX 4090"], tensor_tflops={})
    for here, dtype in ((KNOWN["RTX 4090"], "float16"), (KNOWN["T4"], "float16"), (unknown, None)):
        monkeypatch.setattr(course, "present", lambda here=here: here)
        assert modelled_card(dtype) is here
    assert modelled_card("float16") is find(results.recorded("01_ceilings")["card"]["name"])  # a peak that is unknown
    reached = Measured(KNOWN["RTX 4090"], 900.0, {}, 3.0, 10.0)
    monkeypatch.setattr(course, "measure_card", lambda: reached)
    assert known_ceilings() == (reached, measured_now())
    assert known_ceilings(as_recorded=True)[0].rows() == results.recorded("01_ceilings")["rows"]
    assert re.fullmatch(r"measured now on .+, \d{4}-\d\d-\d\d", measured_now())


# --- predictions


@pytest.mark.parametrize(
    ("numbers", "headline"),
    [
        ((2.0, 8.0, 7.6), "You said 2; the model says 8; measured 7.6 times: the model is within 6%"),
        ((None, 8.0, 7.6), "The model says 8; measured 7.6 times: the model is within 6%"),
        ((2.0, 8.0, None), "You said 2; the model says 8 times; not measured yet"),
        ((2.0, 8.0, 8.0), "You said 2; the model says 8; measured 8 times: exactly that"),
        ((2.0, 8.0, 4.0), "You said 2; the model says 8; measured 4 times: the model is 2 times too high"),
        ((2.0, 8.0, 16.0), "You said 2; the model says 8; measured 16 times: the model is 2 times too low"),
        ((2.0, 8.0, 0.0), "You said 2; the model says 8; measured 0 times: the model is wrong"),
        ((20000.0, 1e6, 1.01e6), "You said 20,000; the model says 1,000,000; measured 1,010,000 times: the model"),
    ],
)
def test_compare(numbers, headline):
    picture = compare(*numbers, "times", SOURCE)
    check_picture(picture)
    assert picture.headline.replace("\n", " ").startswith(headline)
    assert says(picture, SOURCE) == (numbers[2] is not None)
    if numbers[2] is not None:
        (bar,) = [patch for patch in picture.axes[0].patches if patch.get_gid() == "bar measured"]
        assert bar.get_width() == numbers[2]


def test_what_compare_refuses():
    with pytest.raises(FastkitError, match="needs a source"):
        compare(1.0, 2.0, 3.0, "ms")
    for mine in ("2", float("nan"), [1]):
        with pytest.raises(FastkitError, match="a prediction is a number, not"):
            compare(mine, 2.0, None)


# --- what a card can


@pytest.mark.parametrize(
    ("arch", "features"),
    [
        ("", set()),
        ("sm_75", set()),
        ("sm_80", {"bf16", "tensor_cores"}),
        ("sm_89", {"bf16", "tensor_cores", "fp8"}),
        ("sm_90", {"bf16", "tensor_cores", "fp8", "tma"}),
        ("sm_120", {"bf16", "tensor_cores", "fp8", "tma"}),
        ("gfx942", {"bf16", "tensor_cores", "fp8"}),
        ("gfx1100", {"bf16", "tensor_cores"}),
    ],
)
def test_supports(arch, features, monkeypatch, lane, capsys):
    if not arch:
        lane("cpu")
    monkeypatch.setenv("FASTKIT_ARCH", arch)
    course._say_once.cache_clear()
    for _ in range(2):
        assert {feature for feature in course.FEATURES if supports(feature)} == features
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(course.FEATURES) - len(features)  # each once
    assert all((arch or "No GPU") in line for line in said)
    with pytest.raises(FastkitError, match="no feature is called 'fp4'"):
        supports("fp4")


# --- source


def test_steps_show_every_line_and_mark_what_changes():
    step = show_step((copy._strided_kernel, copy.launch_strided), (copy._coalesced_kernel, copy.launch_coalesced)).data
    kept, gone, new = ([line[1:] for line in step.splitlines() if line[:1] == mark] for mark in " -+")
    assert "        offsets = start + lanes * STEPS + step" in gone
    assert "        offsets = start + step * LANES + lanes" in new
    assert "    for step in range(STEPS):" in kept
    after = show_source(copy._coalesced_kernel, copy.launch_coalesced).data.splitlines()
    assert [line[1:] for line in step.splitlines() if line[:1] in " +"] == after
    assert show_step(copy.copy, copy.copy).data == "no line differs"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (18487.001, "18,487"),
        (-1978.9, "-1,979"),
        (989.4, "989.4"),
        (25.0844, "25.084"),
        (0.0, "0.000"),
        (math.inf, "inf"),
        (18487, "18487"),
        (None, "None"),
        ("a < b\nc", "a &lt; b<br>c"),
    ],
)
def test_a_table_shows_no_more_digits_than_are_read(value, shown):
    assert f">{shown}</td>" in table([{"what": value}]).data


def test_start_says_lane_place_and_card(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    lane = notebook.start()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["lane", "place", "card"]
    assert said[0].split()[1] == f"{lane}:" and torch.__version__.partition("+")[0] in said[1]
    assert ("no GPU" in said[2]) == (lane == "cpu")
    for variable, place in (("COLAB_RELEASE_TAG", "Colab"), ("KAGGLE_KERNEL_RUN_TYPE", "Kaggle")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "x")
            assert notebook.place() == place


# --- the setup cell


ROOT = Path(__file__).parent.parent
SETUP = ROOT / "tests" / "setup_cell.py"


def run_setup(folder: Path) -> subprocess.CompletedProcess:
    """The setup cell in `folder`, by a Python that has every package but fastkit."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": sysconfig.get_path("purelib")}  # without what its .pth files add
    command = [sys.executable, "-S", "-c", SETUP.read_text() + "\nimport fastkit\nprint(fastkit.__file__, lane)"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("where", [".", "notebooks"])
def test_the_setup_cell_runs_from_a_clone(where, tmp_path):
    """In the folder that holds the clone, and inside of it; what is installed already satisfies pip."""
    (tmp_path / "fastkit").symlink_to(ROOT)
    done = run_setup(tmp_path if where == "." else tmp_path / "fastkit" / where)
    assert done.returncode == 0, done.stderr
    lane, *_, last = done.stdout.splitlines()
    assert lane.startswith("lane   cpu: kernels run in Triton's interpreter")
    assert last.endswith("fastkit/__init__.py cpu") and "/site-packages/" not in last


@pytest.mark.slow
def test_without_a_clone_the_setup_cell_says_what_to_do(tmp_path):
    done = run_setup(tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: clone fastkit into this folder (!git clone ADDRESS), then run this cell again"
    )


def test_installing_keeps_torch_and_what_is_imported(monkeypatch):
    asked = {}

    def pip(command, **named):
        asked["pinned"] = Path(command[command.index("-c") + 1]).read_text().splitlines()
        asked["wanted"] = command[command.index("-c") + 2 :]
        return subprocess.CompletedProcess(command, 0, "", "")

    imported = install._imported() - {"gguf"}  # which another test may have imported
    monkeypatch.setattr(install, "_imported", lambda: imported)
    monkeypatch.setattr(install.subprocess, "run", pip)
    install.install(ROOT)
    assert f"torch=={install._versions()['torch']}" in asked["pinned"]
    assert any(line.startswith("matplotlib==") for line in asked["pinned"])  # imported by the plots
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in asked["wanted"]]
    assert "gguf" in names and not {"torch", "triton", "numpy", "matplotlib"} & set(names)


def test_where_pip_fails_its_last_word_is_the_error(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "much\nERROR: No matching distribution found for gguf\n")
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **named: failed)
    with pytest.raises(FastkitError, match="could not install what fastkit needs: ERROR: No matching distribution"):
        install.install(ROOT)


# --- questions


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_complete(name):
    question = QUESTIONS[name]
    assert name.partition(".")[0] in COURSE and name not in EXERCISES
    assert re.search(r"[.?]\)?$", question.task) and exercises(name)._repr_markdown_() == question.task
    assert len(question.hints) >= 3 and len(set(question.hints)) == len(question.hints)
    assert str(hint(name, 1)).endswith(question.hints[0]) and str(solution(name)) == question.solution
    assert str(check(name, None)) == f"{name}: not answered yet" and not check(name, None)


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_answer_is_right_and_every_mistake_is_named(name):
    question = QUESTIONS[name]
    right = question.right
    for accepted in right if isinstance(right, tuple) else (right,):
        verdict = check(name, accepted)
        assert verdict and question.solution in str(verdict)
    assert len(question.wrong) >= 3
    for wrong, why in question.wrong.items():
        verdict = check(name, wrong)
        assert not verdict and verdict.message == why and len(why) > 15, wrong
        assert f'try hint("{name}")' in str(verdict)


SPEED = Question("measure.speed", "How many GB/s?", 120.0, "s", ("a", "b", "c"), {60: "half"}, 0.05, "GB/s")
LIMIT = Question("measure.limit", "Which?", ("memory", "the memory"), "s", ("a", "b", "c"), {"cache": "not that far"})


@pytest.mark.parametrize(
    ("question", "given", "says"),
    [
        (SPEED, 124, "right"),
        (SPEED, "119.5", "right"),
        (SPEED, torch.tensor(120), "right"),
        (SPEED, 61, "half"),
        (SPEED, 0.12, "0.12 is 1e-3 times the answer: look at the unit, GB/s"),
        (SPEED, 120e9, "1.2e+11 is 1e9 times the answer"),
        (SPEED, 960, "960 is 8 times the answer: a byte has 8 bits"),
        (SPEED, 15, "15 is an eighth of the answer"),
        (SPEED, 90, "90 is too low"),
        (SPEED, 150, "150 is too high"),
        (SPEED, True, "give a number, not True"),
        (SPEED, "many", "give a number, not 'many'"),
        (SPEED, [1, 2], "give a number, not [1, 2]"),
        (LIMIT, " Memory", "right"),
        (LIMIT, "the_memory", "right"),
        (LIMIT, "cache", "not that far"),
        (LIMIT, "luck", "'luck' is not the word"),
        (LIMIT, 3, "give a word, not 3"),
    ],
)
def test_what_is_said_to_answers(question, given, says):
    verdict = question.check(given)
    assert bool(verdict) == (says == "right")
    assert says in str(verdict).splitlines()[0]


def test_mistakes_may_follow_from_the_answer():
    question = Question("measure.a", "?", lambda: 8, "s", (), lambda right: {right / 2: "half"})
    assert question.check(8) and question.check(4).message == "half"


def test_a_skeleton_is_no_answer():
    def vector_add(x, y, out): ...

    def documented(x, y, out):
        """Add."""

    for nothing in (vector_add, documented, None):
        assert str(check("vector_add", nothing)) == "vector_add: not answered yet"


def test_questions_of_the_same_notebook_are_listed():
    with pytest.raises(FastkitError, match=r"no exercise is named 'nothing\.at_all': there are vector_add"):
        check("nothing.at_all", 3)
