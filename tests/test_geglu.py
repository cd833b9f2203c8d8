from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compiled import compile_all, faults
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch
from transformers.activations import ACT2FN

from fastkit.kernels import geglu as module
from fastkit.kernels.swiglu import elementwise_rows
from fastkit.lab.portability import misfit
from fastkit.ops import geglu

pytestmark = [
    pytest.mark.usefixtures("poisoned", "fresh_seed"),
    pytest.mark.filterwarnings("ignore:overflow encountered in"),  # the interpreter's numpy; the infinity is harmless
]
both_approximations = pytest.mark.parametrize("approximate", ["none", "tanh"])


def run(glu, gate, up, dy):
    """(y, dgate, dup) of one forward and backward through `glu`."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = glu(gate, up)
    y.backward(dy)
    return y, gate.grad, up.grad


def check(glu, gate, up, approximate):
    """Assert that y, dgate and dup of `glu` are as close to the truth as those of torch."""
    dy = torch.randn(gate.shape, device=gate.device).to(gate.dtype)
    ours = run(glu, gate, up, dy)
    theirs = run(lambda gate, up: F.gelu(gate, approximate=approximate) * up, gate, up, dy)
    gate, up, dy = gate.double(), up.double(), dy.double()
    truth = run(partial(module.reference, approximate=approximate), gate, up, dy)
    scales = gate * up, dy * up, dy * gate  # 1 + erf and dgelu are sums whose terms cancel
    for results in zip(ours, theirs, truth, ("y", "dgate", "dup"), scales, strict=True):
        assert_as_close_as_torch(*results)


def inputs(shape, dtype, device):
    return tuple((3 * torch.randn(shape, device=device)).to(dtype) for _ in range(2))


@both_approximations
@pytest.mark.parametrize("shape", [(1,), (7, 1), (3, 5), (2, 3, 100), (1024,), (1025,), (40, 333), ()], ids=str)
def test_close_to_the_truth(approximate, shape, dtype, device):
    check(partial(geglu, approximate=approximate), *inputs(shape, dtype, device), approximate)


@both_approximations
@given(
    shape=st.lists(st.integers(1, 16), min_size=1, max_size=3),
    stacked=st.booleans(),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1, 10]),
)
def test_close_to_the_truth_at_any_shape(approximate, dtype, device, shape, stacked, seed, scale):
    torch.manual_seed(seed)
    gate, up = (scale * half.float() for half in inputs(shape, torch.float32, device))
    if stacked:
        gate, up = torch.cat([gate, up], -1).chunk(2, -1)
    check(partial(geglu, approximate=approximate), gate.to(dtype), up.to(dtype), approximate)


LAYOUTS = {
    "halves": lambda gate, up: torch.cat([gate, up], -1).chunk(2, -1),
    "interleaved": lambda gate, up: torch.stack([gate, up], -1).unbind(-1),
    "transposed": lambda gate, up: (gate.mT.contiguous().mT, up.mT.contiguous().mT),
    "expanded": lambda gate, up: (gate, up[:1, :1].expand(up.shape)),
    "the same": lambda gate, up: (gate, gate),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    check(geglu, *LAYOUTS[layout](*inputs((2, 3, 1500), dtype, device)), "none")


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0)])
def test_nothing(shape, dtype, device):
    gate, up = inputs(shape, dtype, device)
    assert all(result.shape == shape for result in run(geglu, gate, up, gate))


@both_approximations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gates_far_out(approximate, dtype, device):
    """Where phi is 0 or 1, nothing of what multiplies it may spoil the result."""
    largest = torch.finfo(dtype).max
    gate = torch.tensor([largest, -largest, 3e4, -3e4, 200.0, -200.0, 0.0, -0.0], dtype=dtype, device=device)
    up, dy = torch.full_like(gate, 0.5), torch.ones_like(gate)
    y, dgate, dup = run(partial(geglu, approximate=approximate), gate, up, dy)
    torch.testing.assert_close(y, gate.relu() / 2)
    torch.testing.assert_close(dup, gate.relu())
    torch.testing.assert_close(dgate, torch.where(gate == 0, 0.25, (gate > 0) / 2).to(dtype))


@both_approximations
def test_within_a_rounding_of_hugging_face(approximate, dtype, device):
    gate, up = inputs((20, 300), dtype, device)
    activation = ACT2FN["gelu" if approximate == "none" else "gelu_pytorch_tanh"]
    theirs = (activation(gate) * up).float()
    atol = 2**-20 * (gate.float() * up.float()).abs().max().item()  # 1 + erf cancels, to different remainders
    rtol = 1.6 * torch.finfo(dtype).eps
    torch.testing.assert_close(geglu(gate, up, approximate).float(), theirs, rtol=rtol, atol=atol)


@both_approximations
def test_reference_gradients(approximate):
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(partial(module.reference, approximate=approximate), (gate, up))


def test_saves_nothing_but_its_inputs(device):
    gate, up = (t.requires_grad_() for t in inputs((5, 40), torch.float32, device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        geglu(gate, up)
    assert saved == [gate.data_ptr(), up.data_ptr()]


def test_no_second_derivative(device):
    gate, up = (t.requires_grad_() for t in inputs((2, 8), torch.float32, device))
    (dgate,) = torch.autograd.grad(geglu(gate, up).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dgate.sum().backward()


def test_autocast_changes_nothing(dtype, device):
    gate, up = inputs((4, 96), dtype, device)
    plain = run(geglu, gate, up, gate)
    with torch.autocast(device, torch.bfloat16):
        cast = run(geglu, gate, up, gate)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@both_approximations
@pytest.mark.parametrize("stacked", [False, True])
def test_outputs_may_overwrite_inputs(approximate, stacked, dtype, device):
    gate, up = inputs((7, 1500), dtype, device)
    y, dy, dgate, dup = (torch.randn_like(gate) for _ in range(4))
    module.launch_forward(gate, up, y, approximate)
    module.launch_backward(dy, gate, up, dgate, dup, approximate)
    if stacked:
        gate, up = torch.cat([gate, up], -1).chunk(2, -1)
    in_place = gate.clone()
    module.launch_forward(in_place, up, in_place, approximate)
    assert torch.equal(in_place, y)
    module.launch_backward(dy, gate, up, gate, up, approximate)
    assert torch.equal(gate, dgate) and torch.equal(up, dup)


def test_offsets_past_2_to_the_31(device):
    stride, rows, N = 2**30, 3, 8
    memory = torch.UntypedStorage((stride * (rows - 1) + 2 * N) * 2, device=device)  # 4 GiB of addresses, few touched
    stacked = torch.empty(0, dtype=torch.float16, device=device).set_(memory, 0, (rows, 2 * N), (stride, 1))
    gate, up = inputs((rows, N), torch.float16, device)
    stacked.copy_(torch.cat([gate, up], -1))
    for ours, theirs in zip(run(geglu, *stacked.chunk(2, -1), gate), run(geglu, gate, up, gate), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda gate, up: (gate.int(), up.int()), "gate has dtype torch.int32"),
        (lambda gate, up: (gate, up.half()), "up has dtype torch.float16 but gate has torch.float32"),
        (lambda gate, up: (gate, up[:1]), r"up has shape \(1, 8\) but gate has \(2, 8\)"),
        (lambda gate, up: (gate, 2.0), "up is a float"),
        (lambda gate, up: (gate, up, "erf"), "approximate is 'erf'; give 'none' or 'tanh'"),
        (lambda gate, up: (gate, up.to("meta")), "up is on meta but gate is on"),
        (lambda gate, up: (gate.to("meta"), up.to("meta")), "gate is on device meta; move it"),
    ],
)
def test_clear_errors(wrong, message, device):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        geglu(*wrong(*inputs((2, 8), torch.float32, device)))
    assert str(caught.value).startswith("geglu: ") and "\n" not in str(caught.value)


WRONG = {
    "up gates": lambda gate, up: module.reference(up, gate),
    "the other approximation": lambda gate, up: module.reference(gate, up, "tanh"),
    "silu": lambda gate, up: (F.silu(gate.float()) * up.float()).half(),
    "sigmoid(1.702 x)": lambda gate, up: (gate.float() * (1.702 * gate.float()).sigmoid() * up.float()).half(),
    "phi taken for a constant": lambda gate, up: (
        gate.float() * torch.special.ndtr(gate.float()).detach() * up.float()
    ).half(),
    "rounded three times": lambda gate, up: gate * torch.special.ndtr(gate.float()).half() * up,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_caught(wrong):
    gate, up = inputs((60, 100), torch.float16, "cpu")
    check(module.reference, gate, up, "none")
    with pytest.raises(AssertionError, match="error"):
        check(WRONG[wrong], gate, up, "none")


def test_cost():
    forward, backward = module.cost(8, 1024, torch.float32)
    assert forward.bytes_moved == 3 * 8 * 1024 * 4 and backward.bytes_moved == 5 * 8 * 1024 * 4
    assert backward.flops > forward.flops > 0


def launches(M, N, dtype, approximate):
    """Forward and backward of the halves of a stacked tensor, then of flat tensors."""
    gate, up = torch.empty(M, 2 * N, dtype=dtype).chunk(2, -1)
    y, dgate, dup = (torch.empty(M, N, dtype=dtype) for _ in range(3))
    module.launch_forward(*elementwise_rows(gate, up, y), approximate)
    module.launch_backward(*elementwise_rows(y, gate, up, dgate, dup), approximate)
    module.launch_forward(*elementwise_rows(dgate, dup, y), approximate)
    module.launch_backward(*elementwise_rows(y, dgate, dup, dgate, dup), approximate)


@both_approximations
@pytest.mark.parametrize("arch", ["sm_75", "sm_89", "sm_90", "gfx942"])
def test_compiled_code(approximate, arch):
    """Nothing spilled, no shared memory and 128-bit accesses only."""
    made = compile_all(lambda: launches(64, 1536, torch.float16, approximate), arch)
    assert len(made) == 4 and not any(compiled.shared_bytes for compiled in made)
    if arch == "gfx942":  # 1024 numbers of 16 bits are 64 bits for each of the 256 lanes of four waves
        assert not any(misfit(compiled) or compiled.spilled_bytes for compiled in made)
    else:
        assert not [fault for compiled in made for fault in faults(compiled)]


@pytest.mark.gpu
@both_approximations
def test_under_torch_compile_and_in_a_graph(approximate, device):
    gate, up = inputs((64, 1500), torch.bfloat16, device)
    glu = partial(geglu, approximate=approximate)
    plain = run(glu, gate, up, gate)
    compiled = run(torch.compile(glu, fullgraph=True), gate, up, gate)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = glu(gate, up)
    graph.replay()
    assert torch.equal(y, plain[0])
