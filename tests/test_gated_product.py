"""SwiGLU at the end of its products: its numbers, whom it takes, its machine code, which passes of a layer have it."""

import functools
import itertools

import pytest
import torch
from compiled import compile_all
from fused_case import assert_same_layer, model_in_16_bits, model_of, run_layer
from hypothesis import given
from hypothesis import strategies as st
from on_meta import on_meta
from tolerance import assert_as_close_as_torch, assert_draws_as_close_as_torch

from fastkit.kernels import gated_product as module
from fastkit.kernels import swiglu
from fastkit.kernels.common import architecture
from fastkit.lab.accounts import account_of
from fastkit.lab.portability import misfit
from fastkit.models.patch import patch
from fastkit.models.plans import PLANS
from fastkit.models.projection import Adapter, Group, Projection
from fastkit.ops import gated_product

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")

SHAPES = [(1, 8, 8), (5, 64, 72), (130, 136, 64), (77, 328, 200), (300, 72, 1000), (257, 520, 128)]
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def needs_the_kernel(device):
    if architecture(torch.device(device)) not in module.ARCHITECTURES:
        pytest.skip("needs TMA")


def inputs(M, I, K, dtype=torch.float16, device="cpu", scale=2.0):
    x, w = (torch.randn(shape, device=device) for shape in ((M, K), (2 * I, K)))
    return x.to(dtype), (scale * w / K**0.5).to(dtype)


def result(a, x, w):
    """Ours, torch's product and SwiGLU, which round where the kernel does, and the truth."""
    theirs = swiglu.reference(*(x @ w.T).chunk(2, -1))
    return a, theirs, module.reference(x.double(), w.double()), "a", None


def check(a, x, w):
    assert_as_close_as_torch(*result(a, x, w))


def check_all(draws):
    """The mean error of all shapes together: of few numbers, one that is rounded to its other neighbour shows in it."""
    assert_draws_as_close_as_torch(draws, kinds=["mean"])


# Its numbers


@pytest.mark.parametrize("tiling", module.TILINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
def test_close_to_the_truth(dtype, tiling, device, monkeypatch):
    needs_the_kernel(device)
    every = []
    for shape, sms in itertools.product(SHAPES, (1, 3, 132)):  # many turns, some, one
        monkeypatch.setattr(module, "sm_count", lambda device, sms=sms: sms)
        x, w = inputs(*shape, dtype, device)
        a = torch.empty(shape[:2], dtype=dtype, device=device)
        module.launch(x, w, a, **module.TILINGS[tiling])
        every.append(result(a, x, w))
        assert_draws_as_close_as_torch(every[-1:], kinds=["largest"])
    check_all(every)


def test_close_to_the_truth_at_any_shape(device):
    every = []

    @given(M=st.integers(1, 300), I=st.integers(1, 30), K=st.integers(1, 30), seed=st.integers(0, 2**31))
    def at(M, I, K, seed):
        torch.manual_seed(seed)
        x, w = inputs(M, 8 * I, 8 * K, device=device)
        every.append(result(gated_product(x, w), x, w))
        assert_draws_as_close_as_torch(every[-1:], kinds=["largest"])

    at()
    check_all(every)


@pytest.mark.parametrize("shape", [(3, 5, 7), (9, 8, 12), (4, 12, 16)], ids=str)
def test_what_the_kernel_does_not_take(shape, dtype, device):
    x, w = inputs(*shape, dtype, device)
    check(gated_product(x, w), x, w)


def test_rows_any_stride_apart(device):
    needs_the_kernel(device)
    memory = torch.full((70, 208), 7.0, dtype=torch.float16, device=device)
    x, w = inputs(70, 136, 128, device=device)
    wide = [torch.cat([t, torch.full_like(t[:, :8], torch.nan)], 1)[:, :128] for t in (x, w)]
    module.launch(*wide, memory[:, 8:144])
    assert torch.equal(memory[:, 8:144], gated_product(x, w))
    assert (memory[:, :8] == 7).all() and (memory[:, 144:] == 7).all()


@pytest.mark.parametrize("layout", [lambda t: t.mT.contiguous().mT, lambda t: torch.cat([t[:, :1], t], 1)[:, 1:]])
def test_layouts(layout, device):
    x, w = inputs(20, 16, 64, device=device)
    expected = gated_product(x, w)
    for one, other in ((layout(x), w), (x, layout(w)), (layout(x), layout(w))):
        torch.testing.assert_close(gated_product(one, other), expected, rtol=2e-3, atol=2e-3)
    assert gated_product(x.view(4, 5, 64), w).shape == (4, 5, 16)


@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 0, 8)], ids=str)
def test_nothing(shape, device):
    assert gated_product(*inputs(*shape, device=device)).shape == shape[:2]


def test_no_sum_is_zero(device):
    x, w = inputs(3, 8, 0, device=device)
    assert torch.equal(gated_product(x, w), torch.zeros(3, 8, dtype=x.dtype, device=device))


def test_gate_and_up_are_rounded_before_they_meet(device):
    """As by the two kernels whose place this takes: gate is 2049, which fp16 has not, and goes to 2048; 2049 * 3, not
    rounded before, would go to 6148."""
    x = torch.zeros(1, 16, dtype=torch.float16, device=device)
    w = torch.zeros(16, 16, dtype=torch.float16, device=device)
    x[0, :3] = torch.tensor([2048.0, 1.0, 1.0])
    w[0, :2], w[8, 2] = 1.0, 3.0
    assert gated_product(x, w)[0, 0] == 6144


def test_no_gradient(device):
    x, w = (t.requires_grad_() for t in inputs(4, 8, 16, device=device))
    assert not gated_product(x, w).requires_grad


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, w: (x.int(), w), "x has dtype torch.int32"),
        (lambda x, w: (x, w.float()), "w has dtype torch.float32 but x has torch.float16"),
        (lambda x, w: (x, w[:, :8]), r"x has shape \(4, 16\) and w \(16, 8\); give"),
        (lambda x, w: (x, w[:15]), r"w \(15, 16\); give \[..., K\] and \[2 I, K\]"),
        (lambda x, w: (x, w.to("meta")), "w is on meta but x is on"),
        (lambda x, w: (x.to("meta"), w.to("meta")), "x is on device meta; move it"),
    ],
)
def test_clear_errors(wrong, message, device):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        gated_product(*wrong(*inputs(4, 8, 16, device=device)))
    assert str(caught.value).startswith("gated_product: ") and "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", module.TILINGS)
def test_same_bits_every_time(tiling, device):
    """At a size at which every SM has several tiles, which load while others are written."""
    needs_the_kernel(device)
    x, w = inputs(2048, 14336, 1024, torch.bfloat16, device)
    first, again = (torch.empty(2048, 14336, dtype=torch.bfloat16, device=device) for _ in range(2))
    module.launch(x, w, first, **module.TILINGS[tiling])
    check(first, x, w)
    for _ in range(20):
        module.launch(x, w, again.fill_(torch.nan), **module.TILINGS[tiling])
        assert torch.equal(first, again)


def test_cost():
    found = module.cost(8, 32, 16, torch.float16)
    assert found.bytes_moved == 2 * (8 * 16 + 64 * 16 + 8 * 32) and found.flops == 8 * 32 * (4 * 16 + 6)


# Whom it takes, and its machine code


@pytest.fixture
def on_gpu(monkeypatch):
    """As if there were a GPU of the architecture that it is called with."""

    def pretend(arch):
        monkeypatch.setattr(module, "on_triton", lambda op, name, x: True)
        monkeypatch.setattr(module, "architecture", lambda device: arch)

    return pretend


def test_whom_it_takes(on_gpu):
    on_gpu("sm_90")
    empty = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    assert module.takes(empty(1, 8), 8) and module.takes(empty(77, 4096).half(), 14336)
    for x, I in (
        (empty(4, 64), 12), (empty(4, 60), 16), (empty(4, 64).float(), 16), (empty(0, 64), 16), (empty(4, 0), 16),
        (empty(4, 64), 0), (empty(64, 4).T, 16), (empty(4, 68)[:, :64], 16), (empty(1, 64).expand(4, 64), 16),
    ):  # fmt: skip
        assert not module.takes(x, I), (x.shape, x.stride(), I)
    shifted = torch.empty(257, dtype=torch.bfloat16)[1:].view(4, 64)
    assert shifted.data_ptr() % 16 == 2 and not module.takes(shifted, 16)
    for arch in ("sm_75", "sm_80", "sm_89", "sm_100", "sm_120", "gfx942", "no GPU"):
        on_gpu(arch)
        assert not module.takes(empty(4, 64), 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_compiled_code(arch, dtype, on_gpu):
    """Nothing spilled; x, w and a go by TMA; both halves of w are multiplied where they lie; no sum changes lanes."""
    on_gpu(arch)
    for example in module.examples(dtype).values():
        (made,) = compile_all(example, arch)
        found, unit = made.instructions, {"sm_90": "WGMMA", "sm_100": "TCGEN05"}[arch]
        assert not misfit(made) and made.spilled_bytes == 0 and "convert_layout" not in made.ttgir
        assert found[unit] and found["TMA load"] and found["TMA store"]
        assert found["shfl"] <= 2  # a warp's own number
        assert not any(kind.startswith(("ld.global", "st.global", "cp.async")) for kind in found)
        if arch == "sm_90":
            assert found["stmatrix"] and not any(kind.startswith(("ld.shared", "st.shared")) for kind in found)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_89", "sm_120", "gfx942"])
def test_examples_say_what_runs_instead(arch, on_gpu):
    on_gpu(arch)
    for example in module.examples(torch.float16).values():
        with pytest.raises(NotImplementedError, match=f"this is {arch}: use a product and swiglu"):
            example()


# In a layer


def projections(I=64, K=32, bias=False, dropout=0.0, device="meta"):
    empty = functools.partial(torch.empty, dtype=torch.bfloat16, device=device)
    adapter = Adapter(empty(4, K), empty(I, 4), 2.0, dropout)
    one = Projection(empty(I, K), empty(I) if bias else None, (adapter,), None)
    return [one, one]


def launched(function) -> list[str]:
    """The names of the kernels that `function` launches."""
    return [launch.name for launch in account_of(function).launches]


@pytest.mark.parametrize(
    ("options", "taken"), [({}, True), ({"bias": True}, False), ({"dropout": 0.1}, False), ({"I": 60}, False)], ids=str
)
def test_which_groups_are_gated(options, taken, on_gpu):
    on_gpu("sm_90")
    group = Group(projections(**options), torch.bfloat16)
    x, found = torch.empty(16, 32, dtype=torch.bfloat16, device="meta"), []
    names = launched(lambda: found.append(group.gated(x)))
    assert names.count(GATED) == taken and (found[0] is not None) == taken
    assert not taken or found[0].shape == (16, 64)


GATED = "_gated_product_kernel"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("compute", ["auto", "fp8"])
def test_which_plans_have_it(plan, compute, folder):
    """All that compute gate and up again, for each of their chunks; and none in the backward, which wants both."""
    model, losses = model_of(folder), []
    patch(model, plan, compute=compute)
    ids = torch.zeros(2, 32, dtype=torch.long, device="meta")
    with on_meta(model):
        forward = launched(lambda: losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss))
        backward = launched(lambda: losses[0].backward())
    layers = model.config.num_hidden_layers
    expected = 0 if PLANS[plan].gate_up or compute == "fp8" else layers * PLANS[plan].chunks
    assert forward.count(GATED) == expected and GATED not in backward


def test_a_pass_that_keeps_nothing_has_it(folder):
    """Nothing here wants a gradient, whatever the plan."""
    model = model_of(folder).requires_grad_(False)
    patch(model, "keep")
    ids = torch.zeros(2, 32, dtype=torch.long, device="meta")
    with on_meta(model):
        names = launched(lambda: model(input_ids=ids, use_cache=False))
    assert names.count(GATED) == model.config.num_hidden_layers


@pytest.mark.parametrize("plan", ["recompute-mlp", "leanest"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
def test_a_layer_is_the_same_with_and_without(plan, dtype, folder, device, monkeypatch):
    needs_the_kernel(device)
    model = model_in_16_bits(folder, device, dtype)
    x, dy = (torch.randn(2, 20, model.config.hidden_size, device=device).to(dtype) for _ in range(2))
    patch(model, plan)
    found, launches, launch = {}, [], module.launch
    monkeypatch.setattr(module, "launch", lambda *tensors: (launches.append(tensors), launch(*tensors)))
    for gated in (True, False):
        if not gated:
            assert len(launches) == min(PLANS[plan].chunks, -(-40 // 16))  # of 16 rows at least
            monkeypatch.setattr(module, "takes", lambda *args: False)
        found[gated] = run_layer(model, x, dy)
    assert_same_layer(found[True], found[False], dtype)
