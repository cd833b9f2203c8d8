import dataclasses

import pytest
import torch
from compiled import compile_all, faults
from hypothesis import given
from hypothesis import strategies as st

import fastkit.models.bnb  # noqa: F401  before bitsandbytes
from fastkit.kernels import nf4, nf4_quantize
from fastkit.lab.tracer import trace_launches
from fastkit.ops import NF4Weight, dequantize_nf4, quantize_nf4

functional = pytest.importorskip("bitsandbytes.functional")
pytestmark = pytest.mark.usefixtures("fresh_seed")
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles its fallback for odd sizes, anew for each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs(x, blocksize, double_quant):
    packed, state = functional.quantize_4bit(x, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4")
    return NF4Weight.from_bitsandbytes(packed, state), functional.dequantize_4bit(packed, state).view(x.shape)


def assert_same_bits(ours: NF4Weight, expected: NF4Weight):
    for field in dataclasses.fields(NF4Weight):
        a, b = getattr(ours, field.name), getattr(expected, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def check(x, blocksize, double_quant, exact_tail=True):
    expected, dense = theirs(x, blocksize, double_quant)
    if exact_tail or x.numel() % blocksize == 0:
        assert_same_bits(quantize_nf4(x, blocksize, double_quant), expected)
    for function in (dequantize_nf4, nf4.reference):
        found = function(expected)
        assert found.dtype == x.dtype and torch.equal(found, dense)


@EVERY_DTYPE
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
def test_bits_of_bitsandbytes(blocksize, double_quant, dtype, device):
    x = torch.randn(3 * 4096 // blocksize * blocksize, device=device) * torch.rand(1, device=device)
    check(x.to(dtype), blocksize, double_quant)


def test_a_tie_that_rounding_makes(device):
    """In one of these blocks x / absmax, rounded to fp32, is a midpoint; in fp64 it lies above."""
    torch.manual_seed(15239917)
    check((torch.randn(12288) * torch.rand(1)).to(device), 64, False)


@pytest.mark.parametrize("shape", [(1,), (2,), (7, 11), (64, 65), (31, 3, 33), (300, 257)], ids=str)
def test_bits_of_bitsandbytes_at_odd_sizes(shape, dtype, device):
    check(torch.randn(shape, device=device).to(dtype), 64, True, exact_tail=device == "cuda")


@given(n=st.integers(1, 9000), blocksize=st.sampled_from([32, 64, 512]), seed=st.integers(0, 2**31))
def test_bits_of_bitsandbytes_at_any_size(device, n, blocksize, seed):
    """A bfloat16 CPU tensor takes the reference, which divides the last block as bitsandbytes does."""
    torch.manual_seed(seed)
    check(torch.randn(n, device=device).to(torch.bfloat16), blocksize, True)


def test_last_block_as_if_filled_with_zeros(device):
    x = torch.randn(1000, device=device)
    padded = quantize_nf4(torch.nn.functional.pad(x, (0, 24)), 64)
    ours = quantize_nf4(x, 64)
    assert torch.equal(ours.packed, padded.packed[:500]) and torch.equal(ours.absmax, padded.absmax)


def extremes(dtype, device):
    """Blocks of zeros, of very small and of the largest numbers, of one number, and of ties between two codes."""
    blocks = torch.randn(8, 64, device=device)
    blocks[0] = 0
    blocks[1] *= 1e-6 if dtype == torch.float16 else 1e-30  # in fp16 subnormal numbers
    blocks[2] *= torch.finfo(dtype).max / blocks[2].abs().max() * 0.999
    blocks[3] = 3.0
    code = torch.tensor(nf4.CODE, device=device)
    blocks[4, :15], blocks[4, 15:] = nf4_quantize.midpoints(blocks.device), 1.0
    blocks[5, :16], blocks[5, 16:] = code, -1.0
    blocks[6, :15], blocks[6, 15:] = torch.nextafter(nf4_quantize.midpoints(blocks.device), blocks.new_tensor(2.0)), 1.0
    return blocks.to(dtype)


@EVERY_DTYPE
def test_extremes(dtype, device):
    """Every bit of what is quantized, and of what is dequantized again, on this device's backend of bitsandbytes.

    On a GPU its products that end below 2**-126 are zeros and ours are not; none of these do. On it 1 / absmax of the
    block of the largest is a zero, for both.
    """
    check(extremes(dtype, device), 64, False)


@pytest.mark.gpu
def test_subnormal_numbers_are_zeros_on_a_gpu(device):
    """Quantized alike. Dequantized, theirs are zeros and ours stay: absmax itself is a zero, so here they are too."""
    x = torch.randn(4, 64, device=device)
    x[1] *= 2.0**-135
    x[2, ::2] *= 2.0**-135
    assert_same_bits(quantize_nf4(x, 64), theirs(x, 64, False)[0])
    assert (dequantize_nf4(quantize_nf4(x, 64))[1] == 0).all()


def test_table_of_bitsandbytes():
    assert torch.equal(nf4_quantize.dynamic_code(), functional.create_dynamic_map())


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_nested_kernel_is_nearest(n, device):
    """The GPU's bisection: each index within half a step of what was to be kept."""
    centered, code = torch.randn(n, device=device), nf4_quantize.dynamic_code().to(device)
    indices = torch.empty(n, dtype=torch.uint8, device=device)
    nested = torch.empty(-(-n // 256), device=device)
    nf4_quantize.launch_absmax(centered, code, indices, nested)
    scaled = centered / nested.repeat_interleave(256)[:n]
    least = (scaled[:, None] - code).abs().amin(1)
    torch.testing.assert_close((scaled - code[indices.long()]).abs(), least, rtol=0, atol=1e-6)


def test_other_dtypes_and_views(device):
    x = torch.randn(64, 96, device=device)
    weight = quantize_nf4(x.T, 32)
    assert torch.equal(weight.packed, quantize_nf4(x.T.contiguous(), 32).packed) and weight.shape == (96, 64)
    assert torch.equal(dequantize_nf4(weight, torch.float16), dequantize_nf4(weight).half())
    late = dataclasses.replace(weight, packed=torch.cat([weight.packed[:1], weight.packed])[1:])  # in mid-word
    assert torch.equal(dequantize_nf4(late), dequantize_nf4(weight))


def test_nothing(device):
    weight = quantize_nf4(torch.empty(0, 8, device=device))
    assert dequantize_nf4(weight).shape == (0, 8) and weight.packed.numel() == weight.absmax.numel() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quantize_nf4(x.double()), "x has dtype torch.float64"),
        (lambda x: quantize_nf4([1.0]), "x is a list"),
        (lambda x: quantize_nf4(x, 48), "blocksize is 48; use one of 32, 64"),
        (lambda x: quantize_nf4(x[:0], double_quant=True), "mean absmax of no blocks"),
        (lambda x: quantize_nf4(x.to("meta")), "x is on device meta; move it"),
        (lambda x: dequantize_nf4(quantize_nf4(x), torch.float64), "weight has dtype torch.float64"),
    ],
)
def test_clear_errors(call, message, device):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        call(torch.ones(128, device=device))
    assert "_nf4: " in str(caught.value) and "\n" not in str(caught.value)


def test_another_quantization():
    packed, state = functional.quantize_4bit(torch.ones(64), quant_type="fp4")
    with pytest.raises(ValueError, match="quantized as 'fp4'"):
        NF4Weight.from_bitsandbytes(packed, state)


def test_cost():
    assert nf4.stored_bytes(2**20) == 2**19 + 2**14 + 4 * 2**6 + 4 * 257 + 64
    assert nf4.cost(2**20).bytes_moved == 2 * 2**20 + nf4.stored_bytes(2**20)
    assert nf4_quantize.cost(2**20).bytes_moved == 2 * 2**20 + 2**19 + 4 * 2**14 + 64


def launches(n, dtype, double_quant=True):
    weight = nf4.empty_nf4((n,), dtype, double_quant=double_quant, device="cpu")
    nf4.launch(weight, torch.empty(n, dtype=dtype))


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_89", "sm_90"])
def test_compiled_code(arch):
    """Nothing spilled; words loaded and numbers stored by 128 bits a lane."""
    (made,) = compile_all(lambda: launches(2**16, torch.float16), arch)
    assert made.spilled_bytes == 0 and made.registers <= 64
    assert [name for name in made.instructions if name.startswith("st.global")] == ["st.global.128"]
    assert "ld.global.128" in made.instructions


def test_every_byte_once():
    n = 2**18
    (trace,) = trace_launches(lambda: launches(n, torch.bfloat16), arch="sm_90")
    words = next(a for a in trace.of("load") if a.argument == "words_ptr")
    assert words.vector_bits == 128 and words.efficiency == 1
    (stores,) = trace.of("store")
    assert stores.vector_bits == 128 and stores.efficiency == 1
    assert words.bytes_moved + stores.bytes_moved == pytest.approx(nf4.cost(n).bytes_moved, rel=0.02)


def test_quantize_compiles():
    x, absmax = torch.empty(2**16, dtype=torch.bfloat16), torch.empty(2**10)
    packed = torch.empty(2**15, dtype=torch.uint8)
    (made,) = compile_all(lambda: nf4_quantize.launch(x, 64, packed, absmax), "sm_90")
    assert not [fault for fault in faults(made, narrow=99) if "128-bit store" not in fault]


@pytest.mark.gpu
def test_on_a_gpu_over_2_to_the_31_numbers(device):
    weight = quantize_nf4(torch.ones(2**31 // 64 + 64, 64, dtype=torch.bfloat16, device=device))
    assert dequantize_nf4(weight).eq(1).all()


@pytest.mark.gpu
def test_under_torch_compile_and_in_a_graph(device):
    weight = quantize_nf4(torch.randn(4096, 576, device=device).bfloat16(), double_quant=True)
    plain = dequantize_nf4(weight)
    with torch.compiler.set_stance("default"):
        assert torch.equal(torch.compile(lambda: dequantize_nf4(weight), fullgraph=True)(), plain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dequantize_nf4(weight)
    graph.replay()
    assert torch.equal(captured, plain)
