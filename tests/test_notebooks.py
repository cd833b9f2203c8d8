"""Every notebook runs from top to bottom through papermill; the fine-tune leaves what it promises."""

import json
from pathlib import Path

import nbformat
import papermill
import pytest
from prepare_notebooks import NOTEBOOKS, small_parameters

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
    parameters = small_parameters(notebook, tmp_path)
    executed = tmp_path / notebook.name
    papermill.execute_notebook(notebook, executed, parameters, cwd=str(tmp_path), progress_bar=False)
    if "output" not in parameters:
        return
    run = json.loads((Path(parameters["output"]) / "metrics.json").read_text())
    assert run["steps"] == 4 and len(run["losses"]) == 4
    for when in ("before", "after"):
        assert run[when]["facts"]["of"] == 2 and run[when]["samples"] and run[when]["validation_loss"] > 0
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "logits equal to stock peft's within 1e-4: True" in printed
    assert "canary facts known" in printed


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_carries_outputs_and_no_error(notebook):
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in cells)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
