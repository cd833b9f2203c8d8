"""The memory that an answer works on: every tensor between guard bands, every number known to have been written or not.

All bytes that are nobody's (guard bands, gaps between rows) and all outputs start as POISON, which is nan in every
floating-point type.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

GUARD = 64 * 2**10  # bytes before and after each tensor
POISON = 0xFF
NOBODY, MANY = -1, -2  # instead of a program's number


@dataclass
class Buffer:
    """A tensor, the bytes around it, and what was done to each element of its memory."""

    name: str
    role: str  # input, output, or scratch: a tensor that the answer made itself
    tensor: torch.Tensor
    start: int  # address of the tensor's first element
    span: int  # elements from the first to the last, gaps included
    places: np.ndarray  # int64 [span]: which number of the tensor, in row order, lies there; -1 for a gap
    low: int  # the allocation's addresses
    high: int
    raw: torch.Tensor | None = None  # the allocation as bytes
    before: torch.Tensor | None = None  # an input's bytes before the run
    written: np.ndarray = field(init=False)  # by anybody
    stored: np.ndarray = field(init=False)  # by a kernel
    writer: np.ndarray = field(init=False)  # in this launch: the last program that wrote it
    reader: np.ndarray = field(init=False)  # in this launch: the program that read it, or MANY

    def __post_init__(self):
        self.written = np.full(self.span, self.role != "output")
        self.stored = np.zeros(self.span, dtype=bool)
        self.start_launch()

    def start_launch(self) -> None:
        self.writer = np.full(self.span, NOBODY, dtype=np.int64)
        self.reader = np.full(self.span, NOBODY, dtype=np.int64)

    def words(self) -> np.ndarray:
        """The memory as unsigned integers, one an element, that hold its bits."""
        kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[self.tensor.dtype.itemsize]
        flat = torch.as_strided(self.tensor, (self.span,), (1,))
        return flat.view(torch.uint8).numpy().view(kind)

    def label(self, element: int) -> str:
        """x[3, 5] for an element of the tensor; x_ptr + 9 for what lies outside of it or between its rows."""
        inside = 0 <= element < self.span
        if inside and self.places[element] >= 0:
            index = np.unravel_index(self.places[element], self.tensor.shape) if self.tensor.dim() else ()
            return f"{self.name}[{', '.join(str(int(i)) for i in index)}]"
        return f"{self.name}_ptr {'-' if element < 0 else '+'} {abs(element)}"

    def labels(self, elements) -> str:
        """The first and the last of some elements, and how many there are."""
        elements = np.unique(elements)
        first, last = self.label(int(elements[0])), self.label(int(elements[-1]))
        return first if len(elements) == 1 else f"{len(elements)} elements, {first} to {last}"


class Memory:
    """The buffers of one run, in order of their addresses."""

    def __init__(self, device: str):
        self.device = device
        self.buffers: list[Buffer] = []
        self.starts = np.empty(0, dtype=np.int64)

    def __getitem__(self, name: str) -> Buffer:
        return next(buffer for buffer in self.buffers if buffer.name == name)

    def of_role(self, role: str) -> list[Buffer]:
        return [buffer for buffer in self.buffers if buffer.role == role]

    def place(self, name: str, role: str, shape, dtype, strides, values: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor of that shape in guarded memory, holding `values`, or POISON."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        raw = torch.full((span * dtype.itemsize + 2 * GUARD,), POISON, dtype=torch.uint8, device=self.device)
        inner = raw[GUARD : GUARD + span * dtype.itemsize].view(dtype)
        tensor = inner.as_strided(shape, strides)
        if values is not None:
            tensor.copy_(values)
        start = inner.data_ptr()
        places = _places(span, tensor, start)
        before = raw.clone() if role == "input" else None
        low, high = start - GUARD, start + span * dtype.itemsize + GUARD
        self._add(Buffer(name, role, tensor, start, span, places, low, high, raw, before))
        return tensor

    def adopt(self, tensor: torch.Tensor) -> None:
        """Know a tensor that the answer made."""
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or tensor.device.type != self.device or self.owner(start) is not None:
            return
        span = size // tensor.dtype.itemsize
        whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (span,), (1,))
        name = f"your own tensor {len(self.of_role('scratch')) + 1}"
        self._add(Buffer(name, "scratch", whole, start, span, np.arange(span), start, start + size))

    def fill(self, tensor: torch.Tensor) -> None:
        """Note that torch has filled `tensor`, a view of a known one."""
        buffer = self.owner(tensor.data_ptr())
        if buffer and tensor.numel():
            places = _places(buffer.span, tensor, buffer.start)
            buffer.written |= places >= 0

    def owner(self, address: int) -> Buffer | None:
        """The buffer whose allocation holds `address`."""
        number = int(np.searchsorted(self.starts, address, side="right")) - 1
        if number >= 0 and address < self.buffers[number].high:
            return self.buffers[number]
        return None

    def nearest(self, address: int) -> Buffer:
        return min(self.buffers, key=lambda buffer: max(buffer.low - address, address - buffer.high, 0))

    def _add(self, buffer: Buffer) -> None:
        self.buffers.append(buffer)
        self.buffers.sort(key=lambda buffer: buffer.low)
        self.starts = np.array([buffer.low for buffer in self.buffers], dtype=np.int64)


def _places(span: int, tensor: torch.Tensor, start: int) -> np.ndarray:
    """For each of `span` elements from `start` on: which number of `tensor` lies there, or -1."""
    offset = (tensor.data_ptr() - start) // tensor.dtype.itemsize
    elements = torch.arange(span).as_strided(tensor.shape, tensor.stride(), offset).flatten()
    places = np.full(span, -1, dtype=np.int64)
    places[elements.numpy()] = np.arange(len(elements))
    return places
