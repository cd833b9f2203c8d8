"""The tool that makes the committed outputs: who measures runs alone, and only outputs are taken over."""

from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from execute_notebooks import Turns, adopt, execute, shown_widgets
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

MEASURED = """\
import time
def measured(name):
    begun = time.time()
    time.sleep(0.4)
    print(begun, time.time())
measured("one")
"""
OTHER = "import time\nbegun = time.time()\ntime.sleep(0.2)\nprint(begun, time.time())"


def written(path, *sources, **metadata):
    cells = [new_markdown_cell("# A notebook"), *map(new_code_cell, sources)]
    for n, cell in enumerate(cells):
        cell["id"] = f"cell-{n}"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel | metadata), path)
    return path


def code(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.slow
def test_a_cell_that_measures_runs_alone(tmp_path):
    (out := tmp_path / "out").mkdir()
    sources = (OTHER, MEASURED, OTHER, OTHER)
    paths = [written(tmp_path / f"{name}.ipynb", *sources) for name in "ab"]
    turns = Turns()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda path: execute(path, out, turns), paths)) == ["", ""]
    spans = [
        (n == 1, *map(float, cell.outputs[0].text.split())) for p in paths for n, cell in enumerate(code(out / p.name))
    ]
    for alone, begun, ended in spans:
        others = [(start, end) for _, start, end in spans if (start, end) != (begun, ended)]
        assert not alone or all(end <= begun or ended <= start for start, end in others)
    adopt(out / "a.ipynb", paths[0])
    assert [cell.execution_count for cell in code(paths[0])] == [1, 2, 3, 4]
    assert [cell.outputs for cell in code(paths[0])] == [cell.outputs for cell in code(out / "a.ipynb")]


@pytest.mark.slow
def test_a_cell_that_raises_is_told_and_not_taken_over(tmp_path):
    (out := tmp_path / "out").mkdir()
    path = written(tmp_path / "a.ipynb", "1 / 0", "print(1)")
    before = path.read_text()
    assert "ZeroDivisionError" in execute(path, out, Turns())
    with pytest.raises(ValueError, match="a cell raised: '1 / 0'"):
        adopt(out / "a.ipynb", path)
    assert path.read_text() == before


def test_outputs_of_other_cells_are_refused(tmp_path):
    executed, path = written(tmp_path / "a.ipynb", "print(1)"), written(tmp_path / "b.ipynb", "print(2)")
    with pytest.raises(ValueError, match="executed from other cells"):
        adopt(executed, path)


def test_the_state_of_the_widgets_that_are_shown_comes_with_them(tmp_path):
    def widgets(names):
        return {"of a kind": {"state": {name: {} for name in names}, "version": 2}}

    executed = written(tmp_path / "a.ipynb", "1", widgets=widgets(["shown", "past"]))
    notebook = nbformat.read(executed, as_version=4)
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "shown"}}
    notebook.cells[-1].outputs = [new_output("display_data", view)]
    nbformat.write(notebook, executed)
    path = written(tmp_path / "b.ipynb", "1")
    adopt(executed, path)
    assert nbformat.read(path, as_version=4).metadata.widgets == widgets(["shown"])
    adopt(written(tmp_path / "c.ipynb", "1"), path)
    assert "widgets" not in nbformat.read(path, as_version=4).metadata


def test_of_widgets_what_is_shown_is_kept():
    state = {
        "box": {"state": {"children": ["IPY_MODEL_slider"]}},
        "slider": {"state": {"layout": "IPY_MODEL_wide", "parent": "IPY_MODEL_box"}},
        "wide": {"state": {}},
        "progress": {"state": {"layout": "IPY_MODEL_narrow"}},
        "narrow": {"state": {}},
    }
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "box"}}
    cells = [{"cell_type": "markdown"}, {"outputs": [{"data": {"text/plain": "1"}}, {"text": "x"}, {"data": view}]}]
    assert list(shown_widgets(state, cells)) == ["box", "slider", "wide"]
    assert shown_widgets(state, cells[:1]) == {}
