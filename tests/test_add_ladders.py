"""The ladders of the first kernel: every rung of add and add_norm computes its operation and says when it cannot."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch

from fastkit.kernels.ladders import add as adds
from fastkit.kernels.ladders import add_norm as norms
from fastkit.kernels.ladders.add import add
from fastkit.kernels.ladders.add_norm import add_norm
from fastkit.lab.tracer import trace_launches

pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")
ADDS, NORMS = ([rung.name for rung in module.RUNGS] for module in (adds, norms))


def random(*shape, dtype=torch.float32, device="cpu"):
    return [torch.randn(shape, device=device).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("name", ADDS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (1023,), (1024,), (1025,), (3, 5, 7), (5000,)], ids=str)
def test_add(name, shape, dtype, device):
    x, y = random(*shape, dtype=dtype, device=device)
    assert torch.equal(add(x, y, name), x + y)


@pytest.mark.parametrize("rung", adds.RUNGS, ids=ADDS)
@given(n=st.integers(1, 5000), before=st.integers(0, 9))
def test_add_writes_its_own_numbers_only(rung, dtype, device, n, before):
    x, y = random(n, dtype=dtype, device=device)
    memory = torch.full((before + n + 9,), 7.0, dtype=dtype, device=device)
    rung.launch(x, y, memory[before : before + n])
    assert torch.equal(memory[before : before + n], x + y)
    assert (memory[:before] == 7).all() and (memory[before + n :] == 7).all()


def in_torch(x, residual):
    """With the sum rounded, as a kernel that hands it to the next must."""
    h = (x + residual).float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norms.EPS)).to(x.dtype)


@pytest.mark.parametrize("name", NORMS)
@given(M=st.integers(1, 6), N=st.integers(1, 1200), size=st.sampled_from([1e-3, 1.0, 30.0]))
def test_add_norm(name, dtype, device, M, N, size):
    x, residual = (size * x for x in random(M, N, dtype=dtype, device=device))
    y = add_norm(x, residual, name)
    truth = norms.reference(x.double(), residual.double())
    assert_as_close_as_torch(y, in_torch(x, residual), truth)


@pytest.mark.parametrize("name", NORMS)
def test_add_norm_of_zeros_and_of_no_rows(name, dtype, device):
    zeros = torch.zeros(3, 50, dtype=dtype, device=device)
    assert torch.equal(add_norm(zeros, zeros, name), zeros)
    assert add_norm(zeros[:0], zeros[:0], name).shape == (0, 50)


@pytest.mark.parametrize("rung", norms.RUNGS, ids=NORMS)
def test_add_norm_writes_its_own_numbers_only(rung, device):
    x, residual = random(7, 333, device=device)
    memory = torch.full((7 * 333 + 40,), 7.0, device=device)
    y = memory[9 : 9 + 7 * 333].view(7, 333)
    rung.launch(x, residual, y)
    torch.testing.assert_close(y, norms.reference(x, residual))
    assert (memory[:9] == 7).all() and (memory[9 + 7 * 333 :] == 7).all()


@pytest.mark.skipif(not norms.triton.knobs.runtime.interpret, reason="traces in the interpreter")
@pytest.mark.parametrize(("rung", "transfers"), [*zip(norms.RUNGS, (6, 5, 3), strict=True)], ids=NORMS)
def test_the_bytes_that_each_rung_moves(rung, transfers):
    x, residual, y = torch.empty(3, 64, 1024)
    traces = trace_launches(lambda: rung.launch(x, residual, y), arch="sm_89", programs=None)
    moved = sum(trace.bytes_moved(kind) for trace in traces for kind in ("load", "store"))
    rows = 32 * 64 * (len(traces) - 1)  # rstd: a sector for each row, at each end
    assert transfers * 4 * 64 * 1024 <= moved <= transfers * 4 * 64 * 1024 + 8 * rows
    assert norms.cost(64, 1024).bytes_moved == 3 * 4 * 64 * 1024


@pytest.mark.parametrize("function", [add, add_norm])
def test_refusals(function, device):
    x, y = random(4, 8, device=device)
    with pytest.raises(ValueError, match="has shape"):
        function(x, y[:2])
    with pytest.raises(TypeError, match="float16"):
        function(x, y.half())
    with pytest.raises(TypeError, match="int64"):
        function(x.long(), y.long())
    with pytest.raises(ValueError, match="contiguous"):
        function(x.T, y.T)
    with pytest.raises(ValueError, match="no rung 'other'"):
        function(x, y, "other")


def test_rows_that_are_none_or_too_long(device):
    x = torch.zeros(1, norms.MAX_N + 1, device=device)
    if norms.triton.knobs.runtime.interpret or device == "cuda":
        with pytest.raises(ValueError, match="up to 32768 numbers, and x has rows of 32769"):
            add_norm(x, x)
    with pytest.raises(ValueError, match="rows of at least one number"):
        add_norm(x[:, :0], x[:, :0])


def test_references_on_a_cpu(references):
    x, y = random(5, 20)
    assert torch.equal(add(x, y), x + y)
    torch.testing.assert_close(add_norm(x, y), in_torch(x, y))
