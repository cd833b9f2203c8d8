"""The most bytes of meta tensors that live at a time: what an allocator would have to give, without one."""

import weakref
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface


class LiveBytes(TorchDispatchMode):
    """Within, `peak` is the most that the storages made since took at a time. Triton's kernels do not run.

    there: tensors that were made before.
    """

    def __init__(self, there: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.known = {x.untyped_storage()._cdata for x in there}
        self.no_launches = mock.patch.object(KernelInterface, "__getitem__", lambda kernel, grid: lambda *_, **__: None)

    def __enter__(self):
        self.no_launches.start()
        return super().__enter__()

    def __exit__(self, *raised):
        self.no_launches.stop()
        return super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return 1  # transformers reads whether rows are packed: they are not
        if func is torch.ops.aten.copy_.default and args[1].device.type == "meta":
            return args[0]  # to the host, too
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.device.type == "meta":
                self._count(x.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self.known:
            self.known.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size
