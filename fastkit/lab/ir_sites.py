"""Find every memory access in a compiled kernel's TTGIR, Triton's last form before machine code, with its layouts.

Runs where Triton is imported without the interpreter: Triton's own parser reads the text, and its builder turns each
layout (blocked, slice, matrix instruction, ...) into the linear one that says which lane holds which element.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastkit.lab.layouts import LinearLayout
from fastkit.lab.machine_code import Place

GLOBAL = {
    "tt.load": "load",
    "tt.store": "store",
    "ttg.async_copy_global_to_local": "load",
    "tt.atomic_rmw": "atomic",
    "tt.atomic_cas": "atomic",
    "ttng.async_tma_copy_global_to_local": "load",
    "ttng.async_tma_copy_local_to_global": "store",
    "ttng.async_tma_gather": "load",
    "ttng.async_tma_scatter": "store",
    "ttng.async_tma_reduce": "atomic",
}
SHARED = {"ttg.local_load": "load", "ttg.local_store": "store", "ttg.local_alloc": "store"}
SCRATCH = ("ttg.convert_layout", "tt.reduce", "tt.scan", "tt.gather", "tt.histogram")  # may pass through shared memory


@dataclass(frozen=True)
class GlobalSite:
    """An access to global memory. `layout` is None where none is known (a copy of TMA, which no lane makes)."""

    kind: str  # load, store or atomic
    operation: str
    place: Place
    shape: tuple[int, ...]
    bits: int  # of an element
    layout: LinearLayout | None
    layout_text: str
    masked: bool


@dataclass(frozen=True)
class SharedSite:
    """An access to shared memory: where each element of the tile lies there, and which register holds it."""

    kind: str
    operation: str
    place: Place
    shape: tuple[int, ...]
    bits: int
    layout: LinearLayout | None
    offsets: np.ndarray | None  # int64 [elements of the tile]: each one's place in bytes; None for an unknown layout
    layout_text: str  # of shared memory
    register_text: str


def sites(ttgir: str, target) -> tuple[list[GlobalSite], list[SharedSite]]:
    """The accesses in `ttgir`, text that was compiled for `target` (a triton GPUTarget)."""
    from triton._C.libtriton import gluon_ir, ir
    from triton.backends import backends

    context = ir.context()
    ir.load_dialects(context)
    for backend in backends.values():
        if backend.compiler.supports_target(target):
            backend.compiler(target).load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttgir"
        path.write_text(ttgir)
        module = ir.parse_mlir_module(str(path), context)
    module.context = context
    warps = int(re.search(r'"ttg\.num-warps" = (\d+)', ttgir)[1])
    reader = _Reader(gluon_ir.GluonOpBuilder(context), _places_of_stores(ttgir), warps)
    operations = []
    module.walk(operations.append)
    for operation in operations:
        reader.read(operation)
    return reader.global_sites, reader.shared_sites


class _Reader:
    def __init__(self, builder, places, warps):
        self.builder = builder
        self.warps = warps
        self.places = {name: iter(of) for name, of in places.items()}
        self.global_sites, self.shared_sites = [], []

    def read(self, operation) -> None:
        name = operation.get_name()
        self.place = self.place_of(operation, name)
        if name in GLOBAL or name.startswith("amdg.buffer_") or name.startswith("amdgpu.buffer_"):
            self.global_sites.append(self.global_site(operation, name))
        elif name in SHARED and (name != "ttg.local_alloc" or operation.get_num_operands()):
            self.shared_sites.append(self.shared_site(operation, name))
        elif name in SCRATCH:
            self.scratch(operation, name)

    def place_of(self, operation, name) -> Place:
        if operation.get_num_results():
            return _place(str(operation.get_result(0).get_loc()))
        return next(self.places.get(name, iter(())), ())

    def global_site(self, operation, name) -> GlobalSite:
        operands = [operation.get_operand(i) for i in range(operation.get_num_operands())]
        types = [str(operand.get_type()) for operand in operands]
        kind = GLOBAL.get(name) or ("load" if "load" in name else "store" if "store" in name else "atomic")
        masked = sum("xi1" in text or text == "i1" for text in types) > 0
        if "tma" in name:
            tiles = [_memdesc(text) for text in types if "memdesc" in text]  # the other is the barrier
            shape, bits, _ = max(tiles, key=lambda tile: np.prod(tile[0]))
            return GlobalSite(kind, name, self.place, shape, bits, None, "none: the copy engine moves the tile", False)
        if "tensor<" not in types[0] and "tensor<" not in types[1 % len(types)]:  # one address
            return GlobalSite(
                kind, name, self.place, (), _bits(types[0]), _every_lane(self.warps), "one element", masked
            )
        tensor = operands[0] if "tensor<" in types[0] else operands[1]
        shape, bits = _tensor(str(tensor.get_type()))
        layout, text = self.register_layout(tensor, shape)
        return GlobalSite(kind, name, self.place, shape, bits, layout, text, masked)

    def shared_site(self, operation, name) -> SharedSite:
        operands = [operation.get_operand(i) for i in range(operation.get_num_operands())]
        results = [operation.get_result(i) for i in range(operation.get_num_results())]
        values = operands + results
        memory = next(value for value in values if "memdesc" in str(value.get_type()))
        tensor = next(value for value in values if "tensor<" in str(value.get_type()))
        shape, bits, allocated = _memdesc(str(memory.get_type()))
        shared = self.builder.get_gluon_layout_from_memdesc(memory)
        layout, register_text = self.register_layout(tensor, shape)
        offsets = shared_offsets(shared, shape, allocated, bits)
        return SharedSite(SHARED[name], name, self.place, shape, bits, layout, offsets, _short(shared), register_text)

    def scratch(self, operation, name) -> None:
        operands = [operation.get_operand(i) for i in range(operation.get_num_operands())]
        shape, bits = _tensor(str(operands[0].get_type()))
        if name == "ttg.convert_layout":
            before, after = (self.register_layout(v, shape)[0] for v in (operands[0], operation.get_result(0)))
            if before and after and before.warp == after.warp and _lanes_move(before, after):
                return  # by registers and shuffles
        for kind in ("store", "load"):
            self.shared_sites.append(
                SharedSite(kind, name, self.place, shape, bits, None, None, "chosen by the compiler", "")
            )

    def register_layout(self, tensor, shape) -> tuple[LinearLayout | None, str]:
        layout = self.builder.get_gluon_layout_from_tensor(tensor)
        linear = self.builder.to_linear_layout(layout._to_ir(self.builder), list(shape))
        if any(any(basis) for basis in linear.block_bases):
            return None, _short(layout)  # spread over the programs of a cluster
        bases = (tuple(map(tuple, b)) for b in (linear.reg_bases, linear.lane_bases, linear.warp_bases))
        return LinearLayout(tuple(shape), *bases), _short(layout)


def _lanes_move(before: LinearLayout, after: LinearLayout) -> bool:
    """Whether a conversion within warps is one that Triton makes without shared memory."""
    return sorted(before.register + before.lane) == sorted(after.register + after.lane)


def _every_lane(warps: int) -> LinearLayout:
    """The layout of a single number, which every lane of every warp holds."""
    return LinearLayout((), (), ((),) * 5, ((),) * (warps.bit_length() - 1))


def shared_offsets(layout, shape, allocated, bits) -> np.ndarray | None:
    """Where each element of a tile lies in shared memory: bytes from the start of its buffer, in C order.

    layout     a Gluon shared layout
    allocated  the buffer's shape, of which the tile is a part; the layout is that of the whole buffer
    """
    allocated = tuple(allocated[-len(shape) :])
    index = np.indices(allocated, dtype=np.int64).reshape(len(allocated), -1)
    name = type(layout).__name__
    if name == "SwizzledSharedLayout":
        places = _swizzled(index, allocated, layout.order, layout.vec, layout.per_phase, layout.max_phase)
    elif name == "NVMMASharedLayout" and not layout.fp4_padded:
        places = _swizzled_for_matrices(index, allocated, layout, bits)
    elif name in ("PaddedSharedLayout", "SharedLinearLayout"):
        numbers = LinearLayout(allocated, tuple(map(tuple, layout.offset_bases)), (), ()).elements()[0, :, 0]
        places = np.empty_like(numbers)
        places[numbers] = np.arange(len(numbers))
        pairs = getattr(layout, "interval_padding_pairs", ())
        places = places + sum(places // interval * padding for interval, padding in pairs)
    else:
        return None
    inside = tuple(slice(0, size) for size in shape)
    return (places.reshape(allocated)[inside] * bits // 8).reshape(-1)


def _swizzled(index, shape, order, vec, per_phase, max_phase) -> np.ndarray:
    """Vectors of `vec` elements change places within a row, by exclusive or with a phase that grows with the row."""
    minor, major = order[0], order[1] if len(order) > 1 else None
    column = index[minor]
    if major is not None:
        phase = index[major] // per_phase % max_phase
        column = ((column // vec) ^ phase) * vec + column % vec
    places, stride = column, shape[minor]
    for dim in order[1:]:
        places, stride = places + index[dim] * stride, stride * shape[dim]
    return places


def _swizzled_for_matrices(index, shape, layout, bits) -> np.ndarray:
    """The layout that WGMMA and TMA read: columns of tiles `swizzle_byte_width` wide, 16-byte vectors swizzled."""
    minor, major = (len(shape) - 2, len(shape) - 1) if layout.transposed else (len(shape) - 1, len(shape) - 2)
    width = layout.swizzle_byte_width * 8 // bits or shape[minor]
    vec = 128 // bits
    per_phase = max(1, 128 // max(16, layout.swizzle_byte_width))
    max_phase = max(1, layout.swizzle_byte_width // 16)
    tile, column = index[minor] // width, index[minor] % width
    phase = index[major] // per_phase % max_phase
    column = ((column // vec) ^ phase) * vec + column % vec
    places = (tile * shape[major] + index[major]) * width + column
    for dim in range(len(shape) - 2):
        places = places + index[dim] * int(np.prod(shape[dim + 1 :]))
    return places


def _places_of_stores(ttgir: str) -> dict[str, list[Place]]:
    """The places of operations without a result, by name and in order: Triton's binding does not give them."""
    named = dict(re.findall(r"^#(loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))
    found = {}
    for name, location in re.findall(r"^\s*([a-z]+\.[\w.]*)\b.* loc\(#(loc\d*)\)$", ttgir, re.MULTILINE):
        found.setdefault(name, []).append(_place(_expand(named.get(location, ""), named)))
    return found


def _expand(text: str, named: dict[str, str]) -> str:
    return re.sub(r"#(loc\d*)", lambda match: _expand(named.get(match[1], ""), named), text)


def _place(location: str) -> Place:
    found = re.findall(r'"([^"]+)":(\d+):(\d+)', location)
    return tuple((Path(file).name, int(line), int(column)) for file, line, column in found)


def _tensor(text: str) -> tuple[tuple[int, ...], int]:
    """(shape, bits of an element) of `tensor<64x32x!tt.ptr<f16>, #layout>`."""
    sizes, element = re.match(r"tensor<((?:\d+x)*)([^,]+)", text).groups()
    return tuple(int(size) for size in sizes.split("x") if size), _bits(element)


def _memdesc(text: str) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """(shape, bits of an element, the whole buffer's shape) of `!ttg.memdesc<64x16xf16, #l, #smem, mutable, 64x32>`."""
    sizes, element, rest = re.match(r"!ttg\.memdesc<((?:\d+x)+)([a-z]\w*)(.*)>$", text).groups()
    shape = tuple(int(size) for size in sizes.split("x") if size)
    whole = re.search(r", ((?:\d+x)*\d+)$", rest)
    return shape, _bits(element), tuple(map(int, whole[1].split("x"))) if whole else shape


def _bits(element: str) -> int:
    """Bits of an element type; of a pointer's, those of what it points to."""
    element = element.removeprefix("!tt.ptr<").removesuffix(">").split(",")[0]
    return (
        64 if "ptr" in element else int(re.search(r"\d+", element.removeprefix("f8"))[0]) if element[:2] != "f8" else 8
    )


def _short(layout) -> str:
    return re.sub(r", cga_layout=\[\]", "", str(layout))
