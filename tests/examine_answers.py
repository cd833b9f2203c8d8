"""Examine stored answers in Triton's interpreter, one after another: a process that test_exercises.py starts.

python tests/examine_answers.py 0/2     every second answer, from the first on; prints one JSON object a line
"""

import json
import sys
from pathlib import Path

from seeds import drawn

ANSWERS = Path(__file__).parent / "answers"


def stored() -> dict[str, tuple[str, str, str]]:
    """Each stored answer by its path: (exercise, text, the property that must be reported, "" for a right one)."""
    from fastkit.lab.exercises.catalog import EXERCISES

    found = {}
    for path in sorted(ANSWERS.glob("*/*.py")):
        text = path.read_text()
        (exercise,) = [name for name in EXERCISES if path.stem.startswith(name)]
        fault = "" if path.parent.name == "right" else text.splitlines()[0].removeprefix("# fault: ")
        found[f"{path.parent.name}/{path.stem}"] = (exercise, text, fault)
    return found


def main(part: str) -> None:
    from fastkit.lab.exercises.catalog import EXERCISES, find
    from fastkit.lab.exercises.examine import examine
    from fastkit.lab.sources import read

    answers = {f"solution/{name}": (name, exercise.solution, "") for name, exercise in EXERCISES.items()} | stored()
    first, parts = map(int, part.split("/"))
    for name, (exercise, text, _) in list(answers.items())[first::parts]:
        seed = drawn()
        outcome = examine(find(exercise), read(text, exercise).load("<answer>"), seed, seconds=20)
        finding = outcome.finding
        result = {
            "name": name,
            "seed": seed,
            "property": finding.property if finding else "",
            "message": [finding.message, *finding.lines] if finding else [],
            "place": finding.place if finding else None,
            "case": str(outcome.case) if outcome.case else "",
            "passed": len(outcome.passed),
            "left_out": outcome.left_out,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
