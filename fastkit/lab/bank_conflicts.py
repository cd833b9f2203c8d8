"""Bank conflicts of a compiled kernel's accesses to shared memory, from the layouts on both sides."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fastkit.lab.compiling import Compiled
from fastkit.lab.ir_sites import SharedSite
from fastkit.lab.layouts import WORD, Requests, turns, wavefronts
from fastkit.lab.machine_code import Place

INSTRUCTIONS = {"load": ("ld.shared", "ldmatrix"), "store": ("st.shared", "stmatrix")}


@dataclass(frozen=True)
class SharedAccess:
    """A load or store of shared memory and its bank conflicts, in one execution by one program.

    operation    Triton's name of it: ttg.local_load, or ttg.convert_layout, which passes a tile through shared memory
    layout       of the tile in shared memory: its swizzle or padding
    instruction  "ld.shared", "ldmatrix", "st.shared", "stmatrix"
    wavefronts   turns that the banks take; `least` without conflicts
    unknown      why they are None
    """

    kind: str
    operation: str
    line: int
    source: str
    bits: int
    shape: tuple[int, ...]
    layout: str
    register_layout: str
    instruction: str = ""
    vector_bits: int | None = None
    requests: int | None = None
    wavefronts: int | None = None
    least: int | None = None
    offsets: np.ndarray | None = field(default=None, repr=False)  # int64 [lanes]: in bytes, each lane's first request
    unknown: str = ""

    @property
    def conflicts(self) -> int | None:
        return None if self.wavefronts is None else self.wavefronts - self.least

    @property
    def degree(self) -> float | None:
        """Turns for each that would do: 1 without conflicts, 32 where all lanes want one bank."""
        return self.wavefronts / self.least if self.least else None


def shared_accesses(compiled: Compiled, where: Callable[[Place], tuple[int, str]]) -> list[SharedAccess]:
    """The accesses to shared memory that stand in the machine code; `where` gives a place's line and text."""
    found = {}
    for site in compiled.shared_sites:
        key = site.kind, site.operation, site.place, site.shape, site.layout_text, site.register_text
        found.setdefault(key, site)
    accesses = []
    for site in found.values():
        made = {
            (instruction.name, instruction.bits)
            for instruction in compiled.memory_instructions
            if instruction.place == site.place and instruction.name in INSTRUCTIONS[site.kind]
        }
        if made:  # else it went through registers, or the matrix unit reads the tile where it lies
            accesses.append(_access(site, made, *where(site.place)))
    return accesses


def _access(site: SharedSite, made: set[tuple[str, int]], line: int, source: str) -> SharedAccess:
    about = (site.kind, site.operation, line, source, site.bits, site.shape, site.layout_text, site.register_text)
    name, bits = next(iter(made)) if len(made) == 1 else ("", 0)
    if not name:
        return SharedAccess(*about, unknown="several kinds of instructions stand at its place in the machine code")
    if site.offsets is None or site.layout is None:
        return SharedAccess(
            *about, instruction=name, vector_bits=bits or None, unknown="its layout is the compiler's own"
        )
    once = site.kind == "store"
    if name in ("ldmatrix", "stmatrix"):
        requests = Requests.of(site.layout, max(1, 32 // site.bits), once)
        taken, least = _matrices(site, requests)
    else:
        requests = Requests.of(site.layout, max(1, bits // site.bits), once)
        taken, least = wavefronts(site.offsets[requests.elements], max(8, bits) // 8, requests.active)
    return SharedAccess(
        *about,
        instruction=name,
        vector_bits=bits or None,
        requests=len(requests.elements),
        wavefronts=taken,
        least=least,
        offsets=np.where(requests.active[0], site.offsets[requests.elements[0]], -1),
    )


def _widest(site: SharedSite) -> int:
    """The most bits that a lane's neighbouring registers find side by side in shared memory, up to 128."""
    offsets = site.offsets[site.layout.elements()]  # [warps, registers, lanes]
    bits = site.bits
    while bits < 128 and 2 * bits // site.bits <= offsets.shape[1]:
        vector = 2 * bits // site.bits
        runs = offsets.reshape(offsets.shape[0], -1, vector, offsets.shape[2])
        if (np.diff(runs, axis=2) * 8 != site.bits).any() or (runs[:, :, 0] * 8 % (2 * bits)).any():
            break
        bits *= 2
    return bits


def _matrices(site: SharedSite, requests: Requests) -> tuple[int, int]:
    """Wavefronts of ldmatrix and stmatrix: 8 rows of 16 bytes at a time, 32 bits of them in each lane's register.

    Which lane's bits lie in which row, and whether the matrix is transposed, does not matter: the 128 bytes are asked
    for together, in one turn if they lie in different banks.
    """
    vector = requests.vector
    held = site.layout.elements()  # [warps, registers, lanes]
    warps, registers, lanes = held.shape
    matrices = held.reshape(warps, registers // vector, vector, lanes)
    starts = {int(first) for first in requests.elements[:, 0]}
    matrices = [m for m in matrices.reshape(-1, vector * lanes) if int(m[0]) in starts]
    words = site.offsets[np.array(matrices)] // WORD
    return turns(words, np.ones(words.shape, dtype=bool)), len(matrices)
