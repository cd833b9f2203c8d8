"""README: what it shows exists, what it says was measured is what the records say, and its examples run."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest
from PIL import Image
from prepare_notebooks import NOTEBOOKS, SETUP
from readme_pictures import BLOCK, DRAWN, PICTURES, README, filled, said
from tiny import tiny_data, tiny_model

from fastkit import cli
from fastkit.lab.results import RESULTS
from fastkit.train.bench_train import TrainBenchConfig
from fastkit.train.config import FinetuneConfig

TEXT = README.read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = {
    "finetune": FinetuneConfig,
    "generate": cli.GenerateConfig,
    "export": cli.ExportConfig,
    "warmup": cli.WarmupConfig,
    "doctor": cli.DoctorConfig,
    "compile": cli.CompileConfig,
    "prove": cli.ProveConfig,
    "bench": TrainBenchConfig,
}


def test_links_and_pictures_exist():
    places = re.findall(r'\]\(([^)#:]+)\)|src="([^"]+)"', TEXT)
    assert not [place for place in map("".join, places) if not (README.parent / place).exists()]
    assert {f"data/pictures/{name}.png" for name in DRAWN} <= {"".join(place) for place in places}


def test_the_table_shows_every_notebook():
    for notebook in NOTEBOOKS:
        title = nbformat.read(notebook, as_version=4).cells[0].source.splitlines()[0].removeprefix("# ")
        (row,) = [line for line in TEXT.splitlines() if f"| [{title}](notebooks/{notebook.name}) |" in line]
        picture = f"notebooks/pictures/{notebook.stem}.png"
        assert (f'src="{picture}"' in row) == (README.parent / picture).exists()


def test_what_colab_is_promised_every_notebook_begins_with():
    assert "`!git clone ADDRESS` in a cell above a notebook's first" in TEXT
    for notebook in NOTEBOOKS:
        code = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
        assert code[0] == SETUP, notebook.name


def test_what_was_measured_is_what_the_records_say():
    """Written anew by: python tests/readme_pictures.py"""
    names = [name for _, name, _ in BLOCK.findall(TEXT)]
    assert "train_h200" in names and all((RESULTS / f"{name}.json").is_file() for name in names)
    assert filled(TEXT) == TEXT
    assert filled(TEXT.replace("17,453", "17,454")) == TEXT


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_are_drawn_from_the_records_of_today(name):
    """Drawn anew by: python tests/readme_pictures.py"""
    with Image.open(PICTURES / f"{name}.png") as picture:
        assert picture.text["drawn from"] == said(name)
        assert picture.width == 1440
    assert (PICTURES / f"{name}.png").stat().st_size < 150_000


def test_every_flag_exists():
    found = 0
    for command, rest in re.findall(rf"\bfastkit ({'|'.join(COMMANDS)})\b([^`\n]*)", TEXT):
        words = shlex.split(rest, comments=True)
        flags = [word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")]
        assert set(flags) <= {field.name for field in fields(COMMANDS[command])}, command + rest
        found += len(flags)
    assert found > 10


@pytest.mark.slow
def test_the_use_on_ones_own_model_and_data(tmp_path, monkeypatch):
    (code,) = [code for code in CODE if "finetune(" in code]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    tiny_model(tmp_path / "Qwen" / "Qwen2.5-7B-Instruct", "qwen2")
    (tiny_data(tmp_path / "data", records=24) / "train.jsonl").rename(tmp_path / "my.jsonl")
    monkeypatch.chdir(tmp_path)
    code = code.replace('data="my.jsonl"', 'data="my.jsonl", max_length=64, progress=False, device="cpu"')
    names = {}
    exec(code, names)
    assert names["metrics"]["steps"] > 0 and Path("runs/mine/adapter/adapter_model.safetensors").is_file()


def test_what_the_tracer_is_said_to_say():
    pytest.importorskip("triton")
    (code,) = [code for code in CODE if "trace_launches" in code]
    names = {}
    exec(code.replace('os.environ["TRITON_INTERPRET"] = "1"', ""), names)
    assert names["naive"].sectors_per_request("store") == 32.0
    assert "32.0: each number" in code and names["shared"].shared
