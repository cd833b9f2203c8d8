"""The exercises and their checker. Every stored answer is examined in test_answers.py."""

import ast
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from examine_answers import ANSWERS, stored

from fastkit.errors import FastkitError
from fastkit.lab.exercises import check, exercises, hint, solution
from fastkit.lab.exercises.catalog import EXERCISES
from fastkit.lab.exercises.examine import Case, cases
from fastkit.lab.exercises.exercise import Demand, Truth
from fastkit.lab.exercises.finding import PROPERTIES
from fastkit.lab.exercises.process import Child
from fastkit.lab.sources import read

STORED = stored()
WRONG = {name: fault for name, (_, _, fault) in STORED.items() if fault}


def test_answers_cover_all_exercises_and_faults():
    assert len(WRONG) >= 50
    for exercise in EXERCISES:
        assert sum(name.startswith(f"wrong/{exercise}__") for name in WRONG) >= 4, exercise
    from_outside = {"syntax", "exit", "memory", "compile", "exception", "time", "crash"}  # see ENDINGS, and on a GPU
    assert set(WRONG.values()) == set(PROPERTIES) - from_outside


# How an answer may end its process, or never begin: (text, property, what the verdict says, the line it points to)
ENDINGS = {
    "endless loop": (
        "def vector_add(x, y, out):\n    while True:\n        pass\n",
        "time", "has not ended after 4 s: a loop without end", "answer line",
    ),
    "endless kernel": (
        solution("vector_add").replace("    mask =", "    while tl.program_id(0) >= 0:\n        pass\n    mask ="),
        "time", "has not ended after 4 s", "line 8: while tl.program_id(0) >= 0:",
    ),
    "a C function that does not end": (
        "def vector_add(x, y, out):\n    return 10 ** 10 ** 9\n",
        "time", "has not ended after 4 s", "line 2: return 10 ** 10 ** 9",
    ),
    "null pointer": (
        "import ctypes\n\ndef vector_add(x, y, out):\n    ctypes.string_at(0)\n",
        "crash", "segmentation fault", "line 4: ctypes.string_at(0)",
    ),
    "sys.exit": (
        "import sys\n\ndef vector_add(x, y, out):\n    sys.exit(3)\n",
        "exit", "ended the process: sys.exit(3)", "line 4: sys.exit(3)",
    ),
    "os._exit": (
        "import os\n\ndef vector_add(x, y, out):\n    print('bye', flush=True)\n    os._exit(0)\n",
        "exit", "ended the process, with exit code 0", "printed: bye",
    ),
    "huge tensor": (
        "import torch\n\ndef vector_add(x, y, out):\n    torch.empty(2**40)\n",
        "memory", "asks for more memory than it may have: 4,398,046,511,104 bytes", "line 4: torch.empty(2**40)",
    ),
    "at import": ("1 / 0\n", "exception", "raised ZeroDivisionError", "line 1: 1 / 0"),
    "no Python": ("def vector_add(x, y, out):\n    return x +\n", "syntax", "invalid syntax", "line 2: return x +"),
    "another name": ("def add(x, y, out):\n    pass\n", "exception", "it defines no function vector_add", "defined"),
    "no such function": (
        solution("vector_add").replace("tl.store(", "tl.stoer("),
        "exception", "has no attribute 'stoer'", "tl.stoer(out_ptr + cols, x + y, mask=mask)",
    ),
    "in generated code": (
        "from dataclasses import dataclass, field\n\n@dataclass\nclass Size:\n"
        "    n: int = field(default_factory=next)\n\ndef vector_add(x, y, out):\n    Size()\n",
        "exception", "raised TypeError", "line 8: Size()",
    ),
    "in Python's library": (
        "import json\n\ndef vector_add(x, y, out):\n    json.loads('')\n",
        "exception", "raised JSONDecodeError", "line 4: json.loads('')",
    ),
    "calls itself": (
        "def vector_add(x, y, out):\n    vector_add(x, y, out)\n",
        "exception", "RecursionError: it calls itself without end", "line 2: vector_add(x, y, out)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def verdicts():
    """Real checks, two at a time: the ENDINGS, a right answer, and one from a file."""
    jobs = {name: ("vector_add", text, 4 if ends == "time" else 60) for name, (text, ends, *_) in ENDINGS.items()}
    jobs["right"] = ("vector_add", solution("vector_add"), None)
    jobs["a file"] = ("dequant_4bit", ANSWERS / "right" / "dequant_4bit_pairs.py", None)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(lambda job: check(*job), jobs.values()), strict=True))


@pytest.mark.parametrize("name", ENDINGS)
def test_no_end_is_a_dead_notebook(name, verdicts):
    verdict = verdicts[name]
    _, property, message, where = ENDINGS[name]
    assert not verdict and verdict.property == property, verdict
    assert message in str(verdict) and where in str(verdict), verdict
    assert "Traceback" not in str(verdict)


def test_real_checks(verdicts):
    verdict = verdicts["right"]
    assert verdict and str(verdict).startswith("vector_add: right\n  16 cases, interpreted on the CPU")
    assert verdicts["a file"]


@pytest.mark.slow
def test_demands():
    verdict = check("copy_coalesced", solution("copy_coalesced"))
    assert verdict and "bytes moved per byte asked of every load: at most 1.1: 1" in str(verdict)
    verdict = check("copy_coalesced", STORED["wrong/copy_coalesced__lanes_down_a_column"][1])
    assert not verdict and verdict.property == "demand", verdict
    assert "bytes moved per byte asked of the loads: 8, where 1.1 can be had" in str(verdict), verdict
    assert "line 11: x = tl.load(x_ptr + rows * stride_xm + col, mask=mask)" in str(verdict), verdict


@pytest.mark.slow
def test_demands_of_other_kinds():
    from fastkit.lab.exercises.demands import measure
    from fastkit.lab.tracer import trace_launches

    source = read(STORED["wrong/copy_coalesced__lanes_down_a_column"][1], "copy_coalesced")
    copy, x = source.load("<answer>"), torch.empty(64, 1024)
    traces = trace_launches(lambda: copy(x, torch.empty(64, 1024)), arch="sm_80")
    for demand, expected in {
        Demand("load", "sectors_per_request", 4): 32,
        Demand("store", "sectors_per_request", 4): 32,
        Demand("store", "bytes_moved_per_byte_asked", 1.1): 8,
        Demand("load", "conflicts", 0): 0,
    }.items():
        assert measure(demand, traces)[0] == expected, demand


def test_an_answer_of_this_process():
    import triton
    import triton.language as tl

    BLOCK = 128

    @triton.jit
    def add_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
        cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < N)
        tl.store(out_ptr + cols, x + tl.load(y_ptr + cols), mask=cols < N)

    def add(x, y, out):
        add_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, out, x.numel(), BLOCK=BLOCK)

    verdict = check("vector_add", add, seed=5)
    assert not verdict and verdict.property == "out of bounds" and verdict.case == "N=1"
    assert "test_exercises.py line" in str(verdict) and "tl.load(y_ptr + cols)" in str(verdict)
    assert "reads 127 elements, y_ptr + 1 to y_ptr + 127" in str(verdict) and "seed=5" in str(verdict)
    assert "<b>vector_add, out of bounds: reads memory past the end of y</b>" in verdict._repr_html_()
    assert repr(verdict) == str(verdict)


@pytest.mark.parametrize(
    ("exercise", "fault", "seed"),
    [
        ("attention_dk_dv", "mask_turned_round", 1936511324),  # overflows in half of the cases
        ("attend_causal", "no_maximum", 1395917040),  # and in all but one
        ("rms_norm_backward_dx", "mean_over_the_block", 574871472),  # near the truth in most
    ],
)
def test_a_smallest_case_near_the_truth_does_not_hide_a_wrong_result(exercise, fault, seed):
    name = f"wrong/{exercise}__{fault}"
    verdict = check(exercise, ANSWERS / f"{name}.py", seed=seed)
    assert not verdict and verdict.property == WRONG[name], verdict


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("vector_ad", "def f():\n    pass\n", "no exercise is named 'vector_ad': there are vector_add, copy_coalesced"),
        ("vector_add", 3, "expected a function, a file or source text, got a int"),
        ("vector_add", "nowhere.py", "no file nowhere.py"),
    ],
)
def test_clear_errors(name, answer, message):
    with pytest.raises(FastkitError) as caught:
        check(name, answer)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_check_inside_an_answer(monkeypatch):
    monkeypatch.setenv("FASTKIT_INSIDE_CHECK", "1")
    with pytest.raises(FastkitError, match="called by the answer itself"):
        check("vector_add", solution("vector_add"))


def test_hints_one_at_a_time():
    shown = [str(hint("row_sum")) for _ in range(4)]
    assert [text[:11] for text in shown] == ["hint 1 of 3", "hint 2 of 3", "hint 3 of 3", "hint 3 of 3"]
    assert str(hint("row_sum", 1)) == shown[0] and 'solution("row_sum")' in shown[3]
    with pytest.raises(FastkitError, match="hints 1 to 3: there is no hint 4"):
        hint("row_sum", 4)


@pytest.mark.parametrize("name", EXERCISES)
def test_exercises_are_complete(name):
    exercise = EXERCISES[name]
    assert exercises()[name] == exercise.task and exercise.task.endswith(".") and exercise.details in exercises(name)
    assert len(exercise.hints) == 3 and exercise.signature.startswith(f"{name}(")
    (definition,) = [d for d in ast.parse(exercise.solution).body if getattr(d, "name", "") == name]
    assert exercise.signature == f"{name}({ast.unparse(definition.args)})"
    assert solution(name) == exercise.solution and solution(name)._repr_markdown_().startswith("```python\n")
    tried = cases(exercise, seed=1)
    volumes = [torch.tensor([size for _, size in case.sizes]).prod().item() for case in tried]
    assert volumes == sorted(volumes) and volumes[0] == 1 and len(set(tried)) == len(tried) >= 12
    for size in exercise.largest:
        values = {dict(case.sizes)[size] for case in tried}
        assert 1 in values and any(v > 1 and v & (v - 1) == 0 for v in values) and any(v > 2 and v % 2 for v in values)
    assert {case.layout for case in tried} == ({""} if not exercise.strided else {case.layout for case in tried} | {""})
    assert ("rows apart" in {case.layout for case in tried}) == bool(exercise.strided)
    assert cases(exercise, seed=1) == tried != cases(exercise, seed=2)


@pytest.mark.parametrize("name", EXERCISES)
def test_truths_are_exact_and_tolerances_small(name):
    exercise = EXERCISES[name]
    sizes = dict(cases(exercise, seed=3)[-1].sizes)
    inputs = exercise.inputs(torch.Generator().manual_seed(0), sizes)
    for output, truth in exercise.truth(inputs).items():
        kind = exercise.outputs(sizes)[output]
        assert truth.value.dtype == truth.scale.dtype == torch.float64 and truth.value.shape == kind.shape
        assert truth.value.isfinite().all() and truth.value.abs().max() < torch.finfo(kind.dtype).max
        allowed = truth.allowed(kind.dtype)
        assert ((truth.value.to(kind.dtype).double() - truth.value).abs() <= allowed).all() or name == "transpose_tile"
        assert allowed.max() <= 1e-3 * truth.scale.max() + 1e-3


def test_a_rounding_is_allowed_and_no_more():
    value = torch.tensor([1.0, 0.0, 2**-24], dtype=torch.float64)
    allowed = Truth(value, value).allowed(torch.float16)
    assert allowed[0] == pytest.approx(2**-11, rel=0.01) and 0 < allowed[1] <= 2**-24
    assert Truth(value, value).allowed(torch.float32)[0] == 8 * 2**-23


def test_case_text():
    assert str(Case((("M", 2), ("N", 3)), "rows apart")) == "M=2, N=3, rows apart"


GPU_WRONG = {
    "vector_add__missing_mask": "out of bounds",
    "vector_add__last_one_unwritten": "unwritten",
    "vector_add__calls_torch": "calls torch",
    "vector_add__overwrites_its_input": "inputs changed",
    "softmax_rows__no_maximum": "values",
    "transpose_tile__strides_taken_for_granted": "strides",
    "row_sum__accumulates_in_float16": "precision",
}


@pytest.mark.gpu
def test_compiled_answers():
    """The GPU's half of a check, by itself."""
    jobs = {name: (name, exercise.solution) for name, exercise in EXERCISES.items()}
    jobs |= {name: STORED[f"wrong/{name}"][:2] for name in GPU_WRONG}
    jobs["no such function"] = ("vector_add", ENDINGS["no such function"][0])

    def run(job):
        return Child(job[0], read(job[1], job[0]), "cuda", 60.0, 0).verdict()

    with ThreadPoolExecutor(4) as pool:
        verdicts = dict(zip(jobs, pool.map(run, jobs.values()), strict=True))
    for name, verdict in verdicts.items():
        expected = "" if name in EXERCISES else GPU_WRONG.get(name, "compile")
        assert verdict.property == expected, verdict


def test_loops_of_children_end_with_them():
    text = textwrap.dedent(
        """
        import subprocess, sys

        def vector_add(x, y, out):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
            print(child.pid, flush=True)
            child.wait()
        """
    )
    verdict = check("vector_add", text, seconds=1)
    pid = int(verdict.printed)
    assert verdict.property == "time"
    status = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the answer's own process is still running"
        time.sleep(0.05)
