"""The package as others get it: what it declares, imports and ships, and that it runs where it was installed."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from tiny import tiny_data, tiny_model

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted([*(ROOT / "fastkit").glob("**/*.py"), *(ROOT / "kernels").glob("**/*.py")])
DISTRIBUTIONS = {"pynvml": "nvidia-ml-py", "IPython": "ipython"}  # where the import goes by another name
# Each may import those before it, in functions too; kernels/ and fastkit/__init__.py nothing of fastkit.
ORDER = ("__init__", "kernels", "errors", "ops", "lab", "models", "train", "doctor", "cli", "__main__")


def run(*command, cwd=ROOT, first_on_path=None) -> subprocess.CompletedProcess:
    """Run Python with `command` in `cwd`, on one CPU thread; modules are looked for in `first_on_path` first."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # conftest.py sets it
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if first_on_path:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(first_on_path), env.get("PYTHONPATH"))))
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def said(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- what is declared


def requirements(lines) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines]
    assert len({r.name for r in parsed}) == len(parsed)
    return {r.name: r for r in parsed}


def declared(*extras: str) -> list[str]:
    project = PROJECT["project"]
    return project["dependencies"] + [r for extra in extras for r in project["optional-dependencies"][extra]]


def test_environment_yml_and_pyproject_agree():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = requirements(entry for entry in listed if isinstance(entry, str))
    (pip,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    assert pip[-1] == "-e ."
    extras = PROJECT["project"]["optional-dependencies"]
    assert requirements(pip[:-1]) == requirements(declared(*extras))
    assert str(conda["python"].specifier) == PROJECT["project"]["requires-python"]


def imports(path: Path) -> set[str]:
    """The absolute names of all modules that a file imports, in functions too, as far as its text tells."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from fastkit import ops` imports fastkit.ops
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


PEERS = {"cut_cross_entropy", "liger_kernel", "unsloth"}  # `fastkit bench` times them where they are installed


def test_all_that_is_imported_is_declared():
    known = {name.lower() for name in requirements(declared())} | PEERS
    undeclared = {}
    for path in SOURCES:
        for package in {name.partition(".")[0] for name in imports(path)} - sys.stdlib_module_names - {"fastkit"}:
            if DISTRIBUTIONS.get(package, package).lower() not in known:
                undeclared.setdefault(package, []).append(str(path.relative_to(ROOT)))
    assert undeclared == {}, "add these to pyproject.toml and environment.yml"


def place(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    places = {place(source) for source in SOURCES}
    mine = place(path)
    for name in imports(path):
        package, _, rest = name.partition(".")
        assert package != "kernels", f"{path} imports {name}: ours is fastkit.kernels"
        theirs = rest.partition(".")[0]
        if package == "fastkit" and theirs in places - {mine}:
            assert ORDER.index(theirs) < ORDER.index(mine), f"{path} imports {name}"


def test_the_house():
    assert not list((ROOT / "kernels").glob("**/__init__.py"))  # one would answer to the name of Hugging Face's package
    for name in ("kernels", "data"):
        assert os.readlink(ROOT / "fastkit" / name) == f"../{name}"
    for path in SOURCES:
        assert len(path.read_text().splitlines()) < 400, path


# --- beside Hugging Face's package `kernels`


THEIRS = """
from pathlib import Path
from unittest.mock import MagicMock

__version__ = "{version}"

def get_kernel(*args, **kwargs):
    Path(__file__).with_name("asked").write_text(repr(args))  # a file: the module may be imported more than once
    raise RuntimeError("the stand-in has no kernels")

def _decorator(*names):
    return lambda decorated: decorated

use_kernel_forward_from_hub = use_kernelized_func = _decorator

def __getattr__(name):  # what else transformers imports
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A site folder with a stand-in for Hugging Face's `kernels`, of a version that transformers takes."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION as version

    site = tmp_path_factory.mktemp("site")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(THEIRS.format(version=version))
    info = site / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    return site


BESIDE_THEIRS = """
import fastkit.train.finetune, fastkit.models  # all that imports transformers, peft and bitsandbytes
import kernels, sys
from pathlib import Path
from transformers.utils.import_utils import is_kernels_available
from fastkit.models import add_lora, load
import fastkit.kernels.rms_norm

site, model = sys.argv[1:]
assert Path(kernels.__file__).parent.parent == Path(site), kernels.__file__
assert is_kernels_available()
assert Path(fastkit.kernels.rms_norm.__file__).resolve() == Path("kernels/rms_norm.py").resolve()
model, tokenizer = load(model, device="cpu")
add_lora(model)(**tokenizer("a b", return_tensors="pt"))
"""


@pytest.mark.slow
def test_their_kernels_are_theirs_and_never_asked(theirs, tmp_path):
    said(run("-c", BESIDE_THEIRS, theirs, tiny_model(tmp_path), first_on_path=theirs))
    assert not (theirs / "kernels" / "asked").exists()


ALONE = """
import importlib.util
from transformers.utils.import_utils import is_kernels_available

assert not is_kernels_available()
assert getattr(importlib.util.find_spec("kernels"), "origin", None) is None  # our folder, and no package
from fastkit.ops import rms_norm
import fastkit.models
assert not is_kernels_available()
"""


@pytest.mark.slow
def test_transformers_does_not_take_ours_for_theirs():
    if "kernels" in {d.name for d in importlib.metadata.distributions()}:
        pytest.skip("Hugging Face's kernels is installed")
    said(run("-c", ALONE))


# --- installed elsewhere


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(folder with the built wheel installed, names in the wheel)"""
    root = tmp_path_factory.mktemp("installed")
    source = root / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fastkit", "kernels", "data"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    said(run("-m", "build", "--wheel", "--no-isolation", "--outdir", root, source, cwd=root))
    (wheel,) = root.glob("*.whl")
    said(run("-m", "pip", "install", "--no-deps", "--quiet", "--target", root / "site", wheel, cwd=root))
    return root / "site", set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_wheel_holds_everything(installed):
    _, names = installed
    ours = [path for path in (ROOT / "fastkit").glob("**/*") if path.suffix in (".py", ".mplstyle")]
    expected = {str(path.relative_to(ROOT)) for path in ours}
    for folder, suffixes in (("kernels", (".py",)), ("data", (".json", ".jsonl"))):
        files = [path for path in (ROOT / folder).glob("**/*") if path.suffix in suffixes]
        expected |= {f"fastkit/{path.relative_to(ROOT)}" for path in files}
    assert {name for name in names if not name.startswith("fastkit-")} == expected
    assert "fastkit/kernels/rms_norm.py" in names
    assert any(name.startswith("fastkit/data/instructions/") for name in names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def finetune(model: Path, data: Path, output: Path) -> list[str]:
    flags = {"model": model, "data": data, "output": output, "steps": 2, "batch_size": 2, "max_length": 64}
    return ["finetune", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]


WHERE = """
import fastkit, fastkit.kernels.rms_norm, fastkit.lab.results

print(fastkit.__file__, fastkit.kernels.rms_norm.__file__, fastkit.lab.results.RESULTS)
"""


@pytest.mark.slow
def test_the_wheel_runs_elsewhere(installed, tmp_path):
    site, _ = installed
    elsewhere = dict(cwd=tmp_path, first_on_path=site)
    where = said(run("-c", WHERE, **elsewhere)).split()
    assert len(where) == 3 and all(path.startswith(f"{site}/fastkit/") for path in where), where
    assert said(run("-m", "fastkit", "doctor", **elsewhere)).startswith("fastkit ")
    command = finetune(tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data"), tmp_path / "run")
    assert f"adapter: {tmp_path / 'run' / 'adapter'}" in said(run("-m", "fastkit", *command, **elsewhere))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


# --- without Triton

NO_TRITON = """
import importlib.machinery

found = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] == "triton" else found(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""

WITHOUT_TRITON = """
import importlib.util, sys
import fastkit
from fastkit.cli import main

assert importlib.util.find_spec("triton") is None
assert main(["doctor"]) == 0
assert main(sys.argv[1:]) == 0
assert "triton" not in sys.modules
"""


@pytest.mark.slow
def test_without_triton(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_TRITON)
    command = finetune(tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data"), tmp_path / "run")
    out = said(run("-c", WITHOUT_TRITON, *command, first_on_path=tmp_path))
    assert re.search(r"MISSING   triton: .*\n +mend: \S", out), out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
