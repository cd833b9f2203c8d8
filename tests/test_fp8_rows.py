"""Rows in FP8: quantized by themselves, by the norm, by SwiGLU and its backward."""

import pytest
import torch
from cards import needs_fp8
from compiled import compile_all, faults
from hypothesis import given
from hypothesis import strategies as st

from fastkit.kernels import fp8_rows, fp8_scale, rms_norm, rms_norm_fp8, rope_fp8, swiglu, swiglu_fp8
from fastkit.lab.portability import misfit
from fastkit.models import pieces
from fastkit.ops import quantize_rows_fp8

FP8 = torch.float8_e4m3fn
BLOCKS = [{}, {"BLOCK_N": 32, "num_warps": 1}]  # a row in one block, and in several
pytestmark = [
    needs_fp8,
    pytest.mark.usefixtures("poisoned", "fresh_seed"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # the interpreter's numpy
]


def rows(M, N, dtype, device):
    """Rows of sizes from 1e-3 to 1e3."""
    return (torch.randn(M, N, device=device) * 10 ** torch.empty(M, 1, device=device).uniform_(-3, 3)).to(dtype)


def empty(M, N, device):
    return torch.empty(M, N, dtype=FP8, device=device), torch.empty(M, device=device)


def check(x8, scale, truth):
    """x8 * scale is `truth`, rounded once to e4m3, the largest of each row to 448."""
    assert x8.dtype == FP8 and scale.dtype == torch.float32 and x8.shape == truth.shape
    largest = truth.abs().amax(1)
    torch.testing.assert_close(scale.double() * 448, largest.clamp(min=1e-30), rtol=1e-5, atol=0)
    # half a unit in the last of 4 places, and of the subnormal numbers below 2**-6
    allowed = truth.abs() * 2**-4 + scale.double()[:, None] * 2**-10
    assert ((x8.double() * scale.double()[:, None] - truth).abs() <= allowed * (1 + 1e-4)).all()


def check_kernel(ours, theirs):
    """As the reference. Interpreted, a number that is rounded up to a power of two ends at half of it."""
    (x8, scale), (their_x8, their_scale) = ours, theirs
    torch.testing.assert_close(scale, their_scale, rtol=1e-5, atol=0)
    rtol = 0.51 if x8.device.type == "cpu" else 0.13  # a unit in the last place, where scales differ by a bit of fp32
    torch.testing.assert_close(x8.float(), their_x8.float(), rtol=rtol, atol=2**-8)


# --- a pass of its own


@given(st.integers(1, 20), st.integers(1, 300), st.integers(0, 2**31))
def test_a_rounding_away_at_any_shape(dtype, device, M, N, seed):
    torch.manual_seed(seed)
    x = rows(M, N, dtype, device)
    check(*quantize_rows_fp8(x), x.double())
    wide = torch.cat([x, x, x], 1)
    for ours, theirs in zip(quantize_rows_fp8(wide[:, N : 2 * N]), quantize_rows_fp8(x), strict=True):
        assert torch.equal(ours.float(), theirs.float())


@pytest.mark.parametrize("tiling", BLOCKS)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (5, 7), (3, 33), (4, 100), (2, 1024)])
def test_kernel(M, N, tiling, dtype, device):
    x, (x8, scale) = rows(M, N, dtype, device), empty(M, N, device)
    tiling = tiling | {"BLOCKS_N": -(-N // 32), "BLOCK_M": 2} if tiling else {}
    fp8_rows.launch(x, x8, scale, **tiling)
    check_kernel((x8, scale), fp8_rows.reference(x))


def test_rows_of_zeros_and_of_what_is_no_number(device):
    x = torch.zeros(3, 64, dtype=torch.float16, device=device)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    x8, scale = quantize_rows_fp8(x)
    assert (x8[0].float() == 0).all() and scale[0] > 0
    assert x8[1, 5].float().isnan() and x8[2, 7].float().isnan()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing(shape, device):
    x8, scale = quantize_rows_fp8(torch.empty(shape, device=device))
    assert x8.shape == shape and x8.dtype == FP8 and scale.shape == shape[:1]


# --- by the norm


@pytest.mark.parametrize("tiling", BLOCKS)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (5, 7), (3, 33), (4, 100), (2, 1024)])
def test_norm(M, N, tiling, dtype, device):
    x, weight = rows(M, N, dtype, device), torch.randn(N, device=device).to(dtype)
    (y8, scale), rstd = empty(M, N, device), torch.empty(M, device=device)
    tiling = tiling | {"BLOCKS_N": -(-N // 32), "BLOCK_M": 2} if tiling else {}
    rms_norm_fp8.launch(x, weight, 1e-5, y8, scale, rstd, **tiling)
    check_kernel((y8, scale), rms_norm_fp8.reference(x, weight, 1e-5))
    torch.testing.assert_close(rstd, torch.rsqrt(x.float().square().mean(1) + 1e-5))
    truth = rms_norm.reference(x.double(), weight.double(), 1e-5)
    check(*rms_norm_fp8.reference(x, weight, 1e-5), truth)


@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("M", "N"), [(1, 1), (5, 7), (3, 33), (70, 100), (2, 5000)])
def test_norm_backward(M, N, given, weight_grad, dtype, device):
    """dx8 and scale are, bit by bit, what a pass of its own makes of dx; dx is what it is without them."""
    dy, residual, x = *(rows(M, N, dtype, device) for _ in range(2)), torch.randn(M, N, device=device).to(dtype)
    weight, rstd, factor = (
        torch.randn(N, device=device).to(dtype),
        torch.rand(M, device=device),
        factors(M, given, device),
    )
    plain, dx, (dx8, scale) = torch.empty_like(x), dy.clone(), empty(M, N, device)
    rms_norm.launch_backward(dy, x, weight, rstd, plain, weight_grad, residual, factor)
    rms_norm.launch_backward(dx, x, weight, rstd, dx, weight_grad, residual, factor, dx8=dx8, scale=scale)
    their_x8, their_scale = empty(M, N, device)
    fp8_rows.launch(dx, their_x8, their_scale)
    assert torch.equal(dx, plain)
    assert torch.equal(scale, their_scale) and torch.equal(dx8.view(torch.uint8), their_x8.view(torch.uint8))


@pytest.mark.parametrize("over", ["nothing", "x", "z"])
@pytest.mark.parametrize(("M", "N"), [(1, 1), (5, 7), (3, 33), (70, 101), (64, 896), (2, 5008)])
def test_norm_of_a_sum(M, N, over, dtype, device):
    """h, y8, scale and rstd are, bit by bit, those of two passes; of a row of zeros and of wide tensors too.

    Where all rows start at multiples of 16 numbers, or none do: else lanes would add up other numbers.
    """
    x, z = rows(M, 2 * N, dtype, device)[:, N:], rows(M, 3 * N, dtype, device)[:, N : 2 * N]
    x[1:2], z[1:2] = 0, 0
    weight, factor = torch.randn(N, device=device).to(dtype), factors(M, True, device)
    their_h, theirs = torch.empty_like(x), (*empty(M, N, device), torch.empty(M, device=device))
    fp8_rows.launch_scaled(z, factor, x, their_h)
    rms_norm_fp8.launch(their_h, weight, 1e-5, *theirs)
    h = {"nothing": torch.empty_like(x), "x": x, "z": z}[over]
    ours = (*empty(M, N, device), torch.empty(M, device=device))
    rms_norm_fp8.launch(x, weight, 1e-5, *ours, z, factor, h)
    assert torch.equal(h, their_h) and h.any()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("stream", [torch.float32, torch.float16])
@pytest.mark.parametrize("N", [48, 8200])  # 8200: longer than a block
def test_norm_of_a_sum_as_of_its_steps(N, stream, device):
    weight = pieces.Norm(torch.randn(N, device=device), 1e-5)
    residual = torch.randn(5, N, device=device).to(stream)
    y = pieces.Unscaled(torch.randn(5, N, device=device).to(torch.float16), factors(5, True, device))
    their_h = y.scaled(residual)
    theirs, their_rstd = pieces.norm(their_h, weight, FP8)
    h, n, rstd = pieces.norm_of_sum(y, residual, weight)
    assert h.dtype == stream and torch.equal(h, their_h) and torch.equal(rstd, their_rstd)
    assert torch.equal(n.numbers.view(torch.uint8), theirs.numbers.view(torch.uint8))
    assert torch.equal(n.scale, theirs.scale)


def test_norm_of_a_sum_longer_than_a_block(device):
    x, (y8, scale) = torch.ones(1, 8200, device=device), empty(1, 8200, device)
    with pytest.raises(ValueError, match="sums rows of 8192 numbers at most, and these have 8200"):
        rms_norm_fp8.launch(x, x[0], 1e-5, y8, scale, scale.clone(), x, scale, x)


# --- by SwiGLU


def gate_up(M, N, dtype, device):
    return (3 * torch.randn(M, 2 * N, device=device)).to(dtype).chunk(2, 1)


def tiled(N, tiling):
    return tiling | {"BLOCKS_N": -(-N // 32)} if tiling else {}


def factors(M, given, device):
    return (torch.rand(M, device=device) + 0.5) if given else None


def times(x, factor):
    return x if factor is None else x.float() * factor[:, None]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("tiling", BLOCKS)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (5, 7), (3, 33), (4, 100), (2, 5000)])
def test_swiglu(M, N, tiling, given, dtype, device):
    (gate, up), (y8, scale), factor = gate_up(M, N, dtype, device), empty(M, N, device), factors(M, given, device)
    swiglu_fp8.launch_forward(gate, up, y8, scale, factor, **tiled(N, tiling))
    gate, up = times(gate, factor), times(up, factor)
    check_kernel((y8, scale), swiglu_fp8.reference(gate, up))
    check(*swiglu_fp8.reference(gate, up), swiglu.reference(gate.double(), up.double()))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("tiling", BLOCKS)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (5, 7), (3, 33), (4, 100), (2, 5000)])
@pytest.mark.parametrize("half", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_swiglu_backward_writes_over_its_inputs(M, N, tiling, given, half, device):
    gate, up = gate_up(M, N, half, device)
    dy, dgate_up, y = rows(M, N, half, device), torch.empty(M, 2 * N, dtype=half, device=device), torch.empty_like(gate)
    dy_factor, factor = (factors(M, given, device) for _ in range(2))
    true = [
        times(x, f).clone(memory_format=torch.contiguous_format)
        for x, f in ((dy, dy_factor), (gate, factor), (up, factor))
    ]
    swiglu.launch_backward(*true, *dgate_up.chunk(2, 1))
    theirs, scale = fp8_rows.reference(dgate_up), torch.empty(M, device=device)
    d8 = swiglu_fp8.launch_backward(dy, gate, up, scale, y, dy_factor, factor, **tiled(N, tiling))
    assert d8.data_ptr() == dy.data_ptr() and d8.shape == (M, 2 * N)
    close = dict(rtol=2 * torch.finfo(half).eps, atol=1e-6)
    torch.testing.assert_close(torch.cat([gate, up], 1), dgate_up, **close)
    torch.testing.assert_close(y, swiglu.reference(*true[1:]).to(half), **close)
    check_kernel((d8, scale), theirs)


# --- the scale of a product's rows, multiplied afterwards


@pytest.mark.parametrize("tiling", BLOCKS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("M", "N"), [(1, 1), (5, 7), (3, 33), (4, 100), (2, 1024)])
def test_rows_are_scaled(M, N, residual, tiling, dtype, device):
    x, scale = rows(M, 2 * N, dtype, device)[:, :N], torch.rand(M, device=device) + 0.5
    residual = rows(M, N, torch.float32, device) if residual else None
    terms = x.double() * scale[:, None], torch.zeros(()) if residual is None else residual.double()
    y = torch.empty(M, N, device=device) if residual is not None else x
    tiling = tiling | {"BLOCKS_N": -(-N // 32), "BLOCK_M": 2} if tiling else {}
    fp8_rows.launch_scaled(x, scale, residual, y, **tiling)
    limits = torch.finfo(y.dtype)
    within = limits.eps * (sum(term.abs() for term in terms) + limits.smallest_normal)  # below that, coarser
    assert ((y - sum(terms)).abs() <= within).all()


# --- where there is none; what is compiled


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_87", "gfx942"])
def test_older_cards_are_told_what_to_do(arch, monkeypatch):
    monkeypatch.setattr(fp8_scale, "architecture", lambda device: arch)
    examples = [item for module in (fp8_rows, rms_norm_fp8, rope_fp8, swiglu_fp8) for item in module.examples().items()]
    for launch in [launch for name, launch in examples if not name.startswith("scaled")]:
        with pytest.raises(NotImplementedError, match=f"writes FP8 from sm_89 on and this is {arch}: use bfloat16"):
            launch()
    assert not any(map(fp8_scale.lacks_fp8, ("sm_89", "sm_90", "sm_100", "sm_120", "interpreter")))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(3), ValueError, r"x has shape \(3,\); give a matrix"),
        (torch.ones(2, 2, dtype=torch.float64), TypeError, "x has dtype torch.float64"),
        ([[1.0]], TypeError, "x is a list"),
    ],
)
def test_clear_errors(x, error, message):
    with pytest.raises(error, match=message):
        quantize_rows_fp8(x)


@pytest.mark.parametrize("arch", ["sm_89", "sm_90", "sm_120"])
def test_compiled_code(arch):
    """Nothing spills, wide accesses, and a row that fits a block is loaded once for both walks."""
    for module, once in ((fp8_rows, 2), (rms_norm_fp8, 4), (swiglu_fp8, None)):
        (made,) = compile_all(next(iter(module.examples().values())), arch)
        assert not misfit(made) and made.spilled_bytes == 0
        loads = {name: count for name, count in made.instructions.items() if name.startswith("ld.global")}
        factors = {"ld.global.32": 1} if module is swiglu_fp8 else {}
        assert loads == {"ld.global.128": loads["ld.global.128"]} | factors
        if once:  # 16 numbers a thread; the norm's weights too
            assert made.instructions["ld.global.128"] == once
    for name in ("backward 8192x4096", "backward 8192x5120"):
        (made,) = compile_all(rms_norm_fp8.examples()[name], arch)
        assert not faults(made, narrow=3)  # rstd, factor, scale
    for name in ("sum and norm 8192x4096", "sum and norm 8192x5120"):
        (made,) = compile_all(rms_norm_fp8.examples()[name], arch)
        assert not faults(made, narrow=3)  # factor, rstd, scale
        assert made.instructions["ld.global.128"] == 6  # x, z and the weights, each once


def test_costs():
    assert fp8_rows.cost(10, 100).bytes_moved == 10 * 100 * 3 + 40
    assert rms_norm_fp8.cost(10, 100).bytes_moved == 10 * 100 * 3 + 200 + 80
    assert rms_norm_fp8.cost(10, 100, sums=True).bytes_moved == 10 * 100 * 7 + 200 + 120
    forward, backward = swiglu_fp8.cost(10, 100)
    assert forward.bytes_moved == 10 * 100 * 5 + 40 and backward.bytes_moved == 10 * 100 * 14 + 40
