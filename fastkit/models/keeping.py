"""Where a decoder layer's halves keep tensors between forward and backward: on the device, or in host memory.

Offloading works one half behind the computation. When a half keeps its tensors, those of the half before are sent to
pinned host memory, on a stream of their own that waits for their half alone, so beside the products that were launched
since; when a half's backward begins, those of the half before start their way back. So the copies hide behind the
products, and the last half, whose backward follows at once, never leaves.

Memory is held by hand and not by `record_stream`, under which the allocator keeps blocks until it happens to look: a
tensor that is copied out is let go only after the computing stream was told to wait for that copy, and one that comes
back is allocated on the computing stream, whose earlier work the copying stream waits for. So every block is taken and
freed in the order of the computing stream alone.

Host memory stays for the next pass, whatever its shape: to pin what one step of a 7B sends takes 5 s.
"""

import bisect
import weakref
from contextlib import nullcontext

import torch

from fastkit.errors import FastkitError

HOST_RESERVE = 2**30  # bytes of host memory that offloading leaves to everything else


class Keeper:
    """Keeps for all layers of one model, in the order of their forward; not for two threads at once."""

    def __init__(self):
        self._last = self._leaving = lambda: None  # weak references to what was kept last, and what is being copied out
        self._idle: list[_HostBuffer] = []  # by their sizes
        self._streams = None

    def keep(self, tensors: dict[str, torch.Tensor], offload: bool) -> "Kept":
        """Keep `tensors`, views dense in memory; with `offload`, on the host from the next `keep` on.

        Raises FastkitError where the host has no memory for them.
        """
        if (leaving := self._leaving()) is not None:
            leaving.let_go()
        before = self._last()
        if before is not None and before.offload and before.here is not None and not before.away:
            before.send()
            self._leaving = weakref.ref(before)
        kept = Kept(self, tensors, offload, before)
        self._last = weakref.ref(kept)
        return kept

    def clear(self) -> None:
        """Give back the host memory that lies ready for the next pass."""
        self._idle.clear()

    def join(self) -> None:
        """Have the current stream, in a capture that ends early, wait for the copies that were captured."""
        for stream in self._streams or ():
            with torch.cuda.stream(stream):
                captured = torch.cuda.is_current_stream_capturing()
            if captured:
                torch.cuda.current_stream(stream.device).wait_stream(stream)

    def settled(self) -> list["_HostBuffer"]:
        """That memory, for whoever holds its addresses. No copy is under way, so the next ones need not wait for any.

        A captured pass can wait for no event from outside it, nor a later pass for one of its own.
        """
        for buffer in self._idle:
            buffer.read = None
        return list(self._idle)

    def overwrite(self) -> None:
        """Zeros over that memory; no copy may be under way."""
        for buffer in self._idle:
            buffer.memory.zero_()

    def streams(self, device: torch.device) -> tuple:
        """(out, in), made once; (None, None) on the CPU."""
        if device.type != "cuda":
            return None, None
        if self._streams is None:
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams

    def buffer(self, x: torch.Tensor) -> "_HostBuffer":
        """Host memory for the numbers of x: the smallest that lies ready and suffices, or new."""
        at = bisect.bisect_left(self._idle, x.nbytes, key=_HostBuffer.nbytes)
        if at < len(self._idle):
            buffer = self._idle.pop(at)
        else:
            size = 1 << max(x.nbytes - 1, 0).bit_length()  # a power of 2: torch pins no less
            _check_host(size)
            buffer = _HostBuffer(size, pinned=x.device.type == "cuda")
        buffer.data = buffer.memory[: x.nbytes].view(x.dtype)
        return buffer

    def give_back(self, buffer: "_HostBuffer") -> None:
        bisect.insort(self._idle, buffer, key=_HostBuffer.nbytes)


class Kept:
    """Tensors that one half keeps, by name.

    here     on the device; None while they are away
    away     name: (its host buffer, shape, strides), from the start of the copy out on
    ready    the event after which they can be copied out
    """

    def __init__(self, keeper: Keeper, tensors: dict[str, torch.Tensor], offload: bool, before: "Kept | None"):
        self.keeper, self.offload = keeper, offload
        self.before = (lambda: None) if before is None else weakref.ref(before)
        self.here: dict[str, torch.Tensor] | None = {name: x.detach() for name, x in tensors.items()}
        self.versions = {name: x._version for name, x in tensors.items()}
        self.away: dict[str, tuple[_HostBuffer, tuple, tuple]] = {}
        self.device = next(iter(tensors.values())).device
        self.out = self.back = None  # events: the end of the copy out, and of the one back
        on_gpu = offload and self.device.type == "cuda"
        self.ready = torch.cuda.current_stream(self.device).record_event() if on_gpu else None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors on the device, for the work that the current stream does next."""
        self._check_unchanged()
        if self.here is None:
            self.bring()
        if self.back is not None:
            torch.cuda.current_stream(self.device).wait_event(self.back)
        if (before := self.before()) is not None and before.here is None:
            before.bring()
        return self.here

    def send(self) -> None:
        """Start the copy out."""
        self._check_unchanged()
        stream, _ = self.keeper.streams(self.device)
        buffers = {name: self.keeper.buffer(x) for name, x in self.here.items()}
        if stream is not None:
            stream.wait_event(self.ready)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for name, x in self.here.items():
                buffer = buffers[name]
                if buffer.read is not None:
                    stream.wait_event(buffer.read)
                buffer.data.copy_(x.as_strided((x.numel(),), (1,)), non_blocking=True)
                self.away[name] = buffer, tuple(x.shape), x.stride()
            self.out = None if stream is None else stream.record_event()

    def let_go(self) -> None:
        """Free the device's memory of what was copied out."""
        if self.out is not None:
            torch.cuda.current_stream(self.device).wait_event(self.out)
        self.here = None

    def bring(self) -> None:
        """Start the copy back."""
        _, stream = self.keeper.streams(self.device)
        flat = {
            name: torch.empty(buffer.data.shape, dtype=buffer.data.dtype, device=self.device)
            for name, (buffer, _, _) in self.away.items()
        }
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may be in use until then
            stream.wait_event(self.out)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for name, (buffer, _, _) in self.away.items():
                flat[name].copy_(buffer.data, non_blocking=True)
            if stream is not None:
                self.back = stream.record_event()
        self.here = {name: flat[name].as_strided(shape, strides) for name, (_, shape, strides) in self.away.items()}
        for buffer, _, _ in self.away.values():
            buffer.read = self.back

    def _check_unchanged(self) -> None:
        if self.here is not None and not self.away:
            for name, x in self.here.items():
                if x._version != self.versions[name]:
                    raise RuntimeError(f"{name} of a decoder layer was changed in place while kept for the backward")

    def __del__(self):
        for event in (self.out, self.back):  # the memory goes back to the allocator now, whoever waited or not
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)
        for buffer, _, _ in self.away.values():
            self.keeper.give_back(buffer)


class _HostBuffer:
    """Host memory for one tensor's numbers at a time.

    data    its part for the numbers of the tensor that it is for
    read    the event after which its numbers were read, and it can be written anew
    """

    def __init__(self, size: int, pinned: bool):
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.data = self.read = None

    def nbytes(self) -> int:
        return self.memory.nbytes


def _check_host(nbytes: int) -> None:
    import psutil

    if (free := psutil.virtual_memory().available - HOST_RESERVE) < nbytes:
        raise FastkitError(
            f"offloading needs {nbytes / 2**20:.0f} MiB more of host memory, and {max(free, 0) / 2**20:.0f} MiB are "
            "free: take a plan without offload, or a smaller batch"
        )
