"""The capstone: its step is right and has five faults, and each check rejects what is mended by half."""

import re
from dataclasses import replace
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from half_mended import HALF, PART, planted
from prepare_notebooks import NOTEBOOKS, SETUP
from prose import unbacked

from fastkit.lab import capstone
from fastkit.lab.accounts import account_of
from fastkit.lab.capstone import PLANTED
from fastkit.lab.exercises import check, exercises, hint, solution
from fastkit.lab.exercises.catalog import MENDS, QUESTIONS
from fastkit.lab.exercises.part_truths import wrong_numbers
from fastkit.lab.gluon_interpreter import gluon_on_cpu
from fastkit.lab.sources import read
from fastkit.lab.step_faults import FAULTS

HALVES = [(fault, name) for fault, halves in HALF.items() for name in halves]


def part_of(text: str, part: str):
    return read(text, part).load(f"<{part}, {len(text)}, {hash(text)}>")  # a file name of its own: its source stays


def with_part(part: str, text: str) -> capstone.Parts:
    return replace(PLANTED, **{part: part_of(text, part)})


@pytest.fixture(scope="module")
def mended() -> dict:
    """The stored solution of each fault, by its part."""
    return {part: part_of(solution(f"capstone.{fault}"), part) for fault, part in PART.items()}


# --- the step


def test_the_planted_step_is_right():
    assert wrong_numbers(PLANTED, list(capstone.Parts.__dataclass_fields__)) is None


def test_a_step_is_its_mathematics():
    batch = capstone.batch(37, 72, 41, "cpu", seed=3)
    x, target, weight, gate_up, down = (getattr(batch, name).double() for name in capstone.Batch.__dataclass_fields__)
    with gluon_on_cpu():
        y = capstone.step(PLANTED, batch)
    gate, up = (torch.nn.functional.rms_norm(x, [72], weight, capstone.EPS) @ gate_up).chunk(2, dim=1)
    a = torch.nn.functional.silu(gate) * up
    expected = x + a @ down
    dw = a.T @ (expected - target)
    assert dw.norm() > capstone.MOST  # it is clipped
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=5e-3)
    moved, lr = batch.down.double() - down, capstone.LR
    torch.testing.assert_close(moved, -lr * dw / dw.norm(), rtol=0, atol=2e-4)


def test_the_calls_are_those_of_the_step():
    def did(function):
        account = account_of(function)
        launches = [(launch.name, launch.grid) for launch in account.launches]
        return launches, account.passes, len(account.waits)

    batch = capstone.batch()
    whole = did(lambda: capstone.step(PLANTED, batch))
    calls = [did(call) for call in capstone.calls(PLANTED, batch).values()]
    combine = next(launches for launches, *_ in calls if launches and launches[0][0] == "_combine_kernel")
    apart = sorted([launch for launches, *_ in calls for launch in launches] + combine)  # twice in a step
    assert sorted(whole[0]) == apart
    assert whole[1] == [one for _, passes, _ in calls for one in passes]
    assert whole[2] == sum(waits for *_, waits in calls) == 1


# --- the accounts


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x.sum().item(), "reads a number"),
        (lambda x: bool(x.max() > 1), "reads a number"),
        (lambda x: float(x.sum()), "reads a number"),
        (lambda x: x.cpu(), "copies to the host"),
        (lambda x: x.to("cpu", torch.float32), "copies to the host"),
        (lambda x: torch.empty(4, 4).copy_(x), "copies to the host"),
        (lambda x: x.tolist(), "copies to the host"),
        (lambda x: x[x > 0], "needs a result's size"),
        (lambda x: torch.nonzero(x), "needs a result's size"),
        (lambda x: torch.equal(x, x), "compares and reads the answer"),
        (lambda x: torch.cuda.synchronize(), "synchronises"),
    ],
)
def test_waits_are_found(function, why):
    waits = account_of(lambda: function(torch.empty(4, 4, device="meta"))).waits
    assert waits[0].why == why and waits[0].file == __file__ and "lambda x" in waits[0].source


def test_no_waits_where_there_are_none():
    x = torch.empty(4, 4, device="meta")
    account = account_of(lambda: torch.where(x > 0, x, 0.0).mul_((1 / x.norm()).clamp(max=1.0)).half())
    assert account.waits == [] and account.launches == []


def test_an_account_lets_errors_out():
    with pytest.raises(ZeroDivisionError):
        account_of(lambda: 1 / 0)


# --- the checks


def test_each_fault_has_a_check_and_is_there():
    assert [f"capstone.{fault}" for fault in FAULTS] == list(MENDS) == [f"capstone.{fault}" for fault in PART]
    for fault, find in FAULTS.items():
        found = find(PLANTED)
        assert found and PART[fault] in found.message, fault


@pytest.mark.parametrize("fault", FAULTS)
def test_the_unmended_step_and_no_answer_are_no_answers(fault):
    for answer in (None, PLANTED):
        verdict = check(f"capstone.{fault}", answer)
        assert not verdict and "not answered yet" in str(verdict)
    verdict = check(f"capstone.{fault}", capstone.norm)
    assert not verdict and "give the step's parts" in str(verdict)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_solution_mends_its_fault_and_no_other(fault, mended):
    parts = replace(PLANTED, **{PART[fault]: mended[PART[fault]]})
    verdict = check(f"capstone.{fault}", parts)
    assert verdict, verdict
    assert [other for other, find in FAULTS.items() if find(parts) is None] == [fault]


@pytest.mark.parametrize(("fault", "name"), HALVES)
def test_half_a_mend_is_rejected(fault, name):
    text, told = HALF[fault][name]
    verdict = check(f"capstone.{fault}", with_part(PART[fault], text))
    assert not verdict and told in str(verdict), verdict


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rewritten_step_with_its_fault_is_rejected(fault):
    """Another function that does the same: not the planted one itself, and none the better."""
    part = PART[fault]
    verdict = check(f"capstone.{fault}", with_part(part, planted(part)))
    assert not verdict and part in str(verdict), verdict


def test_all_mended(mended):
    parts = replace(PLANTED, **mended)
    assert [fault for fault, find in FAULTS.items() if find(parts)] == []
    batches = [capstone.batch(70, 200, 72, "cpu", seed=1) for _ in range(2)]
    with gluon_on_cpu():
        before, after = (capstone.step(each, batch) for each, batch in zip((PLANTED, parts), batches, strict=True))
    torch.testing.assert_close(after, before, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(batches[1].down, batches[0].down, rtol=2e-3, atol=2e-3)


def test_a_step_without_the_turn_is_right(mended):
    """The product takes any strides: the surest mend of a transpose is to make none."""
    parts = replace(PLANTED, **mended | {"turn": lambda x: x.T})
    for fault in FAULTS:
        assert check(f"capstone.{fault}", parts), fault


def test_a_mend_that_brings_another_fault_fails_there(mended):
    def gate(hidden):
        assert hidden.sum() != 7  # a look that costs a wait
        return mended["gate"](hidden)

    parts = replace(PLANTED, **mended | {"gate": gate})
    assert check("capstone.needless_copy", parts)
    verdict = check("capstone.synchronisation", parts)
    assert not verdict and "gate: the host waits" in str(verdict) and "assert hidden.sum()" in str(verdict)


def test_what_an_answer_raises_is_its_verdict():
    def clip(dw):
        return dw.no_such_thing()

    verdict = check("capstone.synchronisation", replace(PLANTED, clip=clip))
    assert not verdict and verdict.property == "exception" and "no_such_thing" in str(verdict)


def test_tasks_and_hints():
    for name in MENDS:
        assert exercises(name)._repr_markdown_() and "hint 1 of 3" in hint(name, 1)
        assert "```python" in solution(name)._repr_markdown_()


# --- the notebooks

CAPSTONE = NOTEBOOKS[0].parent / "18_capstone.ipynb"
SOLVED = CAPSTONE.parent / "solutions" / CAPSTONE.name
both = pytest.mark.parametrize("notebook", [CAPSTONE, SOLVED], ids=["asked", "solved"])


def code_of(notebook: Path) -> list:
    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


@both
def test_form(notebook):
    first, *rest = code_of(notebook)
    assert first.source == SETUP
    assert all(len(cell.source.splitlines()) <= 30 for cell in rest)
    assert not [o for cell in (first, *rest) for o in cell.outputs if o.output_type == "error"]
    assert unbacked(nbformat.read(notebook, as_version=4)) == []


def test_the_notebook_has_the_courses_form():
    text = [cell.source for cell in nbformat.read(CAPSTONE, as_version=4).cells if cell.cell_type == "markdown"]
    promise = text[0].partition("In the next two hours you will")[2]
    assert text[0].startswith("# 18 · Capstone\n") and len(re.findall(r"^\d\. ", promise, flags=re.M)) == 3
    whole = "\n\n".join(text)
    sections = re.findall(r"^## (.+)$", whole, flags=re.M)
    assert sections[-3:] == ["Takeaways", "Questionnaire", "Where it returns"]
    assert whole.partition("## Questionnaire")[2].count("<details>") == 5
    assert {"Predict", "Measure", "Explain"} <= set(re.findall(r"^\*\*(\w+)\.\*\*", whole, flags=re.M))


def test_the_notebook_asks_for_every_mend():
    code = "\n".join(cell.source for cell in code_of(CAPSTONE))
    for name in [*MENDS, *(name for name in QUESTIONS if name.startswith("capstone."))]:
        assert f'check("{name}"' in code and f'exercises("{name}")' in code
    assert sum(cell.source.startswith("# NBVAL_CHECK_OUTPUT\n") for cell in code_of(CAPSTONE)) >= 5


@pytest.mark.course
def test_the_solution_notebook_mends_every_fault(tmp_path):
    executed = tmp_path / SOLVED.name
    papermill.execute_notebook(SOLVED, executed, cwd=str(tmp_path), progress_bar=False)
    printed = "".join(o.get("text", "") for cell in code_of(executed) for o in cell.outputs)
    for name in MENDS:
        assert f"{name}: right" in printed
