"""Run an answer once, on one case, and find what is wrong with it."""

import inspect
import re
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastkit.lab.exercises.exercise import Exercise, Output, Truth
from fastkit.lab.exercises.finding import Finding, Findings
from fastkit.lab.exercises.memory import GUARD, POISON, Memory
from fastkit.lab.exercises.watch import Watch, theirs

TOO_MUCH = 0.02  # an error of this part of the terms is a wrong result, a smaller one lost digits


@dataclass(frozen=True)
class Case:
    """Sizes, and how matrices lie in memory: "" contiguous, "rows apart", "transposed"."""

    sizes: tuple[tuple[str, int], ...]
    layout: str = ""

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes)
        return f"{sizes}, {self.layout}" if self.layout else sizes


@dataclass
class Trial:
    """What a run found, None if nothing, and the programs of its largest launch."""

    finding: Finding | None
    programs: int = 0


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
    try:
        inspect.signature(answer).bind(*arguments)
    except TypeError:
        message = f"call it as {exercise.signature}: yours takes {inspect.signature(answer)}"
        watch.findings.add(Finding("signature", message))
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


def raised(error: BaseException) -> Finding:
    """What an exception says of the answer that it came out of."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    if isinstance(root, SystemExit):
        return Finding("exit", f"ended the process: sys.exit({root.code!r})", [], _raised_at(root))
    text = str(root).strip().splitlines() or [""]
    if isinstance(root, SyntaxError):
        return Finding("syntax", f"is not Python: {root.msg}", [], (root.filename, root.lineno))
    if type(error).__name__ == "CompilationError":
        return Finding("compile", "Triton cannot compile the kernel", str(error).strip().splitlines()[-3:])
    if "illegal memory access" in text[0]:
        return Finding("crash", "it touched memory that is not its own, and the GPU stopped it")
    if isinstance(root, MemoryError) or "allocate memory" in text[0] or "out of memory" in text[0]:
        bytes_asked = re.search(r"allocate (\d+) bytes", text[0])
        how_much = f"{int(bytes_asked[1]):,} bytes" if bytes_asked else text[0]
        return Finding("memory", f"asks for more memory than it may have: {how_much}", [], _raised_at(root))
    if isinstance(root, RecursionError):
        text = ["it calls itself without end"]
    return Finding("exception", f"raised {type(root).__name__}: {text[0]}", [], _raised_at(root))


def _raised_at(error: BaseException) -> tuple[str, int] | None:
    place, traceback = None, error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if theirs(file):
            place = (file, traceback.tb_lineno)
        traceback = traceback.tb_next
    return place


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
    first, last = (_index(name, unwritten.shape, int(place)) for place in (missing[0], missing[-1]))
    which = first if count == 1 else f"{first} to {last}"
    message = f"leaves numbers of {name} unwritten"
    return Finding("unwritten", message, [f"{count} of {buffer.tensor.numel()} have no value: {which}"])


def _check_values(buffer, truth: Truth, findings: Findings) -> None:
    result = buffer.tensor.detach().cpu().double()
    error = (result - truth.value).abs()
    allowed = truth.allowed(buffer.tensor.dtype)
    wrong = ~(error <= allowed)  # nan is wrong
    if not wrong.any():
        return
    place = int(wrong.flatten().nonzero()[0])
    at = _index(buffer.name, wrong.shape, place)
    got, expected = (float(tensor.flatten()[place]) for tensor in (result, truth.value))
    lines = [
        f"{at} is {got:.9g}; expected {expected:.9g}, with an error of up to {float(allowed.flatten()[place]):.2g}",
        f"{int(wrong.sum())} of {wrong.numel()} numbers are wrong",
    ]
    if result.isfinite().all() and (error <= TOO_MUCH * truth.scale)[wrong].all():
        message = f"{buffer.name} is right only in its first digits: something was rounded or summed too coarsely"
        findings.add(Finding("precision", message, lines))
    else:
        finite = bool(result[wrong].isfinite().all())
        kind = "" if finite else ", some not finite"
        findings.add(Finding("values", f"{buffer.name} has wrong values{kind}", lines, finite=finite))


def _index(name: str, shape, place: int) -> str:
    index = []
    for size in reversed(shape):
        place, rest = divmod(place, size)
        index.insert(0, str(rest))
    return f"{name}[{', '.join(index)}]"
