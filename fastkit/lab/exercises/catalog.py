"""All exercises, in the order of the course."""

import importlib
import importlib.util

from fastkit.errors import FastkitError
from fastkit.lab.exercises import capstone, moving, rows, tiles
from fastkit.lab.exercises.exercise import Exercise
from fastkit.lab.exercises.function import Function
from fastkit.lab.exercises.mend import Mend
from fastkit.lab.exercises.question import Question

COURSE = (
    "measure",
    "first_kernel",
    "coalescing",
    "shared_memory_banks",
    "warp_reductions",
    "tiling",
    "tensor_cores",
    "pipelining",
    "rms_norm",
    "fusion",
    "cross_entropy",
    "flash_attention",
    "flash_backward",
    "nf4",
    "lora",
    "qlora_step",
    "finetune",
    "capstone",
)


def _of_the_course(package: str, collection: str) -> list:
    """What the notebooks' files `package`/<notebook>.py list under the name `collection`."""
    modules = (f"fastkit.lab.{package}.{notebook}" for notebook in COURSE)
    there = filter(importlib.util.find_spec, modules)
    return [one for module in there for one in getattr(importlib.import_module(module), collection)]


EXERCISES: dict[str, Exercise] = {
    exercise.name: exercise
    for exercise in (
        moving.VECTOR_ADD,
        moving.COPY_COALESCED,
        moving.TRANSPOSE_TILE,
        rows.ROW_SUM,
        rows.SOFTMAX_ROWS,
        tiles.MATMUL_TILED,
        rows.RMS_NORM_BACKWARD_DX,
        tiles.SWIGLU_FORWARD,
        rows.CROSS_ENTROPY_LOSS,
        moving.DEQUANT_4BIT,
        *_of_the_course("exercises", "EXERCISES"),
    )
}
QUESTIONS: dict[str, Question] = {
    question.name: question for question in _of_the_course("exercises.questions", "QUESTIONS")
}
MENDS: dict[str, Mend] = {mend.name: mend for mend in capstone.MENDS}
FUNCTIONS: dict[str, Function] = {  # by the name that the notebook has for them, "finetune.labels"
    f"{exercise.notebook}.{exercise.name}": exercise
    for exercise in EXERCISES.values()
    if isinstance(exercise, Function)
}


def find(name: str) -> Exercise | Question | Mend:
    """The exercise of that name, of any kind. Raises FastkitError that lists all, or those of the same notebook."""
    found = EXERCISES | QUESTIONS | MENDS | FUNCTIONS
    if name not in found:
        notebook = f"{name.partition('.')[0]}."
        near = [other for other in found if other.startswith(notebook)] or list(EXERCISES)
        raise FastkitError(f"no exercise is named {name!r}: there are {', '.join(near)}")
    return found[name]
