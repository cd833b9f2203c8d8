"""Copies the notebooks with small parameters put in, to be run by nbval or papermill: prepare_notebooks.py FOLDER.

prepare_notebooks.py --stamp     puts tests/setup_cell.py into the first code cell of every notebook of the course
"""

import sys
from pathlib import Path

import nbformat
import papermill
from tiny import tiny_data

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("[0-9]*.ipynb"))
SETUP = Path(__file__).with_name("setup_cell.py").read_text().strip()


def small_parameters(notebook: Path, folder: Path) -> dict:
    """Parameters that make `notebook` short; empty for one without a `parameters` cell."""
    cells = nbformat.read(notebook, as_version=4).cells
    if not any("parameters" in cell.metadata.get("tags", []) for cell in cells):
        return {}
    data = tiny_data(folder / "data")
    output = folder / f"run-{notebook.stem}"
    return {"data": str(data), "steps": 4, "few_steps": 4, "max_length": 96, "output": str(output)}


def prepare(folder: Path) -> list[Path]:
    """Write the copies to `folder`, outputs kept for nbval to compare with."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True)
    copies = []
    for notebook in NOTEBOOKS:
        copies.append(folder / notebook.name)
        parameters = small_parameters(notebook, folder)
        papermill.execute_notebook(notebook, copies[-1], parameters, prepare_only=True, progress_bar=False)
    return copies


def stamp() -> None:
    """Put the setup cell into every notebook that begins with an earlier text of it."""
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        if first.source.startswith(SETUP.splitlines()[0]) and first.source != SETUP:
            first.source = SETUP
            nbformat.write(notebook, path)


if __name__ == "__main__":
    stamp() if sys.argv[1] == "--stamp" else prepare(Path(sys.argv[1]))
