import pytest
import torch
from compiled import compile_all
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch

from fastkit.kernels import nf4
from fastkit.kernels import nf4_matvec as module
from fastkit.lab.portability import misfit
from fastkit.lab.tracer import trace_launches
from fastkit.ops import dequantize_nf4, nf4_matvec, quantize_nf4

pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")


def inputs(M, N, K, dtype, device, blocksize=64, double_quant=True):
    weight = quantize_nf4(torch.randn(N, K, device=device).to(dtype), blocksize, double_quant)
    return torch.randn(M, K, device=device).to(dtype), weight


def check(x, weight, matvec=nf4_matvec):
    """Assert that `matvec` errs no more than torch's product with the dequantized weight."""
    dense = nf4.reference(weight, torch.float64)
    terms = x.double().abs() @ dense.T.abs()
    theirs = x @ dequantize_nf4(weight, x.dtype).T
    assert_as_close_as_torch(matvec(x, weight), theirs, x.double() @ dense.T, scale=terms)


@pytest.mark.parametrize(
    ("M", "N", "K", "blocksize"),
    [(1, 1, 8, 32), (1, 33, 576, 64), (1, 20, 4160, 4096), (2, 17, 64, 64), (5, 70, 200, 32), (16, 40, 288, 64),
     (17, 9, 64, 64), (1, 7, 13, 64), (3, 5, 12, 32)],
)  # fmt: skip
def test_close_to_the_truth(M, N, K, blocksize, dtype, device):
    check(*inputs(M, N, K, dtype, device, blocksize))


@given(st.integers(1, 16), st.integers(1, 80), st.integers(1, 80), st.booleans(), st.integers(0, 2**31))
def test_close_to_the_truth_at_any_shape(dtype, device, M, N, eighths, double_quant, seed):
    torch.manual_seed(seed)
    check(*inputs(M, N, 8 * eighths, dtype, device, double_quant=double_quant))


def test_shapes_and_layouts(dtype, device):
    x, weight = inputs(6, 20, 64, dtype, device)
    y = nf4_matvec(x, weight)
    assert torch.equal(nf4_matvec(x.view(2, 3, 64), weight), y.view(2, 3, 20))
    assert torch.equal(nf4_matvec(x.T.contiguous().T, weight), y)
    assert torch.equal(nf4_matvec(x[0], weight), nf4_matvec(x[:1], weight)[0])
    assert nf4_matvec(x[:0], weight).shape == (0, 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: nf4_matvec(x.double(), w), "x has dtype torch.float64"),
        (lambda x, w: nf4_matvec(x[:, 1:], w), r"x has shape \(2, 63\); a weight \(8, 64\) needs"),
        (lambda x, w: nf4_matvec(x.to("meta"), w), "x is on meta but weight is on"),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call(*inputs(2, 8, 64, torch.float32, "cpu"))
    assert str(caught.value).startswith("nf4_matvec: ") and "\n" not in str(caught.value)


WRONG = {
    "halves of a byte exchanged": lambda x, w: x @ dequantize_nf4(w).view(-1, 2).flip(1).view(w.shape).T,
    "a block's scale for its neighbour": lambda x, w: x.roll(64, 1) @ dequantize_nf4(w).T,
    "the last word left out": lambda x, w: x[:, :-8] @ dequantize_nf4(w).T[:-8],
    "added up in fp16": lambda x, w: (x[:, None] * dequantize_nf4(w)).view(2, 30, 16, 8).sum(3).cumsum(2)[..., -1],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_caught(wrong):
    x, weight = inputs(2, 30, 128, torch.float16, "cpu")
    check(x, weight, module.reference)
    with pytest.raises(AssertionError):
        check(x, weight, WRONG[wrong])


def test_cost():
    assert module.cost(1, 64, 128).bytes_moved == nf4.stored_bytes(64 * 128) + 2 * (64 + 128)


def launches(M, N, K, dtype):
    weight = nf4.empty_nf4((N, K), dtype, device="cpu")
    return module.launch_batch(torch.empty(M, K, dtype=dtype), weight, torch.empty(M, N, dtype=dtype))


def matvec_launches(N, K, dtype):
    weight = nf4.empty_nf4((N, K), dtype, device="cpu")
    return module.launch_matvec(torch.empty(K, dtype=dtype), weight, torch.empty(N, dtype=dtype))


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_compiled_code_of_one_row_without_tensor_cores(arch):
    (made,) = compile_all(
        lambda: matvec_launches(1024, 4096, torch.float16 if arch == "sm_75" else torch.float32), arch
    )
    assert not misfit(made) and made.spilled_bytes == 0


@pytest.mark.parametrize("M", [1, 16])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
def test_compiled_code(arch, M):
    """A weight is loaded from the table as tensor cores take it, and never stored again: 32 bits a weight and lane."""
    (made,) = compile_all(lambda: launches(M, 1024, 4096, torch.bfloat16), arch)
    assert not misfit(made) and made.spilled_bytes == 0 and "HMMA" in made.instructions
    in_loop = made.instructions["HMMA"] // (M // 8 or 1) * 4  # an HMMA takes four registers of weights
    assert in_loop <= made.instructions["ld.shared.32"] <= in_loop * 1.5
    assert sum(count for name, count in made.instructions.items() if name.startswith("st.shared")) < 32


def test_compiled_code_in_fp32():
    (made,) = compile_all(lambda: launches(16, 1024, 4096, torch.float32), "sm_90")
    assert not misfit(made) and made.spilled_bytes == 0


@pytest.mark.parametrize("M", [1, 16])
def test_every_weight_once(M):
    N, K = 64, 4096
    (trace,) = trace_launches(lambda: launches(M, N, K, torch.bfloat16), arch="sm_90")
    words = next(access for access in trace.accesses if access.argument == "words_ptr")
    assert words.efficiency == 1 and words.bytes_moved == N * K / 2


@pytest.mark.gpu
def test_under_torch_compile_and_in_a_graph(device):
    for M in (1, 16):
        x, weight = inputs(M, 512, 576, torch.bfloat16, device)
        plain = nf4_matvec(x, weight)
        assert torch.equal(torch.compile(lambda x, w=weight: nf4_matvec(x, w), fullgraph=True)(x), plain)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = nf4_matvec(x, weight)
        graph.replay()
        assert torch.equal(captured, plain)
