"""Demands on the compiled kernel, which the tracer predicts without a GPU. No launch of the answer runs for this."""

import dataclasses

import torch

from fastkit.errors import FastkitError
from fastkit.lab.exercises.exercise import ANSWER, Demand, Exercise
from fastkit.lab.exercises.verdict import Verdict
from fastkit.lab.sources import Source

ARCH = "sm_80"


def prepare() -> None:
    """Start the processes that trace, which takes seconds, while the answer is checked."""
    from fastkit.lab.worker import COMPILER, INTERPRETER

    COMPILER.start()
    INTERPRETER.start()


def unmet(exercise: Exercise, source: Source, verdict: Verdict) -> Verdict:
    """`verdict`, which found nothing, or one that names the first demand that is not met."""
    from fastkit.lab.tracer import trace_launches

    inputs = exercise.inputs(torch.Generator().manual_seed(verdict.seed), exercise.example)
    arguments = [value for name, value in inputs.items() if not name.startswith("_")]
    arguments += [torch.empty(o.shape, dtype=o.dtype) for o in exercise.outputs(exercise.example).values()]
    answer = source.load(ANSWER)
    case = ", ".join(f"{name}={size}" for name, size in exercise.example.items())
    try:
        traces = trace_launches(lambda: answer(*arguments), arch=ARCH)
    except FastkitError as error:
        failed = {"property": "compile", "message": f"cannot be traced for {ARCH}: {error}"}
        return dataclasses.replace(verdict, passed=False, case=case, **failed)
    for demand in exercise.demands:
        measured, worst = measure(demand, traces)
        if measured is None:
            verdict.lines.append(f"unknown: {demand} ({worst.unknown if worst else 'no such access'})")
        elif measured > demand.at_most:
            where = source_line(source, worst) if worst else ""
            what = f"{demand.measure.replace('_', ' ')} of the {demand.kind}s"
            message = f"{what}: {measured:.3g}, where {demand.at_most:g} can be had"
            lines = [f"as the tracer predicts it for {ARCH} at {case}"]
            replaced = {"property": "demand", "message": message, "lines": lines, "where": where}
            return dataclasses.replace(verdict, passed=False, case=None, right=[], **replaced)
        else:
            verdict.lines.append(f"{demand}: {measured:.3g}")
    return verdict


def measure(demand: Demand, traces: list):
    """(the demand's measure over all launches, the access that is worst); None for what is unknown."""
    accesses = [a for trace in traces for a in trace.accesses if a.kind == demand.kind and a.bits]
    if demand.measure == "conflicts":
        counts = [trace.conflicts for trace in traces]
        return (None if None in counts else sum(counts)), None
    unknown = next((access for access in accesses if access.bytes_moved is None), None)
    if unknown or not accesses:
        return None, unknown
    if demand.measure == "sectors_per_request":
        worst = max(accesses, key=lambda access: access.sectors_per_request or 0)
        return worst.sectors_per_request, worst
    asked = sum(access.bytes_asked for access in accesses)
    worst = max(accesses, key=lambda access: access.bytes_moved - access.bytes_asked)
    return (sum(access.bytes_moved for access in accesses) / asked if asked else None), worst


def source_line(source: Source, access) -> str:
    """Where an access stands, in the words of the answer's author."""
    for line, text in enumerate(source.text.splitlines(), 1):
        if text.strip() == access.source:
            return source.where(line)
    return f"line {access.line}: {access.source}"
