"""Every rung of every ladder computes its operation, for any shape and layout, and says so when it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch

from fastkit.kernels.common import tl, triton
from fastkit.kernels.ladders import copy as copies
from fastkit.kernels.ladders import matmul as matmuls
from fastkit.kernels.ladders import rung as rungs
from fastkit.kernels.ladders import softmax as softmaxes
from fastkit.kernels.ladders import transpose as transposes
from fastkit.kernels.ladders.copy import copy
from fastkit.kernels.ladders.matmul import _tile, matmul
from fastkit.kernels.ladders.softmax import softmax
from fastkit.kernels.ladders.transpose import transpose
from fastkit.lab.gluon_interpreter import interpreted

ROOT = Path(__file__).parents[1]
LADDERS = [copies, transposes, softmaxes, matmuls]
pytestmark = [
    pytest.mark.usefixtures("poisoned", "fresh_seed"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered"),  # in rows of -inf
]


def names(module, leave_out=()):
    """The rungs' names as parameters; those in Gluon run on a GPU only."""
    found = [rung for rung in module.RUNGS if rung.name not in leave_out]
    return [pytest.param(rung.name, marks=[pytest.mark.gpu] if rung.gluon else []) for rung in found]


def named(module, name):
    return next(rung for rung in module.RUNGS if rung.name == name)


def runs_here(module, name, device):
    if lacking := named(module, name).lacking(torch.device(device)):
        pytest.skip(f"{name} {lacking}")


def random(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, device=device).to(dtype)


# Copy


@pytest.mark.parametrize("name", names(copies))
@pytest.mark.parametrize("shape", [(), (0,), (1,), (31,), (4096,), (4097,), (3, 5, 7), (2, 4095), (20000,)], ids=str)
def test_copy(name, shape, dtype, device):
    x = random(*shape, dtype=dtype, device=device)
    y = copy(x, name)
    assert torch.equal(x, y) and (y.data_ptr() != x.data_ptr() or not x.numel())


@pytest.mark.parametrize("name", names(copies))
@given(n=st.integers(1, 10000), before=st.integers(0, 9))
def test_copy_writes_its_own_numbers_only(name, dtype, device, n, before):
    x, memory = random(n, dtype=dtype, device=device), torch.full((before + n + 9,), 7.0, dtype=dtype, device=device)
    named(copies, name).launch(x, memory[before : before + n])
    assert torch.equal(memory[before : before + n], x)
    assert (memory[:before] == 7).all() and (memory[before + n :] == 7).all()


# Transpose


@pytest.mark.parametrize("name", names(transposes))
@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (1, 1), (1, 100), (100, 1), (32, 32), (64, 64), (33, 130), (257, 65)], ids=str
)
def test_transpose(name, shape, dtype, device):
    runs_here(transposes, name, device)
    x = random(*shape, dtype=dtype, device=device)
    y = transpose(x, name)
    assert torch.equal(y, x.T) and y.is_contiguous()


@pytest.mark.parametrize("name", names(transposes))
@given(M=st.integers(1, 150), N=st.integers(1, 150), before=st.integers(0, 9))
def test_transpose_of_strided_rows_writes_its_own_numbers_only(name, dtype, device, M, N, before):
    runs_here(transposes, name, device)
    x = random(M, before + N + 3, dtype=dtype, device=device)[:, before : before + N]
    memory = torch.full((N, M + 8), 7.0, dtype=dtype, device=device)
    named(transposes, name).launch(x, memory[:, :M])
    assert torch.equal(memory[:, :M], x.T) and (memory[:, M:] == 7).all()


@pytest.mark.skipif(not rungs.INTERPRETED, reason="on a GPU the kernel runs as it is")
@pytest.mark.parametrize("name", [rung.name for rung in transposes.RUNGS if rung.gluon])
@settings(max_examples=4)
@given(M=st.integers(1, 150), N=st.integers(1, 150))
def test_gluon_transposes_but_for_their_layouts(name, dtype, M, N):
    """The kernel in Triton's interpreter, where a layout moves nothing: its addresses and masks."""
    x, y = random(M, N + 3, dtype=dtype)[:, 3:], torch.full((N, M + 8), 7.0, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triton.runtime.jit._normalize_ty", lambda kind: str(kind).split(".")[-1])  # knows gl.constexpr
        patch.setattr(transposes, "gl", transposes.gl)  # `interpreted` replaces it
        patch.setattr(transposes, "_tile_kernel", interpreted(transposes._tile_kernel))
        named(transposes, name).launcher(x, y[:, :M])
    assert torch.equal(y[:, :M], x.T) and (y[:, M:] == 7).all()


def test_transpose_of_other_layouts(dtype, device):
    x = random(40, 70, dtype=dtype, device=device)
    for layout in (x.T, x[::2], x[:, ::3], x[:1].expand(9, 70), x[:, :1].expand(40, 9)):
        assert torch.equal(transpose(layout), layout.T.contiguous())


# Softmax


def check_softmax(x, name):
    ours, theirs = softmax(x, name), torch.softmax(x, -1)
    assert_as_close_as_torch(ours, theirs, torch.softmax(x.double(), -1))


@pytest.mark.parametrize("name", names(softmaxes))
@pytest.mark.parametrize("shape", [(1,), (5, 1), (3, 2), (2, 3, 100), (9, 1024), (7, 1025), (3, 5000)], ids=str)
def test_softmax(name, shape, dtype, device):
    check_softmax(random(*shape, dtype=dtype, device=device), name)


@pytest.mark.parametrize("name", names(softmaxes))
@given(M=st.integers(1, 12), N=st.integers(1, 3000), scale=st.sampled_from([1e-3, 1, 100, 5e3]), shift=st.booleans())
def test_softmax_at_any_shape_and_scale(name, dtype, device, M, N, scale, shift):
    x = scale * random(M, N + 1, device=device) + (scale if shift else 0)
    check_softmax(x.to(dtype)[:, 1:], name)  # rows that begin anywhere, N + 1 apart


@pytest.mark.parametrize("name", names(softmaxes))
def test_softmax_layouts(name, dtype, device):
    x = random(6, 50, dtype=dtype, device=device)
    for layout in (x.T, x[::2], x[:, ::3], x[:1].expand(9, 50), x[:, :1].expand(6, 9), x[:0]):
        check_softmax(layout, name)


@pytest.mark.parametrize("name", names(softmaxes, leave_out=("fused", "persistent")))
def test_softmax_of_long_rows(name, dtype, device):
    x = random(2, 100_001, dtype=dtype, device=device)
    check_softmax(x, name)
    assert torch.equal(softmax(x), softmax(x, "online"))  # what the choice falls back on


@pytest.mark.parametrize("name", names(softmaxes))
@pytest.mark.parametrize("N", [3, 5000])
def test_softmax_of_infinities_and_nan(name, N, dtype, device):
    x = random(6, N, dtype=dtype, device=device)
    x[0] = -torch.inf
    x[1, : N - 1] = -torch.inf  # a whole block of it, for the rungs that go block by block
    x[2, N // 2 :] = -torch.inf
    x[3, -1] = torch.inf
    x[4, 0] = torch.nan
    ours, theirs = softmax(x, name), torch.softmax(x, -1)
    assert torch.equal(ours.isnan(), theirs.isnan())
    torch.testing.assert_close(ours, theirs, equal_nan=True)


WRONG_SOFTMAX = {
    "no maximum": lambda x: (x.float().exp() / x.float().exp().sum(-1, keepdim=True)).to(x.dtype),
    "over columns": lambda x: x.softmax(0),
    "rounded twice": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    "last column left out": lambda x: torch.cat([x[:, :-1].softmax(-1), x[:, -1:] * 0], -1),
}


@pytest.mark.parametrize("wrong", WRONG_SOFTMAX)
def test_wrong_softmaxes_are_caught(wrong):
    x = (3 * torch.randn(60, 100)).half()
    if wrong == "no maximum":
        x += 100
    with pytest.raises(AssertionError, match=r"error|not finite"):
        assert_as_close_as_torch(WRONG_SOFTMAX[wrong](x), x.softmax(-1), x.double().softmax(-1))


# Matmul

TENSOR_CORES = ("tensor_cores", "pipelined", "persistent")


def check_matmul(a, b, name):
    ours, theirs, truth = matmul(a, b, name), a @ b, a.double() @ b.double()
    assert_as_close_as_torch(ours, theirs, truth, scale=a.double().abs() @ b.double().abs())


def for_matmul(name, dtype, device):
    """The dtype that the rung is tested in: fp32 stands for the tensor cores' fp16, once more."""
    runs_here(matmuls, name, device)
    return torch.float16 if name in TENSOR_CORES and dtype == torch.float32 else dtype


@pytest.mark.parametrize("name", names(matmuls, leave_out=("persistent",)))
@pytest.mark.parametrize(
    "M_N_K", [(1, 1, 1), (1, 70, 9), (70, 1, 33), (64, 64, 64), (65, 129, 31), (130, 40, 100), (3, 5, 0), (0, 5, 3)]
)
def test_matmul(name, M_N_K, dtype, device):
    dtype = for_matmul(name, dtype, device)
    M, N, K = M_N_K
    check_matmul(random(M, K, dtype=dtype, device=device), random(K, N, dtype=dtype, device=device), name)


@pytest.mark.parametrize("name", names(matmuls, leave_out=("persistent",)))
@given(M=st.integers(1, 90), N=st.integers(1, 90), K=st.integers(1, 70), layout=st.sampled_from(["nt", "sliced"]))
def test_matmul_at_any_shape_and_layout(name, dtype, device, M, N, K, layout):
    dtype = for_matmul(name, dtype, device)
    a, b = random(M, K, dtype=dtype, device=device), random(N, K, dtype=dtype, device=device).T
    if layout == "sliced":
        a, b = random(2 * M, K + 3, dtype=dtype, device=device)[::2, 3:], b[:, ::2]
    check_matmul(a, b, name)


@pytest.mark.parametrize("transposed_a", [False, True])
@pytest.mark.parametrize("transposed_b", [False, True])
@pytest.mark.parametrize("halves", [False, True])
@given(M=st.integers(1, 40), N=st.integers(1, 40), K=st.integers(1, 30))
def test_persistent_matmul(transposed_a, transposed_b, halves, dtype, device, M, N, K):
    dtype = for_matmul("persistent", dtype, device)
    M, N, K = 8 * M, 8 * N, 8 * K  # rows that begin at multiples of 16 bytes
    a = random(K, M, dtype=dtype, device=device).T if transposed_a else random(M, K, dtype=dtype, device=device)
    b = random(N, K, dtype=dtype, device=device).T if transposed_b else random(K, N, dtype=dtype, device=device)
    memory = torch.full((M, N + 16), 7.0, dtype=dtype, device=device)
    tiling = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, HALVES=halves, num_warps=4, num_stages=3, programs=3)
    named(matmuls, "persistent").launch(a, b, memory[:, :N], **tiling)
    truth, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert_as_close_as_torch(memory[:, :N], a @ b, truth, scale=scale)
    assert (memory[:, N:] == 7).all()
    check_matmul(a, b, "persistent")  # with its own tiling


@triton.jit
def _tiles_kernel(first_ptr, M, N, BLOCK: tl.constexpr, GROUP_M: tl.constexpr):
    row, col = _tile(tl.program_id(0), M, N, BLOCK, BLOCK, GROUP_M)
    tl.store(first_ptr + tl.program_id(0), row * 1000 + col)


@pytest.mark.parametrize("tiles_m_tiles_n_group", [(1, 1, 8), (5, 3, 1), (5, 3, 2), (7, 2, 8), (16, 5, 8)])
def test_grouping_gives_every_tile_once(tiles_m_tiles_n_group, device):
    tiles_m, tiles_n, group = tiles_m_tiles_n_group
    first = torch.zeros(tiles_m * tiles_n, dtype=torch.int32, device=device)
    _tiles_kernel[(tiles_m * tiles_n,)](first, 16 * tiles_m - 3, 16 * tiles_n - 9, BLOCK=16, GROUP_M=group)
    tiles = [16 * m * 1000 + 16 * n for m in range(tiles_m) for n in range(tiles_n)]
    assert sorted(first.tolist()) == tiles
    if group == 1:
        assert first.tolist() == tiles  # row by row


# Choice and refusal


def on_card(monkeypatch, arch):
    """Let the rungs believe that they run on `arch`."""
    monkeypatch.setattr(rungs, "INTERPRETED", False)
    monkeypatch.setattr(rungs, "GLUON_MISSING", "")
    monkeypatch.setattr(rungs, "architecture", lambda device: arch)


HALF, SINGLE = torch.zeros(64, 64, dtype=torch.float16), torch.zeros(64, 64)


@pytest.mark.parametrize(
    ("arch", "module", "tensors", "name"),
    [
        ("sm_75", matmuls, (HALF,) * 3, "grouped"),
        ("sm_80", matmuls, (HALF,) * 3, "pipelined"),
        ("sm_90", matmuls, (HALF,) * 3, "persistent"),
        ("sm_120", matmuls, (HALF,) * 3, "persistent"),
        ("gfx942", matmuls, (HALF,) * 3, "pipelined"),
        ("sm_90", matmuls, (SINGLE,) * 3, "grouped"),
        ("sm_90", matmuls, (HALF[1:, 1:],) * 3, "pipelined"),
        ("sm_90", matmuls, (HALF[:1].expand(64, 64), HALF, HALF), "pipelined"),
        ("sm_90", matmuls, (HALF[:, :0], HALF[:0], HALF), "pipelined"),
        ("gfx942", transposes, (SINGLE, SINGLE), "automatic"),
        ("sm_75", transposes, (SINGLE, SINGLE), transposes.RUNGS[-1].name),
        ("gfx1100", softmaxes, (SINGLE, SINGLE), "fused"),
        ("sm_90", softmaxes, (torch.empty(1, 40000), torch.empty(1, 40000)), "online"),
        ("sm_75", copies, (SINGLE, SINGLE), "vectorised"),
    ],
)
def test_the_best_rung_that_can_run(arch, module, tensors, name, monkeypatch):
    on_card(monkeypatch, arch)
    assert rungs.best(module.RUNGS, *tensors).name == name


@pytest.mark.parametrize(
    ("arch", "name", "message"),
    [
        ("sm_75", "tensor_cores", "matmul: rung 'tensor_cores' needs sm_80 and this is sm_75: use rung 'grouped'"),
        ("sm_89", "persistent", "matmul: rung 'persistent' needs sm_90 and this is sm_89: use rung 'pipelined'"),
        ("gfx942", "persistent", "matmul: rung 'persistent' needs an NVIDIA GPU and this is gfx942: use rung"),
        ("no GPU", "persistent", "matmul: rung 'persistent' needs an NVIDIA GPU and this is no GPU: use rung"),
    ],
)
def test_a_rung_that_cannot_run_says_so(arch, name, message, monkeypatch):
    on_card(monkeypatch, arch)
    with pytest.raises(NotImplementedError, match=message):
        named(matmuls, name).launch(HALF, HALF, HALF.clone())


@pytest.mark.skipif(not rungs.INTERPRETED, reason="on a GPU they run")
@pytest.mark.parametrize("name", [rung.name for rung in transposes.RUNGS if rung.gluon])
def test_gluon_cannot_be_interpreted(name):
    with pytest.raises(NotImplementedError, match=f"transpose: rung '{name}' is written in Gluon, and .* interpreter"):
        transpose(SINGLE, name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: copy(x, "fast"), "copy: there is no rung 'fast'; take one of strided, coalesced, vectorised"),
        (lambda x: copy(x.T), r"copy: x has strides \(1, 40\) for shape \(40, 30\); pass x.contiguous"),
        (lambda x: copy(x.int()), "copy: x has dtype torch.int32"),
        (lambda x: copy(x.to("meta")), "copy: x is on device meta"),
        (lambda x: transpose(x[0]), r"transpose: x has shape \(40,\); give two dimensions"),
        (lambda x: transpose([1]), "transpose: x is a list"),
        (lambda x: softmax(x[:, :0]), r"softmax: x has shape \(30, 0\); give rows of at least one"),
        (lambda x: softmax(x[0, 0]), r"softmax: x has shape \(\); give rows"),
        (
            lambda x: softmax(x.new_zeros(1, 32769), "fused"),
            "softmax: rung 'fused' holds a row in .* rows of 32769",
        ),
        (lambda x: softmax(x.new_zeros(1, 32769), "persistent"), "softmax: rung 'persistent' holds a row in registers"),
        (lambda x: matmul(x, x), r"matmul: a has shape \(30, 40\) and b \(30, 40\); give \[M, K\] and \[K, N\]"),
        (lambda x: matmul(x, x.T.half()), "matmul: b has dtype torch.float16 but a has torch.float32"),
        (lambda x: matmul(x, x.T.to("meta")), "matmul: b is on meta but a is on"),
        (lambda x: matmul(x, x.T, "tensor_cores"), "matmul: rung 'tensor_cores' takes float16 and bfloat16, and a has"),
        (lambda x: matmul(x.half(), x.half().T, "persistent"), "of c, and it has strides .*: use 'pipelined'"),
        (lambda x: matmul(x.half()[:, :0], x.half().T[:0], "persistent"), "takes no K of 0: use 'pipelined'"),
    ],
)
def test_clear_errors(call, message, device):
    for name in ("tensor_cores", "persistent"):
        runs_here(matmuls, name, device)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        call(torch.zeros(30, 40, device=device))
    assert "\n" not in str(caught.value)


def test_rungs_are_named_once_and_say_what_they_add():
    for module in LADDERS:
        assert len({rung.name for rung in module.RUNGS}) == len(module.RUNGS) >= 3
        for rung in module.RUNGS:
            assert rung.name in module.__doc__ and rung.idea and "\n" not in rung.idea
            assert bool(rung.instead) == bool(rung.needs or rung.nvidia or rung.gluon)


def test_costs():
    assert copies.cost(1000).bytes_moved == transposes.cost(10, 100).bytes_moved == 8000
    assert softmaxes.cost(10, 100, torch.float16).bytes_moved == 4000 and softmaxes.cost(10, 100).flops == 5000
    cost = matmuls.cost(2, 3, 5, torch.bfloat16)
    assert cost.bytes_moved == 2 * (10 + 15 + 6) and cost.flops == 60


def test_bfloat16_on_the_cpu_takes_the_references():
    x = random(20, 30, dtype=torch.bfloat16)
    assert torch.equal(copy(x), x) and torch.equal(transpose(x), x.T)
    assert torch.equal(softmax(x), x.softmax(-1)) and torch.equal(matmul(x, x.T), x @ x.T)


CALLS = """
import torch
from fastkit.kernels.ladders import copy, matmul, rung, softmax, transpose
x = torch.ones(4, 6)
print(copy.copy(x).shape, transpose.transpose(x, "padded").shape, softmax.softmax(x).shape, matmul.matmul(x, x.T).shape)
"""


@pytest.mark.parametrize("without", ["Triton", "Gluon", "the interpreter"])
def test_they_import_and_run_on_the_cpu_without(without):
    hidden = {"Triton": "triton", "Gluon": "triton.experimental.gluon"}.get(without)
    hide = f"import sys; sys.modules[{hidden!r}] = None\n" if hidden else ""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    child = subprocess.run([sys.executable, "-c", hide + CALLS], cwd=ROOT, env=env, capture_output=True, text=True)
    assert child.stdout.count("torch.Size") == 4, child.stderr
