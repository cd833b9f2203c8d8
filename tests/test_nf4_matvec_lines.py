"""The 4-bit product in whole lines: its arithmetic on a GPU; its PTX, addresses and machine code anywhere."""

import ctypes
import functools
import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from compiled import compile_all
from tolerance import assert_as_close_as_torch

from fastkit.kernels import nf4, nf4_matvec
from fastkit.kernels import nf4_matvec_lines as module
from fastkit.kernels.common import INTERPRETED, tl
from fastkit.kernels.nf4_matvec_parts import SCALE
from fastkit.lab.gluon_interpreter import _language
from fastkit.lab.launches import catch
from fastkit.lab.portability import misfit
from fastkit.ops import dequantize_nf4, quantize_nf4

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def inputs(M, N, K, blocksize=64, double_quant=True, dtype=torch.float16, device="cpu"):
    weight = quantize_nf4(torch.randn(N, K, device=device).to(dtype), blocksize, double_quant)
    return torch.randn(M, K, device=device).to(dtype), weight


def within(M, N, dtype, device):
    """(y [M, N], the buffer of NaN that it lies in)."""
    buffer = torch.full((M * N + 64,), torch.nan, device=device).to(dtype)
    return buffer[32 : 32 + M * N].view(M, N), buffer


def check(y, buffer, x, weight):
    """Assert that y, in fp32, errs no more than the product with the dequantized weight, and nothing else is written.

    Before either is rounded to 16 bits: of few numbers so rounded the largest error is a matter of luck.
    """
    dense = nf4.reference(weight, torch.float64)
    theirs = x.double() @ dequantize_nf4(weight, x.dtype).double().T
    assert_as_close_as_torch(y, theirs.float(), x.double() @ dense.T, scale=x.double().abs() @ dense.T.abs())
    assert int(buffer.isnan().sum()) == 64


def check_rows(x, weight, y, tiling):
    """Assert that a row of y depends on no other row of x, and comes out the same again."""
    last = len(x) - 1
    x, again = x.clone(), torch.empty_like(y)
    x[last] = torch.nan
    module.launch(x, weight, again, **tiling)
    assert again[last].isnan().all() and torch.equal(again[:last], y[:last])


# Whom it takes


@pytest.fixture
def on_gpu(monkeypatch):
    """As if there were a GPU of the architecture that it is called with, and SMs."""

    def pretend(arch, sms=132):
        monkeypatch.setattr(module, "GLUON_MISSING", "")
        for kernels in (module, nf4_matvec):
            monkeypatch.setattr(kernels, "architecture", lambda device: arch)
            monkeypatch.setattr(kernels, "sm_count", lambda device: sms)

    return pretend


def launched(M=1, N=64, K=512, blocksize=64, dtype=torch.bfloat16, double_quant=True, device="meta", **tiling):
    """What is launched where nf4_matvec.launch chooses, or for tiling, where this file's launch does."""
    weight = nf4.empty_nf4((N, K), dtype, blocksize, double_quant, device)
    x, y = (torch.empty(M, columns, dtype=dtype, device=device) for columns in (K, N))
    (launch,) = catch(lambda: (module if tiling else nf4_matvec).launch(x, weight, y, **tiling))
    return launch


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_it_takes(arch, on_gpu):
    on_gpu(arch)
    for options in (
        dict(), dict(M=2), dict(M=8), dict(N=78), dict(K=256), dict(K=3584), dict(dtype=torch.float16),
        dict(blocksize=4096), dict(double_quant=False),
    ):  # fmt: skip
        assert launched(**options).name == "_few_rows_kernel", options


def test_what_it_leaves(on_gpu, monkeypatch):
    for arch in ("gfx942", "gfx1100", "interpreter", "no GPU", "sm_75"):
        on_gpu(arch)
        assert launched().name == ("_matvec_kernel" if arch == "sm_75" else "_batch_kernel")
    on_gpu("sm_90")
    for options in (
        dict(M=9), dict(M=16), dict(K=512 + 64), dict(K=8), dict(blocksize=32), dict(dtype=torch.float32, M=2),
        dict(device="cpu"),
    ):  # fmt: skip
        assert launched(**options).name == "_batch_kernel", options
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert launched().name == "_batch_kernel"
    x, y = (torch.empty(2, columns, device="meta", dtype=torch.float16) for columns in (520, 64))
    weight, first = nf4.empty_nf4((64, 512), torch.float16, device="meta"), x[:1, :512]
    assert module.takes(weight, first, y[:1], "sm_90") and not module.takes(weight, x[:, :512], y, "sm_90")
    first.data_ptr = lambda: 2  # as of a view of pairs that lie across words
    assert not module.takes(weight, first, y[:1], "sm_90")
    monkeypatch.setattr(module, "GLUON_MISSING", "as in Triton's interpreter")
    assert launched().name == "_batch_kernel"


def test_no_tile_is_left_and_none_done_twice(on_gpu):
    shapes = (132, 14336, 4096), (132, 4096, 14336), (108, 1000, 4096), (1, 2000, 5120), (132, 28672, 8192)
    for arch, (sms, N, K), M, dtype in itertools.product(
        ("sm_80", "sm_86", "sm_90"), shapes, (1, 3, 8), (torch.float16, torch.bfloat16)
    ):
        on_gpu(arch, sms)
        launch = launched(M, N, K, dtype=dtype)
        made, programs, tiles = launch.arguments["PLAN"], launch.grid[0], -(-N // 16)
        most = -(-tiles // programs)
        assert programs <= tiles and most <= made.W
        assert made.sums + most * made.W * (512 // made.beside) <= 2**15 * made.buffers
        assert made.buffers <= {"sm_80": 5, "sm_90": 7 if made.W == 16 else 3}.get(arch, 3)


# Its PTX, on lanes of NumPy


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


def test_scaled_code_is_20_times_nearer_than_dequantized_bfloat16():
    """Root mean squares of errors, of normal weights quantized in blocks of 64 whose absmax is 1 to 2."""
    code = torch.tensor(nf4.CODE)
    w = torch.randn(4096, 64).double()
    index = torch.bucketize(w / w.abs().amax(1, keepdim=True), ((code[1:] + code[:-1]) / 2).double())
    absmax = 1 + torch.rand(4096, 1)
    dequantized = (code[index] * absmax).bfloat16().double() / absmax
    scaled = (code * SCALE).half().double()[index] / SCALE
    errors = [(each - code.double()[index]).square().mean().sqrt() for each in (dequantized, scaled)]
    assert errors[1] < errors[0] / 19


# Its addresses, in Triton's interpreter


@pytest.fixture
def interpreted(monkeypatch, on_gpu):
    """The kernel in Triton's interpreter, which ignores layouts; PTX runs on NumPy. It is given the number of SMs."""
    if not INTERPRETED:
        pytest.skip("on a GPU it runs")
    from triton.runtime.interpreter import InterpretedFunction, TensorHandle

    language, held = _language(tl, module.gl), [Memory()]

    def allocate(*arguments):
        held[:] = [Memory(*arguments)]
        return held[0]

    def assembly(ptx, constraints, arguments, dtype, is_pure, pack):
        """A lane's registers are the axes before warps, t and g."""
        arrays = np.broadcast_arrays(*(argument.handle.data for argument in arguments))
        *axes, W, _, _ = arrays[0].shape
        arrays = [np.ascontiguousarray(each.swapaxes(-1, -2)) for each in arrays]
        arrays = [each.view(f"u{each.itemsize}").reshape(-1, W, 32) for each in arrays]
        assert constraints.count("=") == pack and constraints.count(",") + 1 == pack * (1 + len(arrays))
        result = np.zeros(arrays[0].shape, np.uint32)
        for first in range(0, len(result), pack):
            given = [register for each in (result, *arrays) for register in each[first : first + pack]]
            result[first : first + pack] = run(ptx, given, held[0])[:pack]
        data = np.ascontiguousarray(result.reshape(*axes, W, 8, 4).swapaxes(-1, -2))
        data = data.view(np.float32 if dtype == tl.float32 else np.int32)
        return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)))

    language.inline_asm_elementwise, language.allocate_shared_memory = assembly, allocate
    language.static_range, language.pointer_type = range, tl.pointer_type
    for name, value in list(vars(module).items()):
        if type(value).__name__ == "GluonJITFunction":
            kernel = InterpretedFunction(value.fn)
            kinds = kernel.rewrite().__annotations__  # the interpreter knows "tl.constexpr" and not "gl.constexpr"
            kinds.update({key: "constexpr" for key, kind in kinds.items() if "constexpr" in str(kind)})
            monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(module, "gl", language)
    monkeypatch.setattr(module, "barrier", lambda: None)
    return functools.partial(on_gpu, "sm_90")


cases = pytest.mark.parametrize(
    ("M", "N", "K", "blocksize", "double_quant", "sms", "tiling"),
    [(1, 32, 256, 64, True, 1, dict()), (1, 70, 2048, 64, True, 1, dict(num_warps=8)),
     (2, 34, 768, 128, False, 2, dict(num_warps=8, depth=1)), (3, 16, 4096, 64, True, 1, dict()),
     (4, 40, 2304, 64, True, 1, dict(num_warps=8)), (5, 18, 512, 256, True, 4, dict()),
     (8, 48, 5120, 4096, True, 1, dict(num_warps=8, depth=3)), (7, 96, 512, 4096, False, 1, dict(depth=1))],
)  # fmt: skip


@cases
def test_every_number_comes_from_its_place(M, N, K, blocksize, double_quant, sms, tiling, interpreted):
    interpreted(sms)
    x, weight = inputs(M, N, K, blocksize, double_quant)
    y, buffer = within(M, N, torch.float32, "cpu")
    module.launch(x, weight, y, **tiling)
    check(y, buffer, x, weight)
    check_rows(x, weight, y, tiling)
    rounded, buffer = within(M, N, torch.float16, "cpu")
    module.launch(x, weight, rounded, **tiling)
    assert torch.equal(rounded, y.half()) and int(buffer.isnan().sum()) == 64


@cases
def test_bfloat16_is_multiplied_as_it_is(M, N, K, blocksize, double_quant, sms, tiling, interpreted):
    """By CODE in fp16; whatever the size of its numbers, and of their neighbours."""
    interpreted(sms)
    x, weight = inputs(M, N, K, blocksize, double_quant)
    x[:, 64:128] *= torch.logspace(-4, 2, 64)
    x[:, 128:192] = 0
    x = (x * 2.0 ** torch.arange(-60, 61, 120 // M)[:M, None]).bfloat16()
    y, buffer = within(M, N, torch.float32, "cpu")  # the interpreter cannot round to bfloat16
    module.launch(x, weight, y, **tiling)
    exact = replace(weight, code=(weight.code * SCALE).half().double() / SCALE)
    dense = nf4.reference(exact, torch.float64)
    terms = x.double().abs() @ dense.T.abs()
    assert ((y - x.double() @ dense.T).abs() <= 1e-6 * terms).all() and int(buffer.isnan().sum()) == 64


def test_what_is_not_finite_stays_so(interpreted):
    interpreted(1)
    x, weight = inputs(3, 16, 512, dtype=torch.bfloat16)
    x[0, 100], x[1, 300], x[2] = torch.inf, torch.nan, 2.0**-130
    y, _ = within(3, 16, torch.float32, "cpu")
    module.launch(x, weight, y)
    true = x.float() @ nf4.reference(weight, torch.float32).T
    assert torch.equal(y[:2].isfinite(), true[:2].isfinite()) and y[1].isnan().all() and y[2].isfinite().all()
    assert torch.equal(y[0][true[0].isinf()], true[0][true[0].isinf()])


# Its machine code


def check_code(function, arch):
    """In its loop are look-ups, products, copies to shared memory, no barrier and, but for x, no load into registers,
    which would be waited for with all others; 16 warps fit an SM; shared memory is what it allocates."""
    (launch,), (made,) = catch(function), compile_all(function, arch)
    plan = launch.arguments["PLAN"]
    found = Counter(f"{each.name} {each.bits}" for each in made.memory_instructions if each.looped)
    assert made.kernel == "_few_rows_kernel" and not misfit(made)
    assert made.registers <= 128 and made.shared_bytes == 32768 * plan.buffers
    # Of absmax a code and a factor, or itself, in 2 rows; what is predicated is not counted.
    assert found["ld.shared 32"] == 64 + (4 if plan.double_quant else 2)
    assert found["ld.shared 64"] == 8 and found["HMMA 0"] == 16 and found["st.shared 32"] == 4 // plan.beside
    copies = Counter(re.findall(r"cp\.async\.c[ag]\S+.*, (\d+);", made.code))
    assert copies == ({"16": 8, "4": 2} if plan.double_quant else {"16": 10})
    assert found["bar.sync 0"] == 0 and made.instructions["bar.sync"] <= 4
    if plan.stretches == 1:
        assert not any(each.startswith("ld.global") for each in found)
        bf16 = launch.arguments["x_ptr"].dtype == torch.bfloat16
        assert found["shfl 0"] == {4: 3, 2: 2 + 4, 1: 8 + 8 * bf16}[plan.beside]  # of sums, of absmax, of x's scale


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_code(arch, on_gpu):
    on_gpu(arch)
    for name, example in module.examples().items():
        if arch in ("sm_80", "sm_90") or name.endswith("M 1"):
            check_code(example, arch)
    if arch in ("sm_80", "sm_90"):
        for M, N, K, blocksize, double_quant, dtype in (
            (1, 78, 3584, 64, True, torch.bfloat16), (4, 64, 4096, 128, False, torch.bfloat16),
            (1, 14336, 4096, 64, True, torch.float16), (8, 64, 4096, 64, True, torch.float16),
        ):  # fmt: skip
            weight = nf4.empty_nf4((N, K), dtype, blocksize, double_quant, "meta")
            x, y = (torch.empty(M, columns, dtype=dtype, device="meta") for columns in (K, N))
            check_code(functools.partial(module.launch, x, weight, y), arch)


@pytest.mark.parametrize("arch", ["sm_75", "gfx942"])
def test_examples_say_what_runs_instead(arch, on_gpu):
    on_gpu(arch)
    for example in module.examples(torch.float16).values():
        with pytest.raises(NotImplementedError, match=f"this is {arch}: use "):
            example()


# Its numbers, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("M", "N", "K", "blocksize", "double_quant"),
    [(1, 1000, 4096, 64, True), (2, 333, 256, 64, False), (3, 500, 3584, 128, True), (4, 77, 14336, 64, True),
     (5, 160, 5120, 512, False), (6, 2049, 2304, 64, True), (7, 48, 4096, 256, True), (8, 4128, 512, 4096, True)],
)  # fmt: skip
def test_on_a_gpu(M, N, K, blocksize, double_quant, dtype, monkeypatch, device):
    x, weight = inputs(M, N, K, blocksize, double_quant, dtype, device)
    for sms, tiling in itertools.product((1, 132), (dict(), dict(num_warps=8, depth=1), dict(num_warps=16, depth=2))):
        monkeypatch.setattr(module, "sm_count", lambda device, sms=sms: sms)
        y, buffer = within(M, N, torch.float32, device)
        assert module.takes(weight, x, y, module.architecture(x.device))
        module.launch(x, weight, y, **tiling)
        check(y, buffer, x, weight)
        check_rows(x, weight, y, tiling)
        rounded, buffer = within(M, N, dtype, device)
        module.launch(x, weight, rounded, **tiling)
        assert torch.equal(rounded, y.to(dtype)) and int(buffer.isnan().sum()) == 64


@pytest.mark.gpu
def test_under_torch_compile_and_in_a_graph(device):
    """torch.compile's graphs have _batch_kernel."""
    for M in (1, 8):
        x, weight = inputs(M, 1024, 512, dtype=torch.bfloat16, device=device)
        plain = nf4_matvec.nf4_matvec(x, weight)
        compiled = torch.compile(lambda x, w=weight: nf4_matvec.nf4_matvec(x, w), fullgraph=True)(x)
        torch.testing.assert_close(compiled, plain, rtol=2**-6, atol=2**-6)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = nf4_matvec.nf4_matvec(x, weight)
        graph.replay()
        assert torch.equal(captured, plain)
