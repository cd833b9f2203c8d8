"""The PTX of an inline assembly, run on NumPy: registers are uint32 [W, 32], one of each lane of W warps."""

import ctypes
import itertools
import re

import numpy as np


class Memory:
    """Shared memory that starts at BASE, NaN until written. Copies are under way until they are waited for."""

    BASE = 1024

    def __init__(self, dtype=None, shape=(1, 256, 32), layout=None):
        self.words = np.full(shape, 0x7FC00000, np.uint32).reshape(-1)
        self.index = lambda number: self.words[8192 * number :][:8192].view(Tile)
        self.asked, self.groups = [], []
        self._keep_alive = lambda: None

    def places(self, addresses, alive, words=1, spread=True):
        """Indices of words [W, 32]; where `spread`, lanes that go at once want different banks, or the same word."""
        places = np.where(alive, addresses.astype(np.int64) - self.BASE, 0)
        assert (places % (4 * words) == 0).all() and (places >= 0).all() and (places < 4 * self.words.size).all()
        places //= 4
        for at_once in places.reshape(-1, 32 // words) if spread and np.all(alive) else ():
            assert len(np.unique(at_once // words % (32 // words))) == len(np.unique(at_once))
        return places

    def ask(self, to, source, alive, size):
        assert (source[alive] % size == 0).all()
        to = 4 * self.places(to, alive, size // 4, size == 16)
        self.asked.append((to[alive], [ctypes.string_at(int(address), size) for address in source[alive]]))

    def commit(self):
        self.groups.append(self.asked)
        self.asked = []

    def wait(self, but):
        while len(self.groups) > but:
            for to, found in self.groups.pop(0):
                for place, data in zip(to, found, strict=True):
                    self.words.view(np.uint8)[place : place + len(data)] = np.frombuffer(data, np.uint8)


class Tile(np.ndarray):
    def store(self, value):
        self[:] = value.handle.data.view(np.uint32).reshape(-1)


def floats(x):
    return x.view(np.float32)


def bits(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def half(x):
    return floats(x).astype(np.float16).view(np.uint16).astype(np.uint32)


def halves(register):
    """The two numbers of fp16 in each register."""
    return [part.astype(np.uint16).view(np.float16) for part in (register & 0xFFFF, register >> 16)]


def product(a, b, c):
    """mma.sync.m16n8k16 of registers [W, 32], by the fragments that PTX's documentation draws."""
    A, B, C = (np.zeros((len(c[0]), *shape)) for shape in ((16, 16), (16, 8), (16, 8)))
    g, t = np.divmod(np.arange(32), 4)
    for r, h in itertools.product(range(4), range(2)):
        A[:, g + 8 * (r % 2), 8 * (r // 2) + 2 * t + h] = halves(a[r])[h]
        B[:, 8 * (r % 2) + 2 * t + h, g] = halves(b[r % 2])[h]
        C[:, g + 8 * (r // 2), 2 * t + r % 2] = floats(c[r])
    with np.errstate(invalid="ignore"):
        C += A @ B
    return [bits(C[:, g + 8 * (r // 2), 2 * t + r % 2]) for r in range(4)]


def run(ptx, operands, memory):
    """The operands, uint32 [W, 32] of each warp's lanes, once `ptx` is through."""
    held = {f"${n}": operand for n, operand in enumerate(operands)} | {"global_smem": np.uint32(memory.BASE)}
    shape = operands[0].shape

    def value(name):
        if name not in held:
            number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
            return np.full(shape, number & 0xFFFFFFFF, np.uint32)
        return np.broadcast_to(held[name], shape)

    def address(operand):
        register, _, offset = operand[1:-1].partition("+")
        return value(register) + value(register).dtype.type(int(offset or 0))

    for predicate, name, rest in re.findall(r"(?:@(\w+)\s+)?([\w.]+)\s*([^;]*);", ptx):
        if name == "cp.async.commit_group":
            memory.commit()
            continue
        alive = np.broadcast_to(held.get(predicate, np.True_), shape)
        to, *given = re.findall(r"\[[^\]]*\]|\{[^}]*\}|[^,\s]+", rest)
        if name.startswith("mma"):
            a, b, c = ([value(each) for each in re.findall(r"[^{},\s]+", operand)] for operand in given)
            held |= dict(zip(re.findall(r"[^{},\s]+", to), product(a, b, c), strict=True))
        elif name == "ld.shared.u8":
            held[to] = memory.words[memory.places(address(given[0]) & ~np.uint32(3), alive)]
            held[to] = held[to] >> 8 * (address(given[0]) % 4) & 255
        elif name == "ld.shared.v2.b32":
            places = memory.places(address(given[0]), alive, 2)
            held |= dict(zip(re.findall(r"\w+", to), (memory.words[places], memory.words[places + 1]), strict=True))
        elif name.startswith("ld"):
            places = memory.places(address(given[0]), alive, spread=name != "ld.shared.f32")
            held[to] = np.where(alive, memory.words[places], held.get(to, 0))
        elif name.startswith("st"):
            memory.words[memory.places(address(to), alive)] = value(given[0])
        elif name.startswith("cp.async.c") and "shared" in name:
            memory.ask(address(to), address(given[0]), alive, int(given[1]))
        elif name == "cp.async.wait_group":
            memory.wait(int(to))
        elif name.startswith("shfl"):
            assert given[2:] == ["31", "-1"]
            source = np.arange(32) ^ value(given[1]) if "bfly" in name else value(given[1])
            held[to] = np.take_along_axis(value(given[0]), source, 1)
        elif name not in (".reg", "bar.warp.sync"):
            held[to] = CALCULATED[name](*map(value, given))
    return [held[f"${n}"] for n in range(len(operands))]


CALCULATED = {
    "mov.b32": np.array, "mov.f32": np.array, "add.s32": np.add, "add.u32": np.add, "and.b32": np.bitwise_and,
    "xor.b32": np.bitwise_xor, "shl.b32": np.left_shift,
    "dp4a.u32.u32": lambda a, b, c: sum(((a >> 8 * n & 255) * (b >> 8 * n & 255) for n in range(4)), c),
    "cvt.rn.f16x2.f32": lambda high, low: half(high) << 16 | half(low),
    "add.f32": lambda a, b: bits(floats(a) + floats(b)),
    "fma.rn.f32": lambda a, b, c: bits(floats(a).astype(np.float64) * floats(b) + floats(c)),
    "setp.eq.u32": np.equal, "setp.ge.u32": np.greater_equal, "setp.ne.u32": np.not_equal,
    "selp.f32": lambda a, b, p: np.where(p, a, b),
}  # fmt: skip
