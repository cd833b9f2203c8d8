"""`fastkit doctor`: what it reports, and that whatever is missing comes with its remedy."""

import builtins
import collections
import importlib.metadata
import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import fastkit
from fastkit import doctor
from fastkit.cli import main
from fastkit.models import smollm2

CHECKS = ["gpu", "triton", "bitsandbytes", "interpreter", "smollm2", "disk", "notebooks"]


def checks() -> dict[str, dict]:
    return {check["name"]: check for check in doctor.report()["checks"]}


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """Make torch tell of a GPU with the compute capability that is given."""
    properties = collections.namedtuple("Properties", "name major minor multi_processor_count total_memory")

    def pretend(major: int, minor: int):
        card = properties("Some card", major, minor, 40, 16 * 2**30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: card)

    return pretend


def without(monkeypatch, *packages):
    """Make `import` and `find_spec` fail for packages, imported already or not."""
    found, imported = importlib.util.find_spec, builtins.__import__

    def gone(name: str) -> bool:
        return name.partition(".")[0] in packages

    def import_(name, globals=None, locals=None, fromlist=(), level=0):
        if gone(name) and not level:
            raise ImportError(f"No module named {name!r}")
        return imported(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", import_)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if gone(name) else found(name, *args))


def test_report(no_gpu):
    report = doctor.report()
    assert report["fastkit"] == fastkit.__version__
    assert report["lane"] == "cpu" and "fp32" in report["lane_means"]
    assert report["card"]["cores"] >= 1 and {"name", "arch", "memory_gib"} < report["card"].keys()
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"python", "triton", "transformers", "peft", "bitsandbytes"} < report["versions"].keys()
    names = [check["name"] for check in report["checks"]]
    assert names == [name for name in CHECKS if name in names]
    for check in report["checks"]:
        assert check.keys() == {"name", "ok", "says", "mend"} and check["says"]
        assert (check["mend"] is None) == check["ok"]


def test_whatever_is_missing_has_a_remedy(no_gpu, monkeypatch, capsys):
    without(monkeypatch, "triton", "jupyterlab")
    monkeypatch.setattr(shutil, "disk_usage", lambda where: SimpleNamespace(free=1e9))
    monkeypatch.delitem(sys.modules, "fastkit.models.bnb", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    seen = checks()
    failed = {name: check["mend"] for name, check in seen.items() if not check["ok"]}
    assert failed.keys() == {"gpu", "triton", "bitsandbytes", "disk", "notebooks"}
    assert all(failed.values())
    assert "1.0 GB free" in seen["disk"]["says"] and "FASTKIT_CACHE" in failed["disk"]
    assert seen["notebooks"]["says"] == "lacks jupyterlab" and failed["notebooks"] == "pip install fastkit[notebooks]"
    doctor.show(doctor.report())
    printed = capsys.readouterr().out
    for name, mend in failed.items():
        assert f"MISSING   {name}: {seen[name]['says']}\n            mend: {mend}\n" in printed


@pytest.mark.parametrize(
    ("system", "mend"),
    [("linux", "pip install triton"), ("win32", "pip install triton-windows"), ("darwin", "use Linux")],
)
def test_triton_is_mended_by_the_system(no_gpu, monkeypatch, system, mend):
    without(monkeypatch, "triton")
    monkeypatch.setattr(doctor.sys, "platform", system)
    check = doctor._triton()
    assert not check["ok"] and check["mend"].startswith(mend)
    assert "torch references" in check["says"]


@pytest.mark.parametrize(
    ("cuda", "mend"), [(None, "pip install --force-reinstall torch"), ("13.0", "install NVIDIA's driver")]
)
def test_no_gpu(no_gpu, monkeypatch, cuda, mend):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    check = checks()["gpu"]
    assert not check["ok"] and check["mend"].startswith(mend)
    assert check["mend"].endswith("or none: the cpu lane needs nothing")


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "fp16"), ((8, 9), "bf16")])
def test_a_gpu(gpu, capability, dtype):
    gpu(*capability)
    report = doctor.report()
    assert report["lane"] == "gpu" and report["lane_means"].endswith(dtype)
    assert report["card"]["arch"] == "sm_{}{}".format(*capability) and report["card"]["driver"]
    check = next(check for check in report["checks"] if check["name"] == "gpu")
    assert check["ok"] and ("no bf16" in check["says"]) == (dtype == "fp16")


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "ok"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.0+git1a2b", "2.10.1", False),
        ("3.8.0", "2.4.6", True),
        ("3.10.0", "3.0.0", True),
    ],
)
def test_the_interpreter_needs_a_matching_numpy(no_gpu, monkeypatch, triton_version, numpy_version, ok):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr("numpy.__version__", numpy_version)
    check = checks()["interpreter"]
    assert check["ok"] == ok and check["says"] == f"triton {triton_version} with numpy {numpy_version}"
    assert ok or check["mend"].startswith("pip install 'numpy<2.4'")


def test_the_model_in_the_cache(no_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTKIT_CACHE", str(tmp_path / "not" / "yet"))
    assert checks()["smollm2"]["says"].startswith("downloads")
    assert checks()["disk"]["says"].endswith(f"in {tmp_path}")
    folder = smollm2.cache_dir() / smollm2.NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert checks()["smollm2"]["says"] == f"in {tmp_path / 'not' / 'yet'}"


def test_the_command(no_gpu, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda where: SimpleNamespace(free=5e9))
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(doctor.report()))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith(f"fastkit {fastkit.__version__}\ncard      name ")
