"""What notebooks 03 and 04 demand of the compiled kernel: their solutions meet it, the wrong answers do not."""

import pytest
import torch
from examine_answers import stored

from fastkit.lab.exercises import coalescing, shared_memory_banks
from fastkit.lab.exercises.demands import measure
from fastkit.lab.sources import read
from fastkit.lab.tracer import trace_launches

EXERCISES = {one.name: one for one in (*coalescing.EXERCISES, *shared_memory_banks.EXERCISES)}
DEMANDING = [name for name, exercise in EXERCISES.items() if exercise.demands]
STORED = {name: known for name, known in stored().items() if known[0] in DEMANDING}


def traces(exercise, text, arch="sm_80"):
    inputs = exercise.inputs(torch.Generator().manual_seed(0), exercise.example)
    outputs = [torch.empty(output.shape, dtype=output.dtype) for output in exercise.outputs(exercise.example).values()]
    answer = read(text, exercise.name).load("<answer>")
    return trace_launches(lambda: answer(*inputs.values(), *outputs), arch=arch)


def met(exercise, text) -> list[bool]:
    found = traces(exercise, text)
    return [measure(demand, found)[0] <= demand.at_most for demand in exercise.demands]


@pytest.mark.parametrize("name", DEMANDING)
def test_solutions_meet_the_demands(name):
    assert all(met(EXERCISES[name], EXERCISES[name].solution))


@pytest.mark.parametrize("name", [name for name, (_, _, fault) in STORED.items() if not fault])
def test_so_do_other_right_answers(name):
    exercise, text, _ = STORED[name]
    assert all(met(EXERCISES[exercise], text))


@pytest.mark.parametrize("name", [name for name, (_, _, fault) in STORED.items() if fault == "demand"])
def test_answers_that_waste_traffic_do_not(name):
    exercise, text, _ = STORED[name]
    assert not all(met(EXERCISES[exercise], text))


def test_every_demand_has_a_wrong_answer():
    assert {exercise for exercise, _, fault in STORED.values() if fault == "demand"} == set(DEMANDING)


def test_the_number_to_beat():
    """Sectors a record, as notebook 03 counts them: one load of weight and gradient does with half of what two take."""
    exercise = EXERCISES["update_records"]
    plain = stored()["right/update_records_two_loads"][1]
    for text, sectors in ((plain, 1 + 1 + 4 / 32), (exercise.solution, 1 + 4 / 32)):
        answer = read(text, exercise.name).load("<answer>")
        records, out = torch.zeros(4096, coalescing.FIELDS), torch.zeros(4096)
        (trace,) = trace_launches(
            lambda answer=answer, a=records, b=out: answer(a, 0.1, b), arch="sm_90", programs=None
        )
        assert sum(access.sectors for access in trace.accesses) / len(out) == sectors
