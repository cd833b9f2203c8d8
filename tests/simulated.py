"""Gluon kernels for sm_90 on the CPU, in Python: partitions as threads, barriers with phases, copies and products late.

What a kernel would do wrong now and then on a GPU it does here for certain, or often: reading a tile that has not come,
overwriting one that is being read, waiting for ever, writing a number twice or out of bounds. Shared memory is full of
NaN until something comes; copies end in any order. Layouts are not looked at: what needs them is the compiler's.
Programs run one after the other or, where they wait for one another, some at once, which start in their order.
"""

import math
import queue
import random
import threading
import time
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace

import torch
from triton.experimental.gluon import language as gl

SECONDS = 60  # after which a barrier that waits is a deadlock
DTYPES = {gl.float32: torch.float32}


class Stopped(Exception):
    """Another partition has failed."""


class Barrier:
    def __init__(self, failures):
        self.changed, self.failures = threading.Condition(), failures

    def init(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def add(self, pending=0, nbytes=0):
        with self.changed:
            self.pending += pending
            self.bytes += nbytes
            assert self.pending >= 0, "more arrive than the barrier counts"
            if self.pending == self.bytes == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
                self.changed.notify_all()

    def wait(self, phase):
        end = time.monotonic() + SECONDS
        with self.changed:
            while self.phase == phase:
                self.changed.wait(0.05)
                if self.failures:
                    raise Stopped
                assert time.monotonic() < end, "deadlock"


class Barriers:
    def __init__(self, shape, failures):
        self.barriers = [Barrier(failures) for _ in range(shape[0])]

    def index(self, i):
        assert 0 <= i < len(self.barriers)
        return self.barriers[i]


class Shared:
    """Shared memory."""

    def __init__(self, tensor):
        self.tensor = tensor

    def index(self, i):
        assert 0 <= i < len(self.tensor)
        return Shared(self.tensor[int(i)])

    def permute(self, order):
        return Shared(self.tensor.permute(*order))

    def reshape(self, shape):
        return Shared(self.tensor.view(shape))

    def _reinterpret(self, dtype, shape, layout):
        """As boxes of 64 columns, which is how rows that are swizzled by 128 bytes lie: box by box."""
        assert dtype == self.dtype and shape[1:] == [64, 64] and self.tensor.numel() == 64 * 64 * shape[0]
        boxes = self.tensor.view(len(self.tensor), 64, -1, 64).transpose(1, 2)
        return SimpleNamespace(index=lambda i: Shared(boxes[i // boxes.shape[1], i % boxes.shape[1]]))

    @property
    def dtype(self):
        return self.tensor.dtype

    def load(self, layout):
        assert not self.tensor.isnan().any(), "reads what has not come"
        return self.tensor.clone()

    def store(self, value):
        jitter()
        assert value.dtype == self.dtype
        self.tensor.copy_(value)


class Pointer:
    def __init__(self, memory, offset=0):
        self.memory, self.offset = memory, offset

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + offset)


class Descriptor:
    """In the place of TMA's."""

    def __init__(self, x, box):
        strides = [stride * x.element_size() for stride in x.stride()]
        assert strides[-1] == x.element_size() and not any(stride % 16 for stride in (*strides[:-1], x.data_ptr()))
        assert max(box) <= 256 and len(box) == x.dim()
        self.x, self.dtype, self.layout = x.detach(), x.dtype, None  # threads have gradients on
        self.block_type = SimpleNamespace(shape=box, nbytes=x.element_size() * math.prod(box))

    def part(self, at):
        """What of a box at `at` lies within x, and which of the box that is."""
        box = self.block_type.shape
        part = self.x[tuple(slice(first, first + size) for first, size in zip(at, box, strict=True))]
        return part, tuple(slice(0, size) for size in part.shape)


class Engine(threading.Thread):
    """What copies: in any order, and now and then late."""

    def __init__(self):
        super().__init__()
        self.asked, self.local, self.sound = queue.Queue(), threading.local(), True

    def run(self):
        held, ended = [], False
        while held or not ended:
            try:
                asked = self.asked.get(timeout=0.001 if held else 0.02)
                ended |= asked is None
                held += [(time.monotonic() + max(0.0, random.random() - 0.9) / 10, asked)] if asked else []
            except queue.Empty:
                pass
            if self.asked.empty():
                due = [each for each in held if each[0] <= time.monotonic()]
                for each in random.sample(due, len(due)):
                    held.remove(each)
                    each[1]()

    def async_copy_global_to_shared(self, desc, at, barrier, to):
        assert list(to.tensor.shape) == list(desc.block_type.shape)
        to.tensor.fill_(float("nan"))

        def copy():
            part, place = desc.part(at)
            tile = torch.zeros(desc.block_type.shape, dtype=desc.dtype)
            tile[place] = part
            to.tensor.copy_(tile)
            barrier.add(nbytes=-desc.block_type.nbytes)

        self.asked.put(copy)

    def async_copy_shared_to_global(self, desc, at, smem):
        asked, ended = smem.tensor.clone(), threading.Event()

        def copy():
            part, place = desc.part(at)
            self.sound &= bool(part.isnan().all()) and torch.equal(smem.tensor, asked)
            part.copy_(smem.tensor[place])
            ended.set()

        assert not asked.isnan().any()
        self.local.stores = [*getattr(self.local, "stores", []), ended]
        self.asked.put(copy)

    def store_wait(self, left):
        assert left == 0 and all(ended.wait(SECONDS) for ended in getattr(self.local, "stores", []))
        assert self.sound, "written twice, or overwritten while it is copied"


def jitter(*_):
    if random.random() < 0.05:
        time.sleep(random.random() * 0.002)


class Products:
    """Of one program's warp groups: what they read is compared when they wait."""

    def __init__(self):
        self.local = threading.local()

    def begin(self, a, b, acc, is_async, use_acc=True):
        a = a if isinstance(a, Shared) else Shared(a)
        assert is_async and not a.tensor.isnan().any() and not b.tensor.isnan().any(), "reads what has not come"
        assert a.dtype == b.dtype
        acc = acc if use_acc else 0.0
        begun = SimpleNamespace(read=(a.tensor, b.tensor), as_read=(a.tensor.clone(), b.tensor.clone()), acc=acc)
        self.local.begun = [*getattr(self.local, "begun", []), begun]
        return begun

    def wait(self, left, found):
        jitter()
        while len(self.local.begun) > left:
            one = self.local.begun.pop(0)
            assert all(map(torch.equal, one.read, one.as_read)), "overwritten while it is read"
            a, b = one.read
            one.value = getattr(one.acc, "value", one.acc) + a.float() @ b.float()
        found = [getattr(each, "value", each) for each in found]
        return found[0] if len(found) == 1 else tuple(found)


def _store(pointer, values, mask):
    offsets, values, mask = torch.broadcast_tensors(pointer.offset, values, mask)
    places = offsets[mask]
    assert not len(places) or 0 <= places.min() <= places.max() < len(pointer.memory), "out of bounds"
    assert pointer.memory[places].isnan().all() and len(places.unique()) == len(places), "written twice"
    pointer.memory[places] = values[mask]


ADDING = threading.Lock()


def _add(pointer, values, sem):
    offsets, values = torch.broadcast_tensors(*map(torch.as_tensor, (pointer.offset, values)))
    assert 0 <= offsets.min() <= offsets.max() < len(pointer.memory), "out of bounds"
    assert len(offsets.unique()) == offsets.numel()
    jitter()
    with ADDING:
        pointer.memory[offsets] += values


def _where(condition, a, b):
    return torch.where(condition, a, b) if isinstance(condition, torch.Tensor) else a if condition else b


def _language(program, programs, failures):
    """In the place of `gl`."""

    def allocate(dtype, shape, layout):
        return Barriers(shape, failures) if dtype is gl.int64 else Shared(torch.full(shape, float("nan"), dtype=dtype))

    end = time.monotonic() + SECONDS

    def acquire(assembly, constraints, pointers, *_, **__):
        assert assembly.startswith("ld.acquire") and time.monotonic() < end, "deadlock"
        time.sleep(0.0005)
        if failures:
            raise Stopped
        return int(pointers[0].memory[pointers[0].offset])

    def partition(function, arguments):
        try:
            function(*arguments)
        except Stopped:
            pass
        except BaseException as error:
            failures.append(error)

    def specialize(partitions, warps, registers):
        threads = [threading.Thread(target=partition, args=each) for each in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return SimpleNamespace(
        float32=gl.float32, int32=gl.int32, int64=gl.int64, constexpr=gl.constexpr, SliceLayout=lambda *_: None,
        minimum=min, maximum=max, program_id=lambda axis: program, num_programs=lambda axis: programs,
        static_range=range, where=_where, arange=lambda start, end, layout=None: torch.arange(start, end),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=DTYPES[dtype]), store=_store,
        atomic_add=_add, exp2=torch.exp2, reshape=torch.reshape, permute=torch.permute, sum=torch.sum,
        cast=lambda x, dtype: x, convert_layout=lambda x, *_, **__: x,
        allocate_shared_memory=allocate, warp_specialize=specialize, inline_asm_elementwise=acquire,
    )  # fmt: skip


class Simulated:
    """In the place of a kernel: `kernel[grid](...)` runs its programs, `at_once` so many. `modules` hold it and what it
    calls."""

    def __init__(self, kernel, *modules, at_once=1):
        self.name, self.names = kernel.fn.__name__, {k: v for module in modules for k, v in vars(module).items()}
        self.names[self.name] = kernel
        self.at_once = at_once

    def _function(self, program, programs, engine, failures):
        products, names = Products(), dict(self.names)
        names |= {
            "gl": _language(program, programs, failures), "tma": engine, "fence_async_shared": lambda: None,
            "barrier": lambda: None,
            "warpgroup_mma": products.begin, "warpgroup_mma_wait": products.wait,
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: None, init=lambda barrier, count: barrier.init(count),
                expect=lambda barrier, nbytes: barrier.add(-1, nbytes),
                arrive=lambda barrier: (jitter(), barrier.add(-1)),
                wait=lambda barrier, phase: (jitter(), barrier.wait(phase)),
            ),
        }  # fmt: skip
        for key, value in list(names.items()):
            if type(value).__name__ == "GluonJITFunction":
                names[key] = FunctionType(value.fn.__code__, names, key, value.fn.__defaults__)
        return names[self.name]

    def __getitem__(self, grid):
        def run(*arguments, PLAN, **options):
            arguments = [Pointer(a.detach().view(-1)) if isinstance(a, torch.Tensor) else a for a in arguments]
            waiting, failures = iter(range(grid[0])), []

            def programs():
                while not failures and (program := next(waiting, None)) is not None:
                    try:
                        self._function(program, grid[0], engine, failures)(*arguments, PLAN)
                    except BaseException as error:
                        failures.append(error)

            with _running(Engine()) as engine:
                threads = [threading.Thread(target=programs) for _ in range(min(self.at_once, grid[0]))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            for failure in failures:
                raise failure

        return run


@contextmanager
def _running(engine):
    engine.start()
    try:
        yield engine
    finally:
        engine.asked.put(None)
        engine.join()
