import functools

import pytest
import torch
from compiled import compile_all
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch

from fastkit.kernels import merged_dequantize as module
from fastkit.kernels import nf4
from fastkit.lab.portability import misfit
from fastkit.lab.tracer import trace_launches
from fastkit.ops import dequantize_nf4, merged_dequantize, merged_dequantize_fp8, quantize_nf4, weight_bounds

SCALING = 1.7
FP8 = torch.float8_e4m3fn
pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")


def inputs(N, K, r, dtype, device, adapter_dtype=None, blocksize=64):
    weight = quantize_nf4(torch.randn(N, K, device=device).to(dtype), blocksize, double_quant=True)
    A, B = (0.1 * torch.randn(shape, device=device) for shape in ((r, K), (N, r)))
    return weight, A.to(adapter_dtype or dtype), B.to(adapter_dtype or dtype)


def true(weight, A, B):
    return module.reference(weight, A, B, SCALING, torch.float64)


def check(weight, A, B, merge=merged_dequantize):
    """Assert that `merge` errs no more than torch, which rounds the weight, the product and the sum."""
    ours, dtype = merge(weight, A, B, SCALING), weight.dtype
    theirs = nf4.reference(weight) + (SCALING * (B.to(dtype) @ A.to(dtype))).to(dtype)
    terms = nf4.reference(weight, torch.float64).abs() + SCALING * (B.double().abs() @ A.double().abs())
    assert_as_close_as_torch(ours, theirs, true(weight, A, B), scale=terms)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("N", "K", "r", "blocksize"),
    [(64, 128, 16, 64), (1, 8, 1, 32), (70, 136, 5, 64), (33, 576, 64, 32), (9, 200, 100, 4096), (7, 9, 2, 64)],
)
def test_close_to_the_truth(N, K, r, blocksize, adapter_dtype, dtype, device):
    check(*inputs(N, K, r, dtype, device, adapter_dtype, blocksize))


@given(st.integers(1, 150), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_close_to_the_truth_at_any_shape(dtype, device, N, eighths, r, seed):
    torch.manual_seed(seed)
    check(*inputs(N, 8 * eighths, r, dtype, device))


def test_highest_rank(device):
    check(*inputs(20, 256, 256, torch.float16, device))


def test_without_an_adapter_the_bits_of_dequantize(dtype, device):
    weight, A, B = inputs(70, 136, 5, dtype, device)
    plain = dequantize_nf4(weight)
    assert torch.equal(merged_dequantize(weight), plain)
    assert torch.equal(merged_dequantize(weight, A, torch.zeros_like(B), SCALING), plain)


def test_transposed_has_the_same_bits(dtype, device):
    adapted = inputs(70, 136, 5, dtype, device)
    plain = merged_dequantize(*adapted, SCALING)
    assert torch.equal(merged_dequantize(*adapted, SCALING, transposed=True), plain.T)


def test_into_a_stacked_buffer(dtype, device):
    first, second = inputs(40, 64, 4, dtype, device), inputs(30, 64, 4, dtype, device)
    stacked = torch.empty(80, 64, dtype=dtype, device=device)
    assert merged_dequantize(*first, SCALING, out=stacked[:40]).data_ptr() == stacked.data_ptr()
    merged_dequantize(*second, SCALING, out=stacked[40:70])
    assert stacked[70:].isnan().all()  # poisoned, not touched
    assert torch.equal(stacked[:70], torch.cat([merged_dequantize(*adapted, SCALING) for adapted in (first, second)]))
    wide = torch.empty(64, 100, dtype=dtype, device=device)
    merged_dequantize(*first, SCALING, transposed=True, out=wide[:, 5:45])
    assert torch.equal(wide[:, 5:45], stacked[:40].T) and wide[:, :5].isnan().all()


def test_strided_adapters_and_another_dtype(device):
    weight, A, B = inputs(30, 64, 4, torch.float32, device)
    expected = merged_dequantize(weight, A, B, SCALING, dtype=torch.float16)
    A, B = A.T.contiguous().T, B.repeat(1, 2)[:, :4]
    assert torch.equal(merged_dequantize(weight, A, B, SCALING, dtype=torch.float16), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adapter", [True, False])
def test_fp8_is_a_rounding_away(adapter, transposed, dtype, device):
    weight, A, B = inputs(70, 136, 5, dtype, device)
    bound = weight_bounds(weight)[transposed]
    A, B = (A, B) if adapter else (None, None)
    w8, scale = merged_dequantize_fp8(weight, bound, A, B, SCALING, transposed=transposed)
    truth = true(weight, A, B)
    truth = truth.T if transposed else truth
    assert w8.dtype == FP8 and w8.float().isfinite().all() and scale.shape == bound.shape
    # half a unit in the last of 4 places, and of the subnormal numbers below 2**-6
    allowed = truth.abs() * 2**-4 + scale[:, None] * 2**-10
    assert ((w8.double() * scale.double()[:, None] - truth).abs() <= allowed * (1 + 1e-5)).all()
    assert (w8.float().abs().amax(1) > 448 / 16).all()  # the bound wastes less than four powers of two


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adapter", [True, False])
def test_fp8_kernel(adapter, transposed, device):
    """Interpreted, a number that is rounded up to a power of two ends at half of it; on a GPU all bits agree."""
    weight, A, B = inputs(70, 136, 5, torch.float32, device)
    bound, shape = weight_bounds(weight)[transposed], (136, 70) if transposed else (70, 136)
    A, B = (A, B) if adapter else (None, None)
    w8, (scale, inverse) = torch.empty(shape, dtype=FP8, device=device), torch.empty(2, shape[0], device=device)
    module.launch_scale(bound, A, B, SCALING, scale, inverse, transposed)
    module.launch(weight, A, B, SCALING, w8, transposed, inverse)
    theirs, their_scale = merged_dequantize_fp8(weight, bound, A, B, SCALING, transposed=transposed)
    torch.testing.assert_close(scale, their_scale)
    rtol = 0.51 if device == "cpu" else 0.13  # a unit in the last place where fp32 sums differ
    torch.testing.assert_close(w8.float(), theirs.float(), rtol=rtol, atol=2**-8)


@pytest.mark.parametrize("K", [64, 100, 36])
def test_bounds_hold_and_are_met(K, device):
    weight = quantize_nf4(torch.randn(50, K, device=device), 32)
    dense = dequantize_nf4(weight).abs()
    rows, columns = weight_bounds(weight)
    assert (dense.amax(1) <= rows).all() and (dense.amax(0) <= columns).all()
    if K == 64:
        assert torch.equal(dense.amax(1), rows)
    assert rows.shape == (50,) and columns.shape == (K,)


def test_nothing(device):
    weight = quantize_nf4(torch.empty(0, 8, device=device))
    assert merged_dequantize(weight, transposed=True).shape == (8, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, A, B: merged_dequantize(w, A, None), "one of A and B is None"),
        (lambda w, A, B: merged_dequantize(w, A.double(), B), "A has dtype torch.float64"),
        (lambda w, A, B: merged_dequantize(w, A, B[1:]), r"B \(7, 2\); a weight \[8, 64\] needs"),
        (lambda w, A, B: merged_dequantize(w, A[:0], B[:, :0]), "rank r from 1 to 256"),
        (lambda w, A, B: merged_dequantize(w, A.to("meta"), B.to("meta")), "A is on meta but weight is on"),
        (lambda w, A, B: merged_dequantize(w, dtype=torch.int8), "out has dtype torch.int8"),
        (lambda w, A, B: merged_dequantize(w, out=torch.empty(64, 8)), r"give \(8, 64\)"),
        (lambda w, A, B: merged_dequantize(w, out=torch.empty(64, 8).T), "with neighbours in a row"),
        (lambda w, A, B: merged_dequantize(quantize_nf4(torch.ones(64))), "give a matrix"),
        (lambda w, A, B: merged_dequantize_fp8(w, torch.ones(3)), "use weight_bounds"),
    ],
)
def test_clear_errors(call, message):
    weight, A, B = inputs(8, 64, 2, torch.float32, "cpu")
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call(weight, A, B)
    assert str(caught.value).startswith("merged_dequantize") and "\n" not in str(caught.value)


WRONG = {
    "scaling forgotten": lambda w, A, B, s: module.reference(w, A, B, 1.0),
    "delta rounded to bfloat16": lambda w, A, B, s: (nf4.reference(w).float() + s * (B @ A).bfloat16()).half(),
    "adapter in half precision of half": lambda w, A, B, s: module.reference(w, A.bfloat16(), B, s),
    "a column unwritten": lambda w, A, B, s: module.reference(w, A, B, s).index_fill(1, torch.tensor([63]), torch.nan),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_caught(wrong):
    weight, A, B = inputs(60, 64, 8, torch.float16, "cpu")
    A, B = 4 * A, 4 * B  # a delta as large as the weight
    check(weight, A, B, module.reference)
    with pytest.raises(AssertionError):
        check(weight, A, B, WRONG[wrong])


def launches(N, K, r, dtype, adapter_dtype=None):
    """Plain, transposed and FP8, which sm_80 does not have."""
    weight = nf4.empty_nf4((N, K), dtype, device="cpu")
    A, B = torch.empty(r, K, dtype=adapter_dtype or dtype), torch.empty(N, r, dtype=adapter_dtype or dtype)
    launch = functools.partial(module.launch, weight, A, B, SCALING)
    return launch(torch.empty(N, K, dtype=dtype)), launch(torch.empty(K, N, dtype=dtype), True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_compiled_code(arch):
    made = compile_all(lambda: launches(1024, 4096, 16, torch.bfloat16), arch)
    assert len(made) == 2 and not any(map(misfit, made))
    for compiled in made:
        assert compiled.spilled_bytes == 0
        assert {name for name in compiled.instructions if name.startswith("st.global")} == {"st.global.128"}
        assert {"HMMA", "WGMMA"} & set(compiled.instructions)


@pytest.mark.parametrize("r", [4, 256])
def test_compiled_code_of_fp32_adapters(r):
    made = compile_all(lambda: launches(1024, 4096, r, torch.bfloat16, torch.float32), "sm_90")
    assert not any(map(misfit, made))


def test_bytes_are_those_of_the_cost():
    N, K, r = 256, 1024, 16
    plain = trace_launches(lambda: launches(N, K, r, torch.bfloat16), arch="sm_90")[0]
    (words,) = [a for a in plain.accesses if a.argument == "words_ptr"]
    (store,) = plain.of("store")
    assert store.efficiency == 1 and store.bytes_moved == N * K * 2
    assert words.bytes_asked == N * K / 2 and words.efficiency >= 0.5  # half a sector, and from L1 its other half


@pytest.mark.gpu
def test_under_torch_compile_and_in_a_graph(device):
    adapted = inputs(512, 576, 16, torch.bfloat16, device)
    plain = merged_dequantize(*adapted, SCALING)
    assert torch.equal(torch.compile(lambda: merged_dequantize(*adapted, SCALING), fullgraph=True)(), plain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = merged_dequantize(*adapted, SCALING)
    graph.replay()
    assert torch.equal(captured, plain)
