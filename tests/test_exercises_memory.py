"""What the checker knows of memory: which bytes belong to whom, and what a run did to them."""

import numpy as np
import pytest
import torch

from fastkit.lab.exercises.exercise import Truth
from fastkit.lab.exercises.finding import PROPERTIES, Finding, Findings
from fastkit.lab.exercises.memory import GUARD, POISON, Memory
from fastkit.lab.exercises.trial import _check_guards, _check_values, _untouched
from fastkit.lab.exercises.watch import Watch


@pytest.fixture
def memory():
    memory = Memory("cpu")
    memory.place("x", "input", (3, 4), torch.float32, (6, 1), torch.arange(12.0).view(3, 4))
    memory.place("y", "output", (3, 4), torch.float16, (1, 3))
    return memory


def test_a_tensor_lies_between_guards(memory):
    x = memory["x"]
    assert torch.equal(x.tensor, torch.arange(12.0).view(3, 4)) and x.tensor.stride() == (6, 1) and x.span == 16
    assert (x.raw[:GUARD] == POISON).all() and (x.raw[-GUARD:] == POISON).all()
    assert x.start % 16 == 0 and x.tensor.data_ptr() == x.start
    assert x.places.tolist() == [0, 1, 2, 3, -1, -1, 4, 5, 6, 7, -1, -1, 8, 9, 10, 11]
    assert torch.as_strided(x.tensor, (2,), (1,), x.tensor.storage_offset() + 4).isnan().all()
    assert memory["y"].tensor.isnan().all() and x.written.all() and not memory["y"].written.any()


def test_elements_have_names(memory):
    x, y = memory["x"], memory["y"]
    assert [x.label(element) for element in (0, 9, 4, -1, 16)] == [
        "x[0, 0]", "x[1, 3]", "x_ptr + 4", "x_ptr - 1", "x_ptr + 16",
    ]  # fmt: skip
    assert y.label(5) == "y[2, 1]" and y.labels(np.array([3, 0, 3])) == "2 elements, y[0, 0] to y[0, 1]"


def test_owners_of_addresses(memory):
    for name in ("x", "y"):
        buffer = memory[name]
        for address in (buffer.low, buffer.start, buffer.high - 1):
            assert memory.owner(address) is buffer
    last = max(memory.buffers, key=lambda buffer: buffer.high)
    assert memory.owner(last.high + 2**40) is None and memory.nearest(last.high + 2**40) is last


def test_tensors_of_the_answer_are_adopted_and_filled(memory):
    watch = Watch(memory)
    with watch.on():
        scratch = torch.empty(8)
        zeros = torch.zeros(3, 2)
        memory["y"].tensor[:, 1:3].fill_(0)
        view = zeros.t()[1:].reshape(-1)
        assert not watch.findings
        (zeros + 1).sum()
    assert scratch.isnan().all() and view.shape == (3,)
    assert memory.owner(scratch.data_ptr()).role == memory.owner(zeros.data_ptr()).role == "scratch"
    assert memory["y"].written.tolist() == [False] * 3 + [True] * 6 + [False] * 3 and not memory["y"].stored.any()
    finding = watch.findings["calls torch"]
    assert "calls torch's add" in finding.message and finding.place[0] == __file__


def test_the_interpreter_is_left_as_it_was(memory):
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    hooked = [
        (InterpretedFunction, "run"),
        *((InterpreterBuilder, f"create_masked_{kind}") for kind in ("load", "store")),
    ]
    before = [getattr(cls, name) for cls, name in hooked]
    with pytest.raises(ZeroDivisionError), Watch(memory).on():
        assert all(getattr(cls, name) is not old for (cls, name), old in zip(hooked, before, strict=True))
        1 / 0  # noqa: B018
    assert [getattr(cls, name) for cls, name in hooked] == before


@pytest.mark.parametrize(
    ("byte", "element"), [(-2, "y_ptr - 1"), (24, "y_ptr + 12"), (24 + GUARD - 1, "y_ptr + 32779")]
)
def test_a_changed_guard_band_tells_the_element(byte, element, memory):
    findings = Findings()
    _check_guards(memory.of_role("output"), findings)
    assert not findings
    memory["y"].raw[GUARD + byte] = 0
    _check_guards(memory.of_role("output"), findings)
    assert findings["out of bounds"].lines == [f"it wrote {element}"]


def test_a_changed_gap_between_rows():
    memory, findings = Memory("cpu"), Findings()
    memory.place("out", "output", (2, 3), torch.float32, (5, 1)).fill_(1)
    _check_guards(memory.of_role("output"), findings)
    assert not findings
    torch.as_strided(memory["out"].tensor, (1,), (1,), memory["out"].tensor.storage_offset() + 4).fill_(0)
    _check_guards(memory.of_role("output"), findings)
    assert findings["out of bounds"].lines == ["it wrote out_ptr + 4"]


def test_untouched_numbers(memory):
    y = memory["y"].tensor
    y[1, 2] = float("nan")  # a number that a kernel wrote, though it is none
    assert (~_untouched(y)).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("error", "property"), [(0.0, ""), (1e-7, ""), (1e-4, "precision"), (0.5, "values"), (float("nan"), "values")]
)
def test_values(error, property):
    memory, findings = Memory("cpu"), Findings()
    memory.place("out", "output", (4, 5), torch.float32, (5, 1)).fill_(1.0)
    memory["out"].tensor[2, 3] += error
    truth = torch.ones(4, 5, dtype=torch.float64)
    _check_values(memory["out"], Truth(truth, truth), findings)
    assert list(findings) == ([property] if property else [])
    if property:
        assert findings[property].lines[0].startswith("out[2, 3] is ") and "1 of 20" in findings[property].lines[1]


def test_the_finding_that_explains_others_comes_first():
    findings = Findings()
    for property in ("values", "out of bounds", "race"):
        findings.add(Finding(property, "first"))
        findings.add(Finding(property, "second"))
    assert findings.worst() == Finding("out of bounds", "first") and len(set(PROPERTIES)) == len(PROPERTIES)
