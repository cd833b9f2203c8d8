"""All exercises, in the order of the course."""

from fastkit.errors import FastkitError
from fastkit.lab.exercises import moving, rows, tiles
from fastkit.lab.exercises.exercise import Exercise

EXERCISES = {
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
    )
}


def find(name: str) -> Exercise:
    """The exercise of that name. Raises FastkitError that lists all."""
    if name not in EXERCISES:
        raise FastkitError(f"no exercise is named {name!r}: there are {', '.join(EXERCISES)}")
    return EXERCISES[name]
