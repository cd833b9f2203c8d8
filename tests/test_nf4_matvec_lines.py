"""The 4-bit product in whole lines: its arithmetic on a GPU; its PTX, addresses and machine code anywhere."""

import functools
import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from compiled import compile_all, interpret, pretended
from ptx_in_numpy import Memory, run
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
    return pretended(monkeypatch, module, nf4_matvec)


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


# Its arithmetic


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
    from triton.runtime.interpreter import TensorHandle

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
    interpret(monkeypatch, module)
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
