"""The ladder of data layout: both rungs update the weights and nothing else, and move what they are named for."""

import pytest
import torch
from compiled import compile_all
from hypothesis import given
from hypothesis import strategies as st

from fastkit.kernels.ladders import weight_update as ladder
from fastkit.kernels.ladders.weight_update import FIELDS, GRADIENT, WEIGHT, laid_out, weight_update
from fastkit.lab.compiling import ARCHITECTURES
from fastkit.lab.portability import misfit
from fastkit.lab.tracer import trace_launches

pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")
NAMES = [rung.name for rung in ladder.RUNGS]


def state(n, rung, device="cpu"):
    return laid_out(torch.randn(n, len(FIELDS), device=device), rung)


@pytest.mark.parametrize("name", NAMES)
@given(n=st.integers(1, 5000), lr=st.floats(-10, 10, width=32))
def test_it_updates_weights_and_nothing_else(name, device, n, lr):
    before = state(n, name, device)
    after = weight_update(before.clone(), lr, name)
    truth = before[:, WEIGHT].double() - lr * before[:, GRADIENT].double()
    scale = before[:, WEIGHT].double().abs() + abs(lr) * before[:, GRADIENT].double().abs()
    error = (after[:, WEIGHT].double() - truth).abs()
    assert (error <= 2 * torch.finfo(torch.float32).eps * scale + 1e-37).all()
    others = [field for field in range(len(FIELDS)) if field != WEIGHT]
    assert torch.equal(after[:, others], before[:, others])


@pytest.mark.parametrize("n", [1, 31, 1024, 1025, 4096])
def test_the_rungs_agree_to_the_last_bit(n, device):
    fields = torch.randn(n, len(FIELDS), device=device)
    structs, arrays = (weight_update(laid_out(fields, name), 0.3, name) for name in NAMES)
    assert torch.equal(structs, arrays)
    assert torch.equal(structs, weight_update(laid_out(fields, "aos"), 0.3))  # chosen by the layout
    assert torch.equal(structs, weight_update(laid_out(fields, "soa"), 0.3))


def test_it_writes_its_own_numbers_only(device):
    memory = torch.full((3 + 8 * 100 + 9,), 7.0, device=device)
    for view in (memory[3:803].view(100, 8), memory[3:803].view(8, 100).T):
        memory[3:803] = 1.0
        weight_update(view, 0.5)
        assert (view[:, WEIGHT] == 0.5).all() and (memory[:3] == 7).all() and (memory[803:] == 7).all()


def test_nothing_to_update(device):
    assert weight_update(torch.zeros(0, len(FIELDS), device=device), 0.1).shape == (0, len(FIELDS))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("name", "n", "bits", "asked"),
    [("aos", 4096, 32, 8), ("soa", 4096, 128, 1), ("soa", 4104, 32, 4)],
)
def test_bytes_that_move(name, n, bits, asked, arch):
    """`asked`: times the numbers' own bytes that the requests' sectors hold."""
    (trace,) = trace_launches(lambda: next(r for r in ladder.RUNGS if r.name == name).launch(state(n, name)), arch=arch)
    assert {access.vector_bits for access in trace.accesses} == {bits}
    assert trace.bytes_moved("load") == asked * 8 * n and trace.bytes_moved("store") == asked * 4 * n
    least = {"aos": {"load": 32 * n, "store": 32 * n}, "soa": {"load": 8 * n, "store": 4 * n}}
    assert trace.least_bytes == least[name]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_fits_every_architecture(arch):
    for name in NAMES:
        launcher = getattr(ladder, f"launch_{name}")
        (made,) = compile_all(lambda launcher=launcher, name=name: launcher(state(4096, name)), arch)
        assert not misfit(made) and made.spilled_bytes == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: weight_update(x, 0.1, "fast"), "weight_update: there is no rung 'fast'; take one of aos, soa"),
        (lambda x: weight_update(x.half(), 0.1), "weight_update: state has dtype torch.float16; optimizers keep"),
        (lambda x: weight_update(x[:, :4], 0.1), r"weight_update: state has shape \(30, 4\); give \[n, 8\]"),
        (lambda x: weight_update(x[0], 0.1), r"weight_update: state has shape \(8,\); give \[n, 8\]"),
        (lambda x: weight_update(x[::2], 0.1), r"strides \(16, 1\); pass laid_out\(state, 'soa'\)"),
        (
            lambda x: weight_update(x, 0.1, "soa"),
            r"weight_update: rung 'soa' takes state\[n, 8\] with strides \(1, n\)",
        ),
        (lambda x: laid_out(x, "sao"), "weight_update: there is no rung 'sao'"),
    ],
)
def test_clear_errors(call, message, device):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call(torch.zeros(30, len(FIELDS), device=device))
    assert "\n" not in str(caught.value)


def test_names_and_cost():
    assert all(rung.name in ladder.__doc__ and rung.idea for rung in ladder.RUNGS)
    assert ladder.cost(1000).bytes_moved == 12000 and ladder.cost(1000).flops == 2000
    assert set(ladder.examples()) == {"aos 16777216", "soa 16777216"}
