"""What every notebook of the course does: measure or recall, draw, hold a prediction against it, ask what a card can.

result = measured("03_strided_copy", measure_strides)   # rows of this card, else the recorded ones
here = modelled_card()                                  # the card that those are of, for predictions
draw(result, picture)                                    # picture(result), or how to get it
compare(my_prediction, 8.0, result.value("times", stride=32), "times", result.source)
"""

import datetime
import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from fastkit.errors import FastkitError
from fastkit.lab import results
from fastkit.lab.cards import Card, find, present
from fastkit.lab.device import card, lane
from fastkit.lab.measure import Measured
from fastkit.lab.measure import measure as measure_card
from fastkit.lab.plots.paper import Picture, unknown
from fastkit.lab.plots.prediction import prediction
from fastkit.lab.turns import turn

FEATURES = {  # what it is called, and the first of NVIDIA's architectures to have it
    "bf16": ("bfloat16 arithmetic", 80),
    "tensor_cores": ("Triton's way to tensor cores", 80),
    "fp8": ("FP8 arithmetic", 89),
    "tma": ("the copy engine for tiles (TMA)", 90),
}
CEILINGS = "01_ceilings"  # recorded by notebook 01, on the card whose numbers the notebooks show without a GPU
AMD = {"gfx942": {"bf16", "tensor_cores", "fp8"}, "gfx1100": {"bf16", "tensor_cores"}}


@dataclass(frozen=True)
class Measurement:
    """Rows of numbers, and where they come from: "measured now on CARD, DATE", "recorded on CARD, DATE".

    Without rows it is false, and its source "not measured yet".
    """

    name: str
    rows: list[dict] = field(default_factory=list)
    source: str = "not measured yet"

    def __bool__(self) -> bool:
        return bool(self.rows)

    def value(self, what: str, /, **keys) -> float | None:
        """The number in column `what` of the one row in which all of `keys` hold; None where nothing was measured.

        Raises FastkitError where no row or more than one is meant.
        """
        if not self.rows:
            return None
        found = [row for row in self.rows if all(row.get(key) == value for key, value in keys.items())]
        if len(found) != 1 or what not in found[0]:
            wanted = ", ".join(f"{key}={value!r}" for key, value in keys.items()) or "no keys"
            columns = ", ".join(dict.fromkeys(column for row in self.rows for column in row))
            raise FastkitError(
                f"{self.name}: {what!r} for {wanted} stands in {len(found)} rows: give keys that choose one of "
                f"{len(self.rows)}, with the columns {columns}"
            )
        return found[0][what]


def measured(name: str, measure: Callable[[], list[dict]]) -> Measurement:
    """On a GPU what `measure()` gives, rows as in fastkit.lab.results; else what was recorded as `name`; else nothing.

    name  of the recorded result, which begins with the notebook's number: "03_strided_copy"

    One process at a time measures on a GPU (see `turns`). With FASTKIT_RECORD=1 in the environment, what a GPU gives is
    recorded in data/results.
    """
    if lane() == "gpu" and (rows := _in_turn(measure)):
        if os.environ.get("FASTKIT_RECORD") == "1":
            results.record(name, rows, f"FASTKIT_RECORD=1 papermill notebooks/{name[:2]}_*.ipynb out.ipynb")
        return Measurement(name, rows, measured_now())
    return recall(name)


def measured_now() -> str:
    """The source of what is measured here and now: "measured now on CARD, DATE", CARD being the CPU without a GPU."""
    return f"measured now on {card()['name']}, {datetime.date.today().isoformat()}"


def _in_turn(measure: Callable):
    with turn():
        return measure()


def recall(name: str) -> Measurement:
    """What was recorded as `name`, on any lane; a Measurement without rows where nothing was."""
    if not (results.RESULTS / f"{name}.json").is_file():
        return Measurement(name)
    result = results.recorded(name)
    return Measurement(name, result["rows"], results.caption(result))


def modelled_card(dtype: str | None = None) -> Card:
    """The card that a notebook's predictions are of: the one here; without a GPU the one that 01_ceilings was recorded
    on, so that a prediction and the recorded number beside it are of one card.

    dtype  a key of Card.tensor_tflops, for predictions that need that peak: a card here of which it is unknown gives
           way to the recorded one as well

    Units as in fastkit.lab.cards; `known_ceilings` says what the card reached. Raises FastkitError where that was
    recorded on a card that is not in the table.
    """
    if lane() == "gpu":
        here = present()
        if dtype is None or dtype in here.tensor_tflops:
            return here
    return find(results.recorded(CEILINGS)["card"]["name"])


def known_ceilings(as_recorded: bool = False) -> tuple[Measured, str]:
    """What the modelled card was measured to reach, for `fastkit.lab.roofline.rates`, and the source of that.

    On a GPU that is measured, once a process; without one, or `as_recorded`, it is what 01_ceilings holds. Units as in
    fastkit.lab.measure, errors as in `modelled_card`.
    """
    if lane() == "gpu" and not as_recorded:
        return _in_turn(measure_card), measured_now()
    kept = results.recorded(CEILINGS)
    found = {row["what"]: row["measured"] for row in kept["rows"]}
    matrix = {what.split()[1].strip(","): tflops for what, tflops in found.items() if what.startswith("matmul ")}
    launch = found["an empty kernel, us"], found["a launch, us of the host"]
    return Measured(find(kept["card"]["name"]), found["copy, GB/s"], matrix, *launch), results.caption(kept)


def draw(result: Measurement, picture: Callable[[Measurement], Picture]) -> Picture:
    """`picture(result)`; of a result without rows, a picture that says how to get them."""
    if result:
        return picture(result)
    return unknown(result.name.replace("_", " "), "not measured yet. Run this notebook on a machine with a GPU.")


def compare(mine: float | None, model: float, value: float | None, unit: str = "", source: str = "") -> Picture:
    """The learner's number, the model's and the measured one, as bars of one scale; None for one that is not there.

    Raises FastkitError for a measured value without a source.
    """
    return prediction(mine, model, value, unit, source)


def supports(feature: str) -> bool:
    """Whether the card here has `feature`: "bf16", "tensor_cores", "fp8" or "tma". Says so, once, where it has not.

    FASTKIT_ARCH=sm_75 in the environment makes a card answer as if it were a T4. Raises FastkitError for other names.
    """
    if feature not in FEATURES:
        raise FastkitError(f"no feature is called {feature!r}: ask for {', '.join(FEATURES)}")
    lacking = _lacking(feature, os.environ.get("FASTKIT_ARCH") or (card()["arch"] if lane() == "gpu" else ""))
    if lacking:
        _say_once(lacking)
    return not lacking


def _lacking(feature: str, arch: str) -> str:
    """Why a card of `arch`, "" for none, lacks `feature`; "" if it does not."""
    words, first = FEATURES[feature]
    if not arch:
        return f"No GPU here, so {words} cannot be tried: the cells that need it say so and go on."
    if number := re.fullmatch(r"sm_(\d+)", arch):
        has = int(number[1]) >= first
        return (
            "" if has else f"This card is {arch}; {words} begins at sm_{first}: the cells that need it go on without."
        )
    return "" if feature in AMD.get(arch, ()) else f"This card is {arch}, without {words}: its cells go on without."


@functools.cache
def _say_once(sentence: str) -> None:
    print(sentence)
