"""Read a compiled kernel's code: registers, spills, the instructions that matter, and the line that each came from."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

Place = tuple[tuple[str, int, int], ...]  # (file's name, line, column), from the innermost call outwards

NVIDIA = {  # in PTX, by the name of the machine instruction where it has its own
    "ld.global": r"ld\.(?:volatile\.|relaxed\.[\w.]*?)?global",
    "st.global": r"st\.(?:volatile\.|relaxed\.[\w.]*?)?global",
    "cp.async": r"cp\.async\.c[ag]\.shared\.global",
    "TMA load": r"cp\.async\.bulk\.tensor[\w.:]*\.shared::\w+\.global",
    "TMA store": r"cp\.(?:async\.bulk|reduce\.async\.bulk)\.tensor[\w.:]*\.global\.shared",
    "ld.shared": r"ld\.(?:volatile\.)?shared",
    "st.shared": r"st\.(?:volatile\.)?shared",
    "ldmatrix": r"ldmatrix\.",
    "stmatrix": r"stmatrix\.",
    "HMMA": r"mma\.sync",
    "WGMMA": r"wgmma\.mma_async",
    "TCGEN05": r"tcgen05\.mma",
    "shfl": r"shfl\.",
    "bar.sync": r"(?:bar\.sync|barrier\.sync)",
    "atomic": r"(?:atom|red)\.",
    "ld.local": r"ld\.local",
    "st.local": r"st\.local",
}
AMD = {
    "ld.global": r"(?:global|buffer|flat)_load_",
    "st.global": r"(?:global|buffer|flat)_store_",
    "ld.shared": r"ds_(?:read|load)_",
    "st.shared": r"ds_(?:write|store)_",
    "MFMA": r"v_mfma_",
    "WMMA": r"v_s?wmma",
    "shfl": r"ds_(?:bpermute|permute|swizzle)_|v_mov_b32_dpp|v_permlane|\S+_dpp",
    "bar.sync": r"s_barrier",
    "atomic": r"(?:global|buffer|flat|ds)_atomic",
}
SIZED = ("ld.global", "st.global", "cp.async", "ld.shared", "st.shared")  # counted by their bits a lane


@dataclass(frozen=True)
class Instruction:
    """A memory instruction: its name in NVIDIA or AMD, the bits of a lane (0 if it has no such size), its origin, and
    whether it stands in a loop of the machine code."""

    name: str
    bits: int
    place: Place
    looped: bool


def ptx_instructions(ptx: str) -> tuple[Counter, list[Instruction]]:
    """(counts by name, with the bits a lane as in "ld.global.128"; every memory instruction) of a kernel's PTX."""
    files = {number: Path(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]+)"', ptx)}
    counts, found, places = Counter(), [], _Places(files)
    lines = [line.strip() for line in ptx.splitlines()]
    loops = _loops(lines)
    for number, line in enumerate(lines):
        places.read(line)
        code = re.sub(r"^@!?%\w+\s+", "", line.lstrip("{ "))
        for name, pattern in NVIDIA.items():
            if re.match(pattern, code):
                bits = _ptx_bits(name, code)
                counts[f"{name}.{bits}" if bits else name] += 1
                looped = any(first <= number <= last for first, last in loops)
                found.append(Instruction(name, bits, places.now, looped))
                break
    return counts, found


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """(first line, last line) of each loop: from a label to a branch back to it."""
    labels = {line.partition(":")[0]: number for number, line in enumerate(lines) if line.startswith("$L")}
    branches = ((number, re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)) for number, line in enumerate(lines))
    return [(labels[to[1]], number) for number, to in branches if to and labels.get(to[1], number) < number]


class _Places:
    """Follows PTX's `.loc` lines: an instruction's place is that of the last one, with its calls."""

    def __init__(self, files: dict[str, str]):
        self.files = files
        self.now: Place = ()
        self.known = {}  # a place without its calls -> with them
        self.in_assembly = False

    def read(self, line: str) -> None:
        if "inline asm" in line:  # within it, .loc counts the assembly's own lines
            self.in_assembly = "begin" in line
        if not line.startswith((".loc\t", ".loc ")) or self.in_assembly:
            return
        directive, _, comment = line.partition("//")
        called = re.findall(r"([^\s\[\]@][^\[\]@]*):(\d+):(\d+)", comment)
        if len(called) > 1:  # .loc 1 4 19  // k.py:4:19 @[ k.py:15:65 ]
            self.now = tuple((Path(file).name, int(row), int(column)) for file, row, column in called)
            return
        inlined = re.search(r"inlined_at (\d+) (\d+) (\d+)", directive)
        own = self.place(*directive.replace(",", "").split()[1:4])
        outer = self.place(*inlined.groups()) if inlined else None
        self.now = (own, *self.known.get(outer, (outer,))) if outer else (own,)
        self.known[own] = self.now

    def place(self, number: str, row: str, column: str) -> tuple[str, int, int]:
        return self.files.get(number, number), int(row), int(column)


def _ptx_bits(name: str, code: str) -> int:
    if name == "cp.async":
        return 8 * int(re.search(r"\], (0x[0-9a-f]+|\d+)", code)[1], 0)
    if name not in SIZED:
        return 0
    vector = re.search(r"\.v(\d)", code.split()[0])
    return int(vector[1] if vector else 1) * int(re.search(r"\.[bsuf](\d+)$", code.split()[0])[1])


def amd_instructions(assembly: str) -> Counter:
    """Counts by name, with the bits a lane, of a kernel's AMD assembly."""
    bits = {"ubyte": 8, "sbyte": 8, "byte": 8, "u8": 8, "i8": 8, "b8": 8, "ushort": 16, "sshort": 16, "short": 16}
    bits |= {"u16": 16, "i16": 16, "b16": 16, "d16": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    bits |= {"b32": 32, "b64": 64, "b96": 96, "b128": 128, "2addr": 0}
    counts = Counter()
    for line in assembly.splitlines():
        code = line.strip()
        for name, pattern in AMD.items():
            match = re.match(pattern, code)
            if match:
                words = code.split()[0][match.end() :].split("_")
                width = next((bits[word] for word in words if word in bits), 0) if name in SIZED else 0
                counts[f"{name}.{width}" if width else name] += 1
                break
    return counts


def nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes that it spilled to local memory), as the assembler recorded them."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        dump = [str(cuobjdump), "--dump-resource-usage", str(path)]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def amd_resources(assembly: str) -> tuple[int, int]:
    """(vector registers of a thread, bytes that it spilled to scratch memory)."""
    used = {
        key: int(value) for key, value in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s*(\d+)", assembly)
    }
    return used["vgpr_count"], used["private_segment_fixed_size"]
