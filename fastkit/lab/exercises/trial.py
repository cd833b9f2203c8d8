"""Run an answer once, on one case, and find what is wrong with it."""

import warnings
import zlib
from collections.abc import Callable

import torch

from fastkit.lab.exercises.blame import raised, uncallable
from fastkit.lab.exercises.case import Case, Trial
from fastkit.lab.exercises.exercise import Exercise, Output, Truth
from fastkit.lab.exercises.finding import Finding, Findings
from fastkit.lab.exercises.memory import GUARD, POISON, Memory
from fastkit.lab.exercises.values import index, wrong_values
from fastkit.lab.exercises.watch import Watch


def run_trial(exercise: Exercise, answer: Callable, case: Case, seed: int, device="cpu", reverse=False) -> Trial:
    """Run `answer` on fresh inputs of `case`. The same seed gives the same inputs."""
    watch, arguments, truth = _run(exercise, answer, case, seed, device, reverse, masked_poison=True)
    if truth is not None:
        _check(watch, exercise, arguments, truth)
    finding = watch.findings.worst()
    if finding and finding.property in ("values", "precision") and watch.masked_without_other:
        again, arguments, truth = _run(exercise, answer, case, seed, device, reverse, masked_poison=False)
        if truth is not None and not again.findings:
            _check(again, exercise, arguments, truth)
        if not again.findings:
            message = "lanes that a load masks off, without other=, reach the result: on a GPU they hold anything"
            finding = Finding("masked lanes", message, finding.lines, watch.masked_without_other)
    return Trial(finding, watch.programs)


def _run(exercise, answer, case, seed, device, reverse, masked_poison):
    """(watch, inputs by name, truth); truth is None if the answer did not come to its end."""
    sizes = dict(case.sizes)
    inputs = exercise.inputs(torch.Generator().manual_seed(seed ^ zlib.crc32(str(case).encode())), sizes)
    memory = Memory(device)
    arguments = _arguments(exercise, memory, inputs, exercise.outputs(sizes), case.layout)
    for constant in getattr(answer, "__globals__", {}).values():
        if isinstance(constant, torch.Tensor):
            memory.adopt(constant)
    watch = Watch(memory, reverse, masked_poison)
    if finding := uncallable(answer, arguments, exercise.signature):
        watch.findings.add(finding)
        return watch, inputs, None
    try:
        with warnings.catch_warnings(), watch.on():
            warnings.simplefilter("ignore")  # the interpreter's numpy warns of overflow in masked lanes
            watch.returned = answer(*arguments)
            if device == "cuda":
                torch.cuda.synchronize()
    except BaseException as error:
        watch.findings.add(raised(error))
        return watch, inputs, None
    return watch, inputs, exercise.truth(inputs)


def _arguments(exercise: Exercise, memory: Memory, inputs: dict, outputs: dict[str, Output], layout: str) -> list:
    """The answer's arguments, in guarded memory. An input that begins with _ is for the truth alone."""
    strided = {name.removesuffix(".T"): name.endswith(".T") for name in exercise.strided}

    def strides(name, shape):
        if layout and name in strided and len(shape) == 2:
            if layout == "transposed" and strided[name]:
                return (1, shape[0])
            return (shape[1] + 3 + len(name), 1)  # another gap in x than in out
        return torch.empty(shape, device="meta").stride()

    arguments = []
    for name, value in inputs.items():
        if name.startswith("_"):
            continue
        if isinstance(value, torch.Tensor):
            value = memory.place(name, "input", value.shape, value.dtype, strides(name, value.shape), value)
        arguments.append(value)
    for name, output in outputs.items():
        arguments.append(memory.place(name, "output", output.shape, output.dtype, strides(name, output.shape)))
    return arguments


def _check(watch: Watch, exercise: Exercise, inputs: dict, truth: dict[str, Truth]) -> None:
    """Add to the watch's findings what the memory shows after the run."""
    memory, findings = watch.memory, watch.findings
    for buffer in memory.of_role("input"):
        if not torch.equal(buffer.raw, buffer.before):
            findings.add(Finding("inputs changed", f"{buffer.name}, an input, was changed"))
    if not watch.launches:
        findings.add(Finding("no kernel", "launches no Triton kernel"))
    outputs = memory.of_role("output")
    if memory.device == "cuda":
        _check_guards(outputs, findings)
        missing = {buffer.name: _untouched(buffer.tensor) for buffer in outputs}
    else:
        missing = {buffer.name: ~_by_place(buffer, buffer.stored) for buffer in outputs}
    for name, unwritten in missing.items():
        if unwritten.any():
            findings.add(_unwritten(memory[name], unwritten, watch))
        else:
            _check_values(memory[name], truth[name], findings)
    returned = watch.returned
    if returned is not None and findings.keys() & {"unwritten", "no kernel", "calls torch"}:
        findings.add(_returned(returned, memory, exercise))
        if findings.keys() & {"no kernel", "unwritten"} and "calls torch" not in findings:
            findings.pop("no kernel", None)


def _returned(returned, memory: Memory, exercise: Exercise) -> Finding:
    what = f"a {type(returned).__name__}"
    if isinstance(returned, torch.Tensor):
        owner = memory.owner(returned.data_ptr())
        what = f"its input {owner.name}" if owner and owner.role == "input" else "a tensor"
    outputs = ", ".join(buffer.name for buffer in memory.of_role("output"))
    return Finding("returns", f"returns {what}: the result belongs into {outputs}, which {exercise.signature} is given")


def _by_place(buffer, flags) -> torch.Tensor:
    """Flags of a buffer's elements as a tensor of its tensor's shape."""
    found = torch.zeros(buffer.tensor.numel(), dtype=torch.bool)
    inside = buffer.places >= 0
    found[torch.from_numpy(buffer.places[inside])] = torch.from_numpy(flags[inside])
    return found.reshape(buffer.tensor.shape)


def _untouched(tensor: torch.Tensor) -> torch.Tensor:
    """Where all of a number's bytes are still POISON."""
    data = tensor.contiguous().view(-1).view(torch.uint8).reshape(*tensor.shape, tensor.dtype.itemsize)
    return (data == POISON).all(-1).cpu()


def _check_guards(outputs, findings: Findings) -> None:
    """On a GPU, where accesses are not seen, a write beyond a tensor shows in what lies around it."""
    for buffer in outputs:
        itemsize = buffer.tensor.dtype.itemsize
        nobodys = torch.ones(buffer.raw.numel(), dtype=torch.bool)
        owned = torch.from_numpy(buffer.places >= 0).repeat_interleave(itemsize)
        nobodys[GUARD : GUARD + len(owned)] = ~owned
        changed = ((buffer.raw.cpu() != POISON) & nobodys).nonzero().flatten()
        if len(changed):
            elements = (changed - GUARD).div(itemsize, rounding_mode="floor").numpy()
            message = f"writes memory that is not {buffer.name}'s"
            findings.add(Finding("out of bounds", message, [f"it wrote {buffer.labels(elements)}"]))


def _unwritten(buffer, unwritten: torch.Tensor, watch: Watch) -> Finding:
    missing = unwritten.flatten().nonzero().flatten()
    name, count = buffer.name, len(missing)
    if not watch.launches or count == buffer.tensor.numel():
        return Finding("unwritten" if watch.launches else "no kernel", f"no kernel writes {name}")
    first, last = (index(name, unwritten.shape, int(place)) for place in (missing[0], missing[-1]))
    which = first if count == 1 else f"{first} to {last}"
    message = f"leaves numbers of {name} unwritten"
    return Finding("unwritten", message, [f"{count} of {buffer.tensor.numel()} have no value: {which}"])


def _check_values(buffer, truth: Truth, findings: Findings) -> None:
    if finding := wrong_values(buffer.name, buffer.tensor, truth):
        findings.add(finding)
