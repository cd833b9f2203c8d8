"""A product that adds the residual at its end: its numbers, whom it takes, its machine code, where layers have it."""

import functools

import pytest
import torch
from compiled import compile_all
from fused_case import assert_same_layer, model_in_16_bits, model_of, run_layer
from hypothesis import given
from hypothesis import strategies as st
from on_meta import on_meta
from tolerance import assert_as_close_as_torch

from fastkit.kernels import residual_product as module
from fastkit.kernels.common import architecture
from fastkit.lab.accounts import account_of
from fastkit.lab.portability import misfit
from fastkit.models.patch import patch
from fastkit.models.projection import Adapter, Group, Projection

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")

SHAPES = [(1, 8, 8), (5, 64, 72), (130, 136, 64), (77, 328, 200), (300, 72, 1000), (257, 520, 128)]
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.setattr(module, "FASTER", True)


def needs_the_kernel(device):
    if architecture(torch.device(device)) not in module.ARCHITECTURES:
        pytest.skip("needs sm_90")


def inputs(M, N, K, dtype=torch.float16, device="cpu"):
    x, w, residual = (torch.randn(shape, device=device) for shape in ((M, K), (N, K), (M, N)))
    return x.to(dtype), (w / K**0.5).to(dtype), residual.to(dtype)


def product(x, w, residual, **tiling):
    y = torch.empty_like(residual)
    module.launch(x, w, residual, y, **tiling)
    return y


def check(y, x, w, residual):
    theirs = torch.addmm(residual, x, w.T)
    assert_as_close_as_torch(y, theirs, module.reference(x.double(), w.double(), residual.double()))


# Its numbers


@pytest.mark.parametrize("tiling", module.TILINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
def test_close_to_the_truth(shape, dtype, tiling, device, monkeypatch):
    needs_the_kernel(device)
    tensors = inputs(*shape, dtype, device)
    for sms in (1, 3, 132):  # many turns, some, one
        monkeypatch.setattr(module, "sm_count", lambda device, sms=sms: sms)
        check(product(*tensors, **module.TILINGS[tiling]), *tensors)


@given(M=st.integers(1, 300), N=st.integers(1, 60), K=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_close_to_the_truth_at_any_shape(M, N, K, seed, device):
    needs_the_kernel(device)
    torch.manual_seed(seed)
    tensors = inputs(M, 8 * N, 8 * K, device=device)
    check(product(*tensors), *tensors)


def test_rows_any_stride_apart(device):
    needs_the_kernel(device)
    memory = torch.full((70, 208), 7.0, dtype=torch.float16, device=device)
    tensors = inputs(70, 136, 128, device=device)
    wide = [torch.cat([t, torch.full_like(t[:, :8], torch.nan)], 1)[:, : t.shape[1]] for t in tensors]
    assert all(t.stride(0) > t.shape[1] for t in wide)
    module.launch(*wide, memory[:, 8:144])
    check(memory[:, 8:144].contiguous(), *tensors)
    assert (memory[:, :8] == 7).all() and (memory[:, 144:] == 7).all()


@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 0, 8)], ids=str)
def test_nothing(shape, device):
    needs_the_kernel(device)
    assert product(*inputs(*shape, device=device)).shape == shape[:2]


def test_rounded_once(device):
    """The product is 2049, which fp16 has not: rounded before the residual came, it would be 2048, and y 2050."""
    needs_the_kernel(device)
    x, w, residual = (torch.zeros(8, 8, dtype=torch.float16, device=device) for _ in range(3))
    x[0, :2] = torch.tensor([2048.0, 1.0])
    w[0, :2], residual[0, 0] = 1.0, 3.0
    assert product(x, w, residual)[0, 0] == 2052


@pytest.mark.gpu
@pytest.mark.parametrize("K", [1024, 64])
@pytest.mark.parametrize("tiling", module.TILINGS)
def test_same_bits_every_time(tiling, K, device):
    """At a size at which every SM has several tiles, which load while others are written."""
    needs_the_kernel(device)
    tensors = inputs(4096, 4096, K, torch.bfloat16, device)
    first = product(*tensors, **module.TILINGS[tiling])
    check(first, *tensors)
    for _ in range(20):
        assert torch.equal(first, product(*tensors, **module.TILINGS[tiling]))


def test_cost():
    found = module.cost(8, 32, 16, torch.float16)
    assert found.bytes_moved == 2 * (8 * 16 + 32 * 16 + 2 * 8 * 32) and found.flops == 8 * 32 * (2 * 16 + 1)


# Whom it takes, and its machine code


@pytest.fixture
def on_gpu(monkeypatch):
    """As if there were a GPU of the architecture that it is called with."""

    def pretend(arch):
        monkeypatch.setattr(module, "on_triton", lambda op, name, x: True)
        monkeypatch.setattr(module, "architecture", lambda device: arch)

    return pretend


empty = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")


def test_whom_it_takes(on_gpu, faster):
    on_gpu("sm_90")
    x, w, residual = empty(4, 64), empty(16, 64), empty(4, 16)
    assert module.takes(x, w, residual) and module.takes(x.half(), w.half(), residual.half())
    assert module.takes(empty(4, 72)[:, :64], empty(16, 128)[:, :64], empty(4, 24)[:, 8:])
    shifted = torch.empty(65, dtype=torch.bfloat16)[1:].view(4, 16)
    assert shifted.data_ptr() % 16 == 2
    for tensors in (
        (x, w, residual.float()), (x.half(), w, residual), (x, w.half(), residual), (x.float(), w.float(), residual),
        (x.float(), w.float(), residual.float()), (empty(0, 64), w, empty(0, 16)), (x, empty(0, 64), empty(4, 0)),
        (empty(4, 0), empty(16, 0), residual), (x, empty(12, 64), empty(4, 16)[:, :12]), (x, w, shifted),
        (empty(4, 60), empty(16, 60), residual), (empty(64, 4).T, w, residual), (x, empty(64, 16).T, residual),
        (x, w, empty(16).expand(4, 16)), (x, w, empty(16, 4).T),
    ):  # fmt: skip
        assert not module.takes(*tensors), [(t.dtype, t.shape, t.stride()) for t in tensors]
    for arch in ("sm_75", "sm_80", "sm_89", "sm_100", "sm_120", "gfx942", "no GPU"):
        on_gpu(arch)
        assert not module.takes(x, w, residual)


def test_takes_nobody_until_it_is_faster(on_gpu):
    on_gpu("sm_90")
    assert module.takes(empty(4, 64), empty(16, 64), empty(4, 16)) == module.FASTER


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_compiled_code(dtype, on_gpu):
    """Nothing spilled; all tensors go by TMA; no sum changes lanes; the residual comes before the product."""
    on_gpu("sm_90")
    for example in module.examples(dtype).values():
        (made,) = compile_all(example, "sm_90")
        found = made.instructions
        assert not misfit(made) and made.spilled_bytes == 0 and "convert_layout" not in made.ttgir
        assert found["WGMMA"] and found["TMA load"] and found["TMA store"] and found["ldmatrix"] and found["stmatrix"]
        assert found["shfl"] <= 4  # a warp's own number
        assert not any(kind.startswith(("ld.", "st.", "cp.async")) for kind in found)
        loop = made.ttgir[made.ttgir.index("scf.for") :]
        assert loop.count("local_load") == 4 and loop.rindex("local_load") < loop.index("warp_group_dot ")


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_89", "sm_100", "sm_120", "gfx942"])
def test_examples_say_what_runs_instead(arch, on_gpu):
    on_gpu(arch)
    for example in module.examples(torch.float16).values():
        with pytest.raises(NotImplementedError, match=f"this is {arch}: use torch.addmm"):
            example()


# In a layer


def launched(function) -> list[str]:
    """The names of the kernels that `function` launches."""
    return [launch.name for launch in account_of(function).launches]


KERNEL = "_residual_product_kernel"


@pytest.mark.parametrize(
    ("options", "taken"),
    [({}, True), ({"bias": True}, False), ({"dropout": 0.1}, False), ({"residual": torch.float32}, False)],
    ids=str,
)
def test_which_products_have_it(options, taken, on_gpu, faster, monkeypatch):
    on_gpu("sm_90")
    monkeypatch.setattr(Group, "_dropped", lambda self, x, j: (x, None))  # meta tensors have no generator
    adapter = Adapter(empty(4, 32), empty(64, 4), 2.0, options.get("dropout", 0.0))
    projection = Projection(empty(64, 32), empty(64) if "bias" in options else None, (adapter,), None)
    group, found = Group([projection], torch.bfloat16), []
    residual = empty(16, 64, dtype=options.get("residual", torch.bfloat16))
    names = launched(lambda: found.append(group.forward(empty(16, 32), residual)))
    assert names.count(KERNEL) == taken and found[0].shape == (16, 64) and found[0].dtype == residual.dtype
    assert KERNEL not in launched(lambda: group.forward(empty(16, 32)))


@pytest.mark.parametrize("compute", ["auto", "fp8"])
def test_once_a_half(compute, folder, faster):
    model, losses = model_of(folder, dtype="bf16"), []  # the residual stream too
    patch(model, "keep", compute=compute)
    ids = torch.zeros(2, 32, dtype=torch.long, device="meta")
    with on_meta(model):
        forward = launched(lambda: losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss))
        backward = launched(lambda: losses[0].backward())
    expected = 0 if compute == "fp8" else 2 * model.config.num_hidden_layers
    assert forward.count(KERNEL) == expected and KERNEL not in backward


@pytest.mark.parametrize("plan", ["keep", "leanest"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
def test_a_layer_is_the_same_with_and_without(plan, dtype, folder, device, faster, monkeypatch):
    needs_the_kernel(device)
    model = model_in_16_bits(folder, device, dtype)
    x, dy = (torch.randn(2, 20, model.config.hidden_size, device=device).to(dtype) for _ in range(2))
    patch(model, plan)
    found, launches, launch = {}, [], module.launch
    monkeypatch.setattr(module, "launch", lambda *tensors: (launches.append(tensors), launch(*tensors)))
    for ours in (True, False):
        monkeypatch.setattr(module, "FASTER", ours)
        found[ours] = run_layer(model, x, dy)
        assert len(launches) >= 2
    assert_same_layer(found[True], found[False], dtype)
