"""For all tests: without a GPU, Triton's kernels run in its interpreter and tests marked `gpu` are skipped, visibly."""

import os
import sys

# A worker a core: more threads than that only wait for one another. Also for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from seeds import drawn

GPU = torch.cuda.is_available()
if not GPU:
    if "triton" in sys.modules:
        raise RuntimeError("something imported Triton before tests/conftest.py could set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile(
    "fastkit",
    deadline=None,  # the first example on a GPU compiles the kernel
    max_examples=12,
    print_blob=True,  # a failure prints the line that reproduces it
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastkit")


def pytest_collection_modifyitems(items):
    if exercises := sys.modules.get("fastkit.lab.exercises"):
        exercises.CPU_SECONDS = 60.0  # for an answer, on a machine that runs other tests meanwhile
    # Files with slow tests first, so that the workers of `make code` end at about the same time.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> str:
    """Where kernels are tested: the GPU, or the CPU through the interpreter."""
    return "cuda" if GPU else "cpu"


@pytest.fixture(
    params=[torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=["fp32", "fp16", "bf16"],
)
def dtype(request) -> torch.dtype:
    """The dtypes that kernels are tested in; the interpreter cannot round to bfloat16."""
    return request.param


@pytest.fixture
def poisoned():
    """Fill every buffer that torch.empty and its kin hand out with NaN, so that a result left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_seed():
    """Seed torch anew in every run; a failing test shows the seed, and FASTKIT_TEST_SEED brings it back."""
    seed = drawn()
    print(f"FASTKIT_TEST_SEED={seed}")
    torch.manual_seed(seed)


@pytest.fixture
def references(monkeypatch):
    """torch references instead of interpreted kernels, as on a CPU without TRITON_INTERPRET."""
    monkeypatch.setattr("fastkit.kernels.common.INTERPRETED", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a module's tests keep their models."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model's folder for each architecture."""
    from tiny import ARCHITECTURES, tiny_model

    root = tmp_path_factory.mktemp("models")
    return {arch: tiny_model(root / arch, arch) for arch in ARCHITECTURES}


@pytest.fixture
def llama(folders):
    """(model, tokenizer), quantized."""
    from fastkit.models import load

    return load(str(folders["llama"]), device="cpu")
