import math

import pytest
import torch
import torch.nn.functional as F
from compiled import compile_all, faults
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch

from fastkit.kernels import swiglu as module
from fastkit.lab.portability import misfit
from fastkit.ops import swiglu

pytestmark = [
    pytest.mark.usefixtures("poisoned", "fresh_seed"),
    pytest.mark.filterwarnings(
        "ignore:overflow encountered in exp"
    ),  # the interpreter's numpy; the infinity is harmless
]


def run(glu, gate, up, dy):
    """(y, dgate, dup) of one forward and backward through `glu`."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = glu(gate, up)
    y.backward(dy)
    return y, gate.grad, up.grad


def torch_glu(gate, up):
    return F.silu(gate) * up


def check(glu, gate, up):
    """Assert that y, dgate and dup of `glu` are as close to the truth as those of torch."""
    dy = torch.randn(gate.shape, device=gate.device).to(gate.dtype)
    ours, theirs = run(glu, gate, up, dy), run(torch_glu, gate, up, dy)
    gate, up, dy = gate.double(), up.double(), dy.double()
    truth = run(module.reference, gate, up, dy)
    scales = truth[0], dy * up, truth[2]  # dsilu is a sum whose terms cancel at gate = -1.28
    for results in zip(ours, theirs, truth, ("y", "dgate", "dup"), scales, strict=True):
        assert_as_close_as_torch(*results)


def inputs(shape, dtype, device):
    return tuple((3 * torch.randn(shape, device=device)).to(dtype) for _ in range(2))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (7, 1), (3, 5), (2, 3, 100), (1024,), (1025,), (40, 333), ()], ids=str)
def test_close_to_the_truth(shape, dtype, device):
    check(swiglu, *inputs(shape, dtype, device))


@given(
    shape=st.lists(st.integers(1, 16), min_size=1, max_size=3),
    stacked=st.booleans(),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1, 10]),
)
def test_close_to_the_truth_at_any_shape(dtype, device, shape, stacked, seed, scale):
    torch.manual_seed(seed)
    gate, up = (scale * half.float() for half in inputs(shape, torch.float32, device))
    if stacked:
        gate, up = torch.cat([gate, up], -1).chunk(2, -1)
    check(swiglu, gate.to(dtype), up.to(dtype))


LAYOUTS = {
    "halves": lambda gate, up: torch.cat([gate, up], -1).chunk(2, -1),
    "unaligned halves": lambda gate, up: torch.cat([gate[..., :1], gate, up], -1)[..., 1:].split(
        [gate.shape[-1], up.shape[-1]], -1
    ),
    "interleaved": lambda gate, up: torch.stack([gate, up], -1).unbind(-1),
    "transposed": lambda gate, up: (gate.mT.contiguous().mT, up.mT.contiguous().mT),
    "one contiguous": lambda gate, up: (gate, torch.cat([up, gate], -1)[..., : up.shape[-1]]),
    "expanded": lambda gate, up: (gate, up[:1, :1].expand(up.shape)),
    "the same": lambda gate, up: (gate, gate),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [31, 1500])
def test_layouts(layout, N, dtype, device):
    check(swiglu, *LAYOUTS[layout](*inputs((2, 3, N), dtype, device)))


def test_halves_of_a_stacked_tensor_are_not_copied():
    gate, up = torch.empty(2, 3, 16).chunk(2, -1)
    rows = module.elementwise_rows(gate, up, torch.empty(2, 3, 8))
    assert [r.shape for r in rows] == [(6, 8)] * 3 and [r.stride(0) for r in rows] == [16, 16, 8]
    assert [rows[0].data_ptr(), rows[1].data_ptr()] == [gate.data_ptr(), up.data_ptr()]


def test_contiguous_tensors_are_one_row():
    assert [r.shape for r in module.elementwise_rows(torch.empty(2, 3, 8), torch.empty(2, 3, 8))] == [(1, 48)] * 2


def test_gradient_of_a_stacked_tensor(device):
    stacked = torch.randn(5, 24, device=device, requires_grad=True)
    swiglu(*stacked.chunk(2, -1)).sum().backward()
    (truth,) = torch.autograd.grad(module.reference(*stacked.chunk(2, -1)).sum(), stacked)
    torch.testing.assert_close(stacked.grad, truth)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 8)])
def test_nothing(shape, dtype, device):
    gate, up = inputs(shape, dtype, device)
    assert all(result.shape == shape for result in run(swiglu, gate, up, gate))


def test_gates_past_the_range_of_exp(device):
    gate = torch.tensor([1e4, -1e4, 6e4, -6e4, 100.0, -100.0, 0.0, -0.0], dtype=torch.float16, device=device)
    up, dy = torch.full_like(gate, 0.5), torch.ones_like(gate)
    y, dgate, dup = run(swiglu, gate, up, dy)
    torch.testing.assert_close(y, gate.relu() / 2)
    torch.testing.assert_close(dup, gate.relu())
    torch.testing.assert_close(dgate, torch.where(gate == 0, 0.25, (gate > 0) / 2).half())


def test_reference_gradients():
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(module.reference, (gate, up))


def test_one_frozen_input(device):
    gate, up = inputs((5, 40), torch.float32, device)
    for trained, index in ((gate, 1), (up, 2)):
        leaf = trained.detach().clone().requires_grad_()
        swiglu(*(leaf if tensor is trained else tensor for tensor in (gate, up))).sum().backward()
        torch.testing.assert_close(leaf.grad, run(module.reference, gate, up, torch.ones_like(gate))[index])


def test_saves_nothing_but_its_inputs(device):
    gate, up = (t.requires_grad_() for t in inputs((5, 40), torch.float32, device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up)
    assert saved == [gate.data_ptr(), up.data_ptr()]


def test_no_second_derivative(device):
    gate, up = (t.requires_grad_() for t in inputs((2, 8), torch.float32, device))
    (dgate,) = torch.autograd.grad(swiglu(gate, up).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dgate.sum().backward()


def test_autocast_changes_nothing(dtype, device):
    gate, up = inputs((4, 96), dtype, device)
    plain = run(swiglu, gate, up, gate)
    with torch.autocast(device, torch.bfloat16):
        cast = run(swiglu, gate, up, gate)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_same_bits_every_time(dtype, device):
    gate, up = inputs((30, 100), dtype, device)
    first, second = (run(swiglu, gate, up, gate) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("stacked", [False, True])
def test_outputs_may_overwrite_inputs(stacked, dtype, device):
    gate, up = inputs((7, 1500), dtype, device)
    y, dy, dgate, dup = (torch.randn_like(gate) for _ in range(4))
    module.launch_forward(gate, up, y)
    module.launch_backward(dy, gate, up, dgate, dup)
    if stacked:
        gate, up = torch.cat([gate, up], -1).chunk(2, -1)
    in_place = gate.clone()
    module.launch_forward(in_place, up, in_place)
    assert torch.equal(in_place, y)
    module.launch_backward(dy, gate, up, gate, up)
    assert torch.equal(gate, dgate) and torch.equal(up, dup)


def test_offsets_past_2_to_the_31(device):
    stride, rows, N = 2**30, 3, 8
    memory = torch.UntypedStorage((stride * (rows - 1) + 2 * N) * 2, device=device)  # 4 GiB of addresses, few touched
    stacked = torch.empty(0, dtype=torch.float16, device=device).set_(memory, 0, (rows, 2 * N), (stride, 1))
    gate, up = inputs((rows, N), torch.float16, device)
    stacked.copy_(torch.cat([gate, up], -1))
    for ours, theirs in zip(run(swiglu, *stacked.chunk(2, -1), gate), run(swiglu, gate, up, gate), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_more_than_2_to_the_31_numbers(device):
    count = 2**31 + 4000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count + 2**30:
        pytest.skip("needs 13 GiB of free GPU memory")
    gate, up, y = (torch.zeros(count, dtype=torch.float16, device=device) for _ in range(3))
    for end in (slice(0, 2000), slice(-2000, None)):
        gate[end], up[end] = inputs((2000,), torch.float16, device)
    module.launch_forward(*module.elementwise_rows(gate, up, y))
    for end in (slice(0, 2000), slice(-2000, None)):
        assert torch.equal(y[end], swiglu(gate[end], up[end]))
    assert y[2000:-2000].count_nonzero() == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda gate, up: (gate.int(), up.int()), "gate has dtype torch.int32"),
        (lambda gate, up: (gate.double(), up.double()), "gate has dtype torch.float64"),
        (lambda gate, up: (gate, up.half()), "up has dtype torch.float16 but gate has torch.float32"),
        (lambda gate, up: (gate, up[:1]), r"up has shape \(1, 8\) but gate has \(2, 8\)"),
        (lambda gate, up: (gate, 2.0), "up is a float"),
        (lambda gate, up: (gate, up.to("meta")), "up is on meta but gate is on"),
        (lambda gate, up: (gate.to("meta"), up.to("meta")), "gate is on device meta; move it"),
    ],
)
def test_clear_errors(wrong, message, device):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        swiglu(*wrong(*inputs((2, 8), torch.float32, device)))
    assert str(caught.value).startswith("swiglu: ") and "\n" not in str(caught.value)


def _gelu(gate, up):
    return (F.gelu(gate.float()) * up.float()).half()


WRONG = {
    "up gates": lambda gate, up: module.reference(up, gate),
    "sigmoid alone": lambda gate, up: (gate.float().sigmoid() * up.float()).half(),
    "gelu": _gelu,
    "gate taken for a constant in dsilu": lambda gate, up: (gate.float() * gate.float().sigmoid().detach() * up).half(),
    "sigmoid in fp16": lambda gate, up: (gate.float() * gate.sigmoid() * up).half(),
    "rounded three times": lambda gate, up: gate * gate.sigmoid() * up,
    "last column unwritten": lambda gate, up: module.reference(gate, up).index_fill(-1, torch.tensor([99]), math.nan),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_caught(wrong):
    gate, up = inputs((60, 100), torch.float16, "cpu")
    check(module.reference, gate, up)
    with pytest.raises(AssertionError, match=r"error|not finite"):
        check(WRONG[wrong], gate, up)


def test_cost():
    forward, backward = module.cost(8, 1024, torch.float32)
    assert forward.bytes_moved == 3 * 8 * 1024 * 4 and backward.bytes_moved == 5 * 8 * 1024 * 4
    assert backward.flops > forward.flops > 0


def launches(M, N, dtype):
    """Forward and backward of the halves of a stacked tensor, then of flat tensors."""
    gate, up = torch.empty(M, 2 * N, dtype=dtype).chunk(2, -1)
    y, dgate, dup = (torch.empty(M, N, dtype=dtype) for _ in range(3))
    module.launch_forward(*module.elementwise_rows(gate, up, y))
    module.launch_backward(*module.elementwise_rows(y, gate, up, dgate, dup))
    module.launch_forward(*module.elementwise_rows(dgate, dup, y))
    module.launch_backward(*module.elementwise_rows(y, dgate, dup, dgate, dup))


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(arch, torch.float16) for arch in ("sm_75", "sm_80", "sm_89", "sm_90", "gfx942")]
    + [("sm_90", torch.float32), ("sm_90", torch.bfloat16)],
    ids=str,
)
def test_compiled_code(arch, dtype):
    """Nothing spilled, no shared memory and 128-bit accesses only."""
    made = compile_all(lambda: launches(64, 14336, dtype), arch)
    assert len(made) == 4 and not any(compiled.shared_bytes for compiled in made)
    if arch == "gfx942":  # 1024 numbers of 16 bits are 64 bits for each of the 256 lanes of four waves
        assert not any(misfit(compiled) or compiled.spilled_bytes for compiled in made)
    else:
        assert not [fault for compiled in made for fault in faults(compiled)]


def test_one_number_compiles():
    """Triton makes constants of arguments that are 1."""
    assert len(compile_all(lambda: launches(1, 1, torch.bfloat16), "sm_90")) == 4


def test_narrow_accesses_are_seen():
    made = compile_all(lambda: launches(64, 999, torch.float16), "sm_90")
    assert all(any("narrower than 128 bits" in fault for fault in faults(compiled)) for compiled in made[:2])


@pytest.mark.gpu
def test_under_torch_compile_and_in_a_graph(device):
    gate, up = inputs((64, 1500), torch.bfloat16, device)
    plain = run(swiglu, gate, up, gate)
    compiled = run(torch.compile(swiglu, fullgraph=True), gate, up, gate)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = swiglu(gate, up)
    graph.replay()
    assert torch.equal(y, plain[0])
