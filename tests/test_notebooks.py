"""Every notebook runs from top to bottom, has the course's form, and writes no number that nothing gave."""

import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_pictures import PICTURES, small_picture
from PIL import Image, ImageChops, ImageStat
from prepare_notebooks import NOTEBOOKS, SETUP, small_parameters
from prose import stated, unbacked

COURSE = [path for path in NOTEBOOKS if "01" <= path.stem[:2] <= "16"]
FORMED = [path for path in NOTEBOOKS if "01" <= path.stem[:2] <= "17"]  # the fine-tune too: it builds nothing
LINES = 30  # of a code cell: a screen
LAST_SECTIONS = ["Exercises", "Takeaways", "Questionnaire", "Where it returns"]
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
each_of_the_course = pytest.mark.parametrize("notebook", COURSE, ids=lambda path: path.stem)
each_of_the_form = pytest.mark.parametrize("notebook", FORMED, ids=lambda path: path.stem)


def cells(notebook: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == kind]


def text(notebook: Path) -> str:
    return "\n\n".join(cell.source for cell in cells(notebook, "markdown"))


@pytest.mark.course
@each_notebook
def test_a_notebook_runs(notebook, tmp_path):
    parameters = small_parameters(notebook, tmp_path)
    executed = tmp_path / notebook.name
    papermill.execute_notebook(notebook, executed, parameters, cwd=str(tmp_path), progress_bar=False)
    if "output" not in parameters:
        return
    folder = Path(parameters["output"])
    run, few = (json.loads((folder / name).read_text()) for name in ("metrics.json", "overfit/metrics.json"))
    assert run["steps"] == 4 and len(run["losses"]) == 4
    for when in ("before", "after"):
        assert run[when]["facts"]["of"] == 2 and run[when]["samples"] and run[when]["validation_loss"] > 0
    assert few["config"]["private"] and few["data"]["train"]["records"] == 4 and len(few["validation_losses"]) == 4
    assert (folder / "merged/model.safetensors").is_file() and (folder / "finetuned.gguf").is_file()
    printed = "".join(output.get("text", "") for cell in cells(executed, "code") for output in cell.outputs)
    assert "logits equal to stock peft's within 1e-4: True" in printed and "within four roundings" in printed
    assert "canary facts known" in printed and ": False" not in printed


@each_notebook
def test_a_committed_notebook_carries_outputs_and_no_error(notebook):
    code = cells(notebook, "code")
    assert any(cell.outputs for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


# --- form


@each_of_the_form
def test_the_first_cell_is_the_setup_and_no_cell_is_long(notebook):
    first, *rest = cells(notebook, "code")
    assert first.source == SETUP, "put it in by: python tests/prepare_notebooks.py --stamp"
    for cell in rest:
        assert len(cell.source.splitlines()) <= LINES, cell.source


@each_of_the_form
def test_it_opens_with_the_idea_and_what_the_reader_will_do(notebook):
    opening = cells(notebook, "markdown")[0].source
    assert re.match(rf"# {notebook.stem[:2]} · [A-Z]", opening)
    promise = opening.partition("In the next half hour you will")[2]
    assert len(re.findall(r"^(?:\d\.|[*-]) ", promise, flags=re.M)) == 3, opening


@each_of_the_form
def test_sections_are_in_order(notebook):
    found = re.findall(r"^## (.+)$", text(notebook), flags=re.M)
    rounds = [title for title in found if re.match(r"\d · ", title)]
    assert found == rounds + LAST_SECTIONS
    assert [title[0] for title in rounds] == [str(n + 1) for n in range(len(rounds))] and 2 <= len(rounds) <= 6


@each_of_the_course
def test_it_predicts_builds_measures_and_explains(notebook):
    openings = re.findall(r"^\*\*(Predict|Build|Measure|Explain)\b", text(notebook), flags=re.M)
    assert set(openings) == {"Predict", "Build", "Measure", "Explain"}
    assert openings.count("Predict") >= 2 and openings.count("Explain") >= 2 and openings[0] == "Predict"
    assert any("explore(" in cell.source for cell in cells(notebook, "code"))


@each_of_the_form
def test_five_cells_are_checked_and_print_text(notebook):
    checked = [cell for cell in cells(notebook, "code") if cell.source.startswith("# NBVAL_CHECK_OUTPUT\n")]
    assert len(checked) >= 5
    for cell in checked:
        assert cell.outputs and all(output.output_type == "stream" for output in cell.outputs), cell.source


@each_of_the_course
def test_it_asks_three_to_five_exercises_and_five_questions(notebook):
    code = "\n".join(cell.source for cell in cells(notebook, "code"))
    asked = set(re.findall(r"\bcheck\(\s*\"([\w.]+)\"", code))
    assert 3 <= len(asked) <= 5 and asked == set(re.findall(r"\bexercises\(\s*\"([\w.]+)\"", code))
    questionnaire = text(notebook).partition("## Questionnaire")[2].partition("## Where it returns")[0]
    assert questionnaire.count("<details>") == questionnaire.count("</details>") == 5
    assert "**Next:**" in cells(notebook, "markdown")[-1].source


# --- numbers


@each_of_the_form
def test_every_number_with_a_unit_is_given_by_a_cell_or_a_record(notebook):
    assert unbacked(nbformat.read(notebook, as_version=4)) == []


@each_of_the_form
def test_an_invented_number_would_be_found(notebook):
    invented = nbformat.read(notebook, as_version=4)
    before = unbacked(invented)
    invented.cells.append(new_markdown_cell("It ran at **7.3519 TB/s**, in 61,873 sectors."))
    assert unbacked(invented) == [*before, "7.3519 TB/s", "61,873 sectors"]


def notebook_of(markdown: str, code: str = "", *outputs) -> nbformat.NotebookNode:
    return new_notebook(cells=[new_markdown_cell(markdown), new_code_cell(code, outputs=list(outputs))])


PRINTED = new_output("stream", text="a copy: 3,020.44 GB/s; 0.853 of the peak; 16285932 conflicts\n")
TABLE = new_output("display_data", data={"text/html": "<table width='77'><td>0.2351</td></table>", "text/plain": "<a>"})


@pytest.mark.parametrize(
    ("markdown", "missing"),
    [
        ("It reaches 3,020 GB/s.", []),
        ("It reaches 3020.4 GB/s.", []),
        ("It reaches **3,021** GB/s.", ["3,021 GB/s"]),
        ("It reaches 3.02 TB/s.", ["3.02 TB/s"]),  # units are not converted
        ("That is 85% of it, or 85.3 %.", []),
        ("That is 86% of it.", ["86 %"]),
        ("About 16 million conflicts, 16,300,000 conflicts", []),
        ("About 17 million conflicts", ["17 million conflicts"]),
        ("$0.235\\,\\text{ms}$ or $0.24$ ms", []),
        ("0.234 ms", ["0.234 ms"]),
        ("77 bytes", ["77 bytes"]),  # of the table's form, not of its content
        ("1,024 bytes, 1024-byte lines and 96 bytes", []),
        ("4, 8 and 33 sectors", ["33 sectors"]),
        ("33 whole sectors, 34× as many, 35 times, 36 µs", ["33 sectors", "34 ×", "35 times", "36 µs"]),
        ("In 2031, on sm_91, `x[99]`, [bytes](99 bytes), version 99.5", []),
        ("```\n99 bytes\n```", []),
    ],
)
def test_what_gives_a_number(markdown, missing):
    code = "a, b = 2**10, 32 * 3\nc = [4, 8]  # 33, 34, 35"
    assert unbacked(notebook_of(markdown, code, PRINTED, TABLE)) == missing


def test_a_recorded_result_gives_its_numbers_only_where_it_is_used(tmp_path):
    (tmp_path / "03_strides.json").write_text(json.dumps({"rows": [{"ms": 1.2345, "what": "17 bytes", "ok": True}]}))
    used = notebook_of("1.23 ms for 17 bytes", 'r = measured("03_strides", measure)')
    assert unbacked(used, tmp_path) == []
    assert unbacked(notebook_of("1.23 ms for 17 bytes"), tmp_path) == ["1.23 ms", "17 bytes"]
    assert unbacked(used, tmp_path / "nowhere") == ["1.23 ms", "17 bytes"]


def test_what_counts_as_a_number_with_a_unit():
    words = [words for words, *_ in stated("8 to 16 bytes, 3.5 TFLOP/s; 5 s, 90 of 1990s, 12 and more lanes, 2 KiB.")]
    assert words == ["8 bytes", "16 bytes", "3.5 TFLOP/s", "5 s", "2 KiB"]


# --- the map


PAGES = sorted((NOTEBOOKS[0].parent).glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_of_the_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_map_shows_every_notebook():
    page = (NOTEBOOKS[0].parent / "README.md").read_text()
    for notebook in NOTEBOOKS:
        title = cells(notebook, "markdown")[0].source.splitlines()[0].removeprefix("# ")
        assert f"[{title}]({notebook.name})" in page
        assert f"(pictures/{notebook.stem}.png)]({notebook.name})" in page
    assert len(list(PICTURES.glob("*.png"))) == len(NOTEBOOKS)


@each_notebook
def test_the_maps_picture_is_the_notebooks(notebook):
    """Made anew by: python tests/notebook_pictures.py"""
    kept = Image.open(PICTURES / f"{notebook.stem}.png").convert("RGB")
    made = small_picture(notebook)
    assert kept.size == made.size and (PICTURES / f"{notebook.stem}.png").stat().st_size < 40_000
    assert sum(ImageStat.Stat(ImageChops.difference(kept, made)).mean) / 3 < 6


def test_the_instructors_exercises_exist():
    from fastkit.lab.exercises import exercises

    named = set(re.findall(r"`(\w+)`", (NOTEBOOKS[0].parent / "INSTRUCTOR.md").read_text()))
    assert {"axpy", "copy_wide", "vector_add"} <= named & set(exercises())
