"""Execute notebooks for the outputs that are committed, several at a time; what measures runs alone.

python tests/execute_notebooks.py OUT 09 10 12      on a GPU: records in data/results, executed copies in OUT
python tests/execute_notebooks.py --adopt OUT       anywhere: their outputs into notebooks/

Much of a notebook's time is the CPU's: it compiles, traces, examines answers. So notebooks run side by side, JOBS at a
time; a cell that measures waits until no other cell runs, and others wait for it.
"""

import argparse
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from prepare_notebooks import NOTEBOOKS

MEASURES = re.compile(r"\b(measured|known_ceilings|train)\(")
JOBS = 4


class Turns:
    """Any number of cells at a time, or one that is alone; who would be alone goes before those that come later."""

    def __init__(self):
        self.changed = threading.Condition()
        self.running, self.alone, self.waiting = 0, False, 0

    @contextmanager
    def turn(self, alone: bool):
        with self.changed:
            if alone:
                self.waiting += 1
                self.changed.wait_for(lambda: not self.running)
                self.waiting -= 1
            else:
                self.changed.wait_for(lambda: not self.alone and not self.waiting)
            self.running, self.alone = self.running + 1, alone
        try:
            yield
        finally:
            with self.changed:
                self.running, self.alone = self.running - 1, False
                self.changed.notify_all()


class Client(NotebookClient):
    """Executes a notebook's cells as `turns` allows."""

    turns: Turns

    async def async_execute_cell(self, cell, cell_index, **options):
        if cell.cell_type != "code":
            return cell
        with self.turns.turn(bool(MEASURES.search(cell.source))):  # a thread for each notebook: waiting stops no other
            return await super().async_execute_cell(cell, cell_index, **options)


def execute(notebook: Path, out: Path, turns: Turns) -> str:
    """Execute a copy of `notebook` in `out`, in the notebooks' folder; what went wrong, or ""."""
    start, found = time.monotonic(), nbformat.read(notebook, as_version=4)
    client = Client(
        found,
        timeout=900,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(notebook.parent.resolve())}},
    )
    client.turns, failed = turns, ""
    try:
        client.execute()
    except CellExecutionError as error:
        failed = str(error)
    nbformat.write(found, out / notebook.name)
    print(f"{notebook.stem}: {'FAILED' if failed else 'done'} in {time.monotonic() - start:.0f} s", flush=True)
    return failed


def adopt(executed: Path, notebook: Path) -> None:
    """Put outputs, counts and the state of the widgets that are shown of `executed` into `notebook`.

    Raises ValueError if their cells differ, or something was raised.
    """
    new, old = (nbformat.read(path, as_version=4) for path in (executed, notebook))
    if [cell.source for cell in new.cells] != [cell.source for cell in old.cells]:
        raise ValueError(f"{executed} was executed from other cells than those of {notebook}")
    for ours, theirs in zip(old.cells, new.cells, strict=True):
        if ours.cell_type == "code":
            if any(output.output_type == "error" for output in theirs.outputs):
                raise ValueError(f"{executed}: a cell raised: {theirs.source[:60]!r}")
            ours.outputs, ours.execution_count = theirs.outputs, theirs.execution_count
    old.metadata.pop("widgets", None)
    for kind, widgets in new.metadata.get("widgets", {}).items():
        if shown := shown_widgets(widgets["state"], new.cells):
            old.metadata.setdefault("widgets", {})[kind] = widgets | {"state": shown}
    nbformat.write(old, notebook)


def shown_widgets(state: dict, cells: list) -> dict:
    """Of widgets' `state` what outputs show, and what that consists of: not the bars of a progress that is past."""
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    views = [output.get("data", {}).get("application/vnd.jupyter.widget-view+json") for output in outputs]
    todo, found = [view["model_id"] for view in views if view], set()
    while todo:
        if (name := todo.pop()) in state and name not in found:
            found.add(name)
            todo += re.findall(r"IPY_MODEL_(\w+)", json.dumps(state[name]))
    return {name: state[name] for name in state if name in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adopt", action="store_true", help="put what lies in OUT into notebooks/")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("notebooks", nargs="*", metavar="NN", help="numbers of notebooks; all by default")
    parser.add_argument("--jobs", type=int, default=JOBS, help="notebooks at a time")
    arguments = parser.parse_args()
    chosen = [path for path in NOTEBOOKS if not arguments.notebooks or path.stem[:2] in arguments.notebooks]
    if arguments.adopt:
        for path in chosen:
            if (executed := arguments.out / path.name).is_file():
                adopt(executed, path)
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ["FASTKIT_RECORD"] = "1"
    turns = Turns()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        failed = [said for said in pool.map(lambda path: execute(path, arguments.out, turns), chosen) if said]
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
