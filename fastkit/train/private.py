"""Fine-tuning on data that nobody else is to see: no network, files for the user alone, nothing left in GPU memory.

What stays beyond it:
- A kill that no process sees (SIGKILL, a crash of the driver, a loss of power) overwrites nothing.
- Host memory: parameters are overwritten where they lie, and what was offloaded. Records, tokens and all else that
  passed through it are not, and what the system swapped to disk stays there.
- Memory that torch's allocator gives back to the driver by itself, when it runs short in the middle of a step, is not
  overwritten. A warning says how much; a smaller batch or a leaner plan avoids it.
- Nor is memory that is not that allocator's, such as NCCL's.
- Shared memory and registers of the GPU, and its caches. Compiled kernels, which Triton keeps on disk, hold no data.
- The network is closed to this process's Python. Programs that it starts are told to be offline, and can do otherwise.
- Windows has no such rights of files: there they have those of their folder.
"""

import functools
import gc
import ipaddress
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub
import torch
from torch import nn

from fastkit.errors import FastkitError
from fastkit.kernels.choices import cache_dir
from fastkit.models import smollm2
from fastkit.models.patch import fused_layers

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
LOCAL_FAMILIES = {getattr(socket, name) for name in ("AF_UNIX", "AF_NETLINK") if hasattr(socket, name)}
_runs = 0  # private ones that are on; the network is closed while there is one


@contextmanager
def private(output: str | Path, let_go: Callable[[], tuple]) -> Iterator[None]:
    """Within: the network is closed, and files that are made, as all in `output`, can be read by the user alone.

    At the end, however it comes (an exception, Ctrl-C, SIGTERM), GPU memory of the run is overwritten with zeros before
    it is given back: `let_go` returns (model, optimizer), None where there is none, and keeps neither itself. What else
    holds one of them finds its numbers zero. All free GPU memory that torch holds in this process is overwritten, of
    whatever it was; tensors that are still held and belong to neither are not.

    Raises FastkitError, from within, for an address that is not of this machine, nor of torchrun's first process; where
    files in `output` belong to another; and where the GPU fails and nothing can be written to it any more.
    """
    output = Path(output)
    with _offline(), _closed(), _for_user_alone(output), _terminated_as_exception(), _written_over() as memory:
        try:
            yield
        except BaseException as error:
            _drop_locals(error)  # tensors that the broken-off functions held
            raise
        finally:
            with _uninterrupted():
                _overwrite_all(let_go, memory)


def check(model: str) -> None:
    """Raise FastkitError unless a private run is on, and `model` needs no download."""
    if not _runs:
        raise FastkitError(
            "a private run overwrites what the GPU held at its end, and needs one: use fastkit.finetune(private=True, "
            "...), or `with FineTune(private=True, ...) as run:` around prepare, train and save"
        )
    if model == "smollm2" and not smollm2.is_cached():
        raise FastkitError(
            f"a private run does not download, and {smollm2.NAME} is not in {cache_dir()} yet: run `fastkit generate "
            "--prompt hello` once before it, or name the folder of a model"
        )


@contextmanager
def _offline() -> Iterator[None]:
    """Hugging Face's libraries ask no hub: their variables, for what is started, and constants, read long ago."""
    switches = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
    ]
    variables = {name: os.environ.get(name) for name in OFFLINE}
    constants = [(module, name, getattr(module, name)) for module, name in switches]
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    for module, name in switches:
        setattr(module, name, True)
    try:
        yield
    finally:
        for module, name, value in constants:
            setattr(module, name, value)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _closed() -> Iterator[None]:
    global _runs
    _add_hook()
    _runs += 1
    try:
        yield
    finally:
        _runs -= 1


@functools.cache
def _add_hook() -> None:
    """Once a process, since no audit hook can be removed."""
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple) -> None:
    if not _runs or not event.startswith("socket."):
        return
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        its_socket, address = arguments
        if address is None or its_socket.family in LOCAL_FAMILIES:
            return
        host = address[0]
    else:
        return
    if not _is_near(host):
        raise FastkitError(
            f"a private run does not use the network, and something in it asked for {host}: give model and data as "
            "local files, or leave out --private"
        )


def _is_near(host) -> bool:
    """Whether a connection to `host` stays on this machine, or meets the other processes of the run."""
    if isinstance(host, bytes | bytearray):
        host = host.decode()
    if not host or host in ("localhost", socket.gethostname(), os.environ.get("MASTER_ADDR")):
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@contextmanager
def _for_user_alone(output: Path) -> Iterator[None]:
    before = os.umask(0o077)
    try:
        for path in (output, *output.rglob("*")) if output.exists() else ():  # of a run that is resumed
            if not path.is_symlink():
                _close_to_others(path)
        yield
    finally:
        os.umask(before)


def _close_to_others(path: Path) -> None:
    try:
        path.chmod(0o700 if path.is_dir() else 0o600)
    except OSError as error:
        raise FastkitError(f"{path} cannot be closed to others: {error}; name another output folder") from error


@contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does. Signals are the main thread's: elsewhere it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drop_locals(error: BaseException) -> None:
    """The variables of all functions that `error`, and what caused it, broke off."""
    pending, seen = [error], set()
    while pending:
        error = pending.pop()
        if error is not None and error not in seen:
            seen.add(error)
            traceback.clear_frames(error.__traceback__)
            pending += [error.__cause__, error.__context__]


def _overwrite_all(let_go: Callable[[], tuple], memory: "_Memory") -> None:
    try:
        _overwrite(*let_go())
        gc.collect()
        memory.give_back()
    except RuntimeError as error:  # after an error of the GPU's own, each call fails
        raise FastkitError(
            f"GPU memory could not be overwritten: {str(error).partition(chr(10))[0]}; end this process, which frees it"
        ) from error
    memory.warn()


@torch.no_grad()
def _overwrite(model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> None:
    """Zeros over all numbers of both, and over what the model's layers offloaded."""
    parameters = [] if model is None else [*model.parameters(), *model.buffers()]
    states = []
    if optimizer is not None:
        parameters += [p for group in optimizer.param_groups for p in group["params"]]
        states = [x for state in optimizer.state.values() for name, x in state.items() if not name.startswith("qmap")]
    for p in parameters:
        states += [p, p.grad]
        if (state := getattr(p, "quant_state", None)) is not None:
            states += [state.absmax, state.offset, state.state2.absmax if state.nested else None]
    for x in states:
        if isinstance(x, torch.Tensor):
            x.detach().zero_()
    for layer in () if model is None else fused_layers(model):
        layer.shared.keeper.overwrite()


@contextmanager
def _written_over() -> Iterator["_Memory"]:
    """torch.cuda.empty_cache overwrites what it gives back, for all that call it."""
    memory = _Memory(torch.cuda.empty_cache)
    before = [(module, module.empty_cache) for module in (torch.cuda, torch.cuda.memory)]
    for module, _ in before:
        module.empty_cache = memory.give_back
    try:
        yield memory
    finally:
        for module, function in before:
            module.empty_cache = function


class _Memory:
    """What torch's allocator holds of the GPUs' memory, and what of it went back to the driver."""

    def __init__(self, empty_cache: Callable[[], None]):
        self.empty_cache = empty_cache
        self.overwritten = _given_back()  # bytes that went back so, or before

    def give_back(self) -> None:
        """Overwrite the memory that is free, and give it back."""
        if not torch.cuda.is_initialized():
            return
        torch._C._cuda_clearCublasWorkspaces()  # which hold parts of products
        overwrite_free()
        before = _given_back()
        self.empty_cache()
        self.overwritten += _given_back() - before
        torch._C._host_emptyCache()

    def warn(self) -> None:
        if (lost := _given_back() - self.overwritten) > 0:
            warnings.warn(
                f"{lost / 2**30:.2f} GiB of GPU memory went back to the driver as they were, when memory ran short: "
                "take a smaller batch, or a leaner plan",
                stacklevel=2,
            )


def _given_back() -> int:
    """Bytes that torch's allocator has given back to the driver since the process began."""
    if not torch.cuda.is_initialized():
        return 0
    devices = range(torch.cuda.device_count())
    return sum(torch.cuda.memory_stats(device).get("reserved_bytes.all.freed", 0) for device in devices)


def overwrite_free() -> None:
    """Zeros over all GPU memory that torch's allocator holds and no tensor lives in; waits for the GPUs."""
    free = list(free_memory())
    for x in free:
        x.zero_()
    for device in {x.device for x in free}:
        torch.cuda.synchronize(device)


def free_memory() -> Iterator[torch.Tensor]:
    """The memory that torch's allocator holds and no tensor lives in, as uint8 tensors that do not own it.

    Waits for the GPUs. They are good until torch next allocates.
    """
    segments = torch.cuda.memory_snapshot()
    for device in {segment["device"] for segment in segments}:
        torch.cuda.synchronize(device)  # a block that is freed but awaits a stream is free after this
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] != "active_allocated":
                yield torch.as_tensor(_Raw(address, block["size"]), device=torch.device("cuda", segment["device"]))
            address += block["size"]


class _Raw:
    """Bytes at an address of a GPU's memory, for torch.as_tensor (the CUDA array interface, version 2)."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 2}
