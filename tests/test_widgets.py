"""How pictures look and show themselves; exploring them with controls, and without."""

import base64
import itertools
import subprocess
import sys
from dataclasses import replace

import matplotlib
import nbclient
import nbformat
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from test_plots import access, says, shared, texts

from fastkit.errors import FastkitError
from fastkit.lab import plots, widgets
from fastkit.lab.plots import paper


def luminance(colour) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a, b) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_fillings_differ_without_colour_and_text_on_them_can_be_read():
    looks = [paper.GOOD, paper.BAD, paper.EMPTY, paper.OFF, paper.OTHER]
    for a, b in itertools.combinations(looks, 2):
        assert a.get("hatch") != b.get("hatch") or contrast(a["facecolor"], b["facecolor"]) > 3, (a, b)
    assert contrast("white", paper.BLUE) > 4.5
    for colour in (*paper.TINTS, *(look["facecolor"] for look in looks[1:])):
        assert contrast("black", colour) > 4.5
    assert contrast(paper.BLUE, paper.TINTS[0]) > 3  # the tile of this step and those of others


def test_the_style_is_ours_alone_and_nothing_is_left_behind():
    before = dict(matplotlib.rcParams)
    plain = plots.pipeline(5, 2).png()
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 22, "figure.facecolor": "black", "axes.grid": True}):
        assert plots.pipeline(5, 2).png() == plain
    code = "import sys; from fastkit.lab import plots; plots.pipeline(5, 2).png(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    loaded = done.stdout.split()
    assert "matplotlib.figure" in loaded and "matplotlib.pyplot" not in loaded, done.stderr


def test_a_picture_shows_itself_in_a_notebook():
    figure = plots.pipeline(5, 2)
    data, metadata = figure._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == figure.png()
    assert data["text/plain"] == f"<picture: {figure.headline}>" and metadata["image/png"]["width"] == 900


# --- widgets


def test_without_a_kernel_exploring_gives_the_picture():
    figure = widgets.explore(plots.pipeline, load=range(100, 900, 100), compute=200.0, stages=[1, 2])
    assert isinstance(figure, paper.Picture) and "a tile's load takes 500 ns" in " ".join(texts(figure))
    reports = {"row": shared(np.arange(32) * 4), "column": shared(np.arange(32) * 128)}
    assert "No conflicts" in widgets.explore(plots.bank_map, reports).headline
    with pytest.raises(FastkitError, match="nothing to choose"):
        widgets.explore(plots.bank_map, [])


def test_without_ipywidgets_exploring_gives_the_same_picture(monkeypatch):
    choices = dict(load=range(100, 900, 100), compute=200.0, stages=[1, 2])
    before = widgets.explore(plots.pipeline, **choices)
    monkeypatch.setattr(widgets, "_installed", lambda package: False)
    assert widgets.explore(plots.pipeline, **choices).png() == before.png()
    with pytest.raises(FastkitError, match="must be times above 0"):
        widgets.explore(plots.pipeline, load=0, compute=200.0)


def test_controls_choose(monkeypatch):
    monkeypatch.setattr(widgets, "_widgets_run", lambda: True)
    plain = widgets.explore(plots.pipeline, load=5.0, compute=2.0)
    assert isinstance(plain, paper.Picture)  # there is nothing to choose
    one = access(tile=4 * np.arange(8), walk=tuple(((0, 0, 0), 32 * n) for n in range(4)))
    explorer = widgets.explore(plots.tile_walk, [one, replace(one, kind="store")], shape=(4, 8), step=range(6))
    assert list(explorer.controls) == ["report", "step"] and explorer.controls["step"].value == 3
    assert [*explorer.controls["report"].options] == ["load x_ptr, line 7", "store x_ptr, line 7"]
    explorer.controls["step"].value = 1
    assert "step 1" in explorer.picture().headline
    explorer.controls["report"].value = "store x_ptr, line 7"
    assert says(explorer.picture(), "store x_ptr")
    explorer.controls["step"].value = 5
    assert says(explorer.picture(), "there is no step 5")


def test_a_notebook_keeps_the_picture_and_changes_it_in_place():
    code = """from fastkit.lab import plots
from fastkit.lab.widgets import explore
e = explore(plots.pipeline, load=range(100, 900, 100), compute=200.0)
e"""
    cells = [nbformat.v4.new_code_cell(text) for text in (code, "e.controls['load'].value = 800")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=120).execute()
    picture, controls = notebook.cells[0].outputs
    assert picture.output_type == controls.output_type == "display_data" and not notebook.cells[1].outputs
    assert picture.data["image/png"].strip() == base64.b64encode(plots.pipeline(800, 200.0).png()).decode()
    assert controls.data["text/plain"] == widgets.HINT and "application/vnd.jupyter.widget-view+json" in controls.data
