import pytest
import torch
import torch.nn.functional as F
from compiled import compile_all, faults
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch

from fastkit.kernels import add_rms_norm as module
from fastkit.kernels import rms_norm
from fastkit.lab.tracer import trace_launches
from fastkit.ops import add_rms_norm

EPS = 1e-5
NAMES = ("y", "h", "dx", "dresidual", "dweight")
pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")


def run(norm, x, residual, weight, dy, dh):
    """(y, h, dx, dresidual, dweight) of one forward and backward through `norm`."""
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight)]
    y, h = norm(*leaves, EPS)
    torch.autograd.backward((y, h), (dy.to(y.dtype), dh.to(h.dtype)))
    return y, h, *(leaf.grad for leaf in leaves)


def torch_norm(x, residual, weight, eps):
    h = x + residual
    return F.rms_norm(h, weight.shape, weight.to(h.dtype), eps), h


def check(norm, x, residual, weight):
    """Assert that every result of `norm` is as close to the truth as torch's. The truth has the h that was rounded."""
    dy, dh = (torch.randn(x.shape, device=x.device).to(x.dtype) for _ in range(2))
    ours, theirs = run(norm, x, residual, weight, dy, dh), run(torch_norm, x, residual, weight, dy, dh)
    assert torch.equal(ours[1], x + residual)
    h, weight, dy, dh = (t.double() for t in (x + residual, weight, dy, dh))
    truth = run(module.reference, h, torch.zeros_like(h), weight, dy, dh)
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)
    dx_scale = (rstd * weight * dy).abs() + dh.abs()
    scales = truth[0], h, dx_scale, dx_scale, (dy * h * rstd).abs().view(-1, x.shape[-1]).sum(0)
    for results in zip(ours, theirs, truth, NAMES, scales, strict=True):
        assert_as_close_as_torch(*results)


def inputs(shape, dtype, device, weight_dtype=None):
    x, residual = (2 * torch.randn(shape, device=device) + 0.3 for _ in range(2))
    weight = torch.randn(shape[-1], device=device) + 1
    return x.to(dtype), residual.to(dtype), weight.to(weight_dtype or dtype)


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 1), (7, 64), (2, 3, 100), (9, 576), (300, 12), (17,), (3, 3584), (2, 8192)], ids=str
)
def test_close_to_the_truth(shape, dtype, device):
    check(add_rms_norm, *inputs(shape, dtype, device))


@given(st.integers(1, 40), st.integers(1, 700), st.integers(0, 2**31), st.sampled_from([1e-3, 1, 100]))
def test_close_to_the_truth_at_any_shape(dtype, device, rows, N, seed, scale):
    torch.manual_seed(seed)
    x, residual, weight = inputs((rows, N), torch.float32, device)
    check(add_rms_norm, (x * scale).to(dtype), (residual * scale).to(dtype), weight.to(dtype))


@pytest.mark.parametrize("shape", [(9, rms_norm.MAX_BLOCK_N + 1), (1, rms_norm.MAX_N)])
def test_rows_longer_than_a_block(shape, dtype, device):
    check(add_rms_norm, *inputs(shape, dtype, device))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_weight_of_another_dtype(weight_dtype, dtype, device):
    check(add_rms_norm, *inputs((6, 200), dtype, device, weight_dtype))


LAYOUTS = {
    "left half": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]],
    "every other row": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2],
    "the same row": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.T.contiguous().T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    x, residual, weight = inputs((24, 48), dtype, device)
    check(add_rms_norm, LAYOUTS[layout](x), residual, weight)
    check(add_rms_norm, x, LAYOUTS[layout](residual), weight)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape, dtype, device):
    x, residual, weight = inputs(shape, dtype, device)
    *results, dweight = run(add_rms_norm, x, residual, weight, x, x)
    assert all(result.shape == shape for result in results) and dweight.eq(0).all()


@pytest.mark.parametrize("used", ["y", "h"])
def test_one_output_used(used, device):
    x, residual, weight = inputs((5, 40), torch.float32, device)
    gradients = []
    for norm in (add_rms_norm, module.reference):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        norm(*leaves, EPS)[used == "h"].square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, truth in zip(*gradients, strict=True):
        assert (ours is None) == (truth is None)
        if truth is not None:
            torch.testing.assert_close(ours, truth)


def test_gradients_do_not_share_what_is_added_to(device):
    """dx and dresidual are one tensor inside; what accumulates into one must not reach the other."""
    x, residual, weight = inputs((5, 40), torch.float32, device)
    x.requires_grad_()
    residual.requires_grad_()
    for _ in range(2):
        y, h = add_rms_norm(x, residual, weight, EPS)
        (y + h).sum().backward()
    assert torch.equal(x.grad, residual.grad)
    x.grad.zero_()
    assert residual.grad.abs().sum() > 0


def test_reference_gradients():
    x, residual = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module.reference, (x, residual, weight))


def test_saves_h_and_one_number_a_row(device):
    x, residual, weight = inputs((5, 40), torch.float32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, h = add_rms_norm(x.requires_grad_(), residual, weight)
    new = [t for t in saved if t.data_ptr() not in (h.data_ptr(), weight.data_ptr())]
    assert [(t.shape, t.dtype) for t in new] == [((5,), torch.float32)]


def test_no_second_derivative(device):
    x, residual, weight = inputs((2, 8), torch.float32, device)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(add_rms_norm(x, residual, weight)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_autocast_changes_nothing(dtype, device):
    x, residual, weight = inputs((4, 96), dtype, device)
    plain = run(add_rms_norm, x, residual, weight, x, residual)
    with torch.autocast(device, torch.bfloat16):
        cast = run(add_rms_norm, x, residual, weight, x, residual)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_same_bits_every_time(dtype, device):
    x, residual, weight = inputs((700, 24), dtype, device)  # more row tiles than programs
    first, second = (run(add_rms_norm, x, residual, weight, x, residual) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("h_over", ["x", "residual"])
def test_outputs_may_overwrite_inputs(h_over, dtype, device):
    x, residual, weight = inputs((50, 100), dtype, device)
    y, h, dh, rstd = *(torch.empty_like(x) for _ in range(3)), torch.empty(50, device=device)
    module.launch_forward(x, residual, weight, EPS, y, h, rstd)
    own_x, own_residual = x.clone(), residual.clone()
    own_h, own_y = (own_x, own_residual) if h_over == "x" else (own_residual, own_x)
    module.launch_forward(own_x, own_residual, weight, EPS, own_y, own_h, torch.empty_like(rstd))
    assert torch.equal(own_h, h) and torch.equal(own_y, y)

    dy, dresidual = torch.randn_like(x), torch.randn_like(x)
    dweight = module.launch_backward(dy, dresidual, h, weight, rstd, dh, True)
    for over in (0, 1):
        grads = dy.clone(), dresidual.clone()
        assert torch.equal(dweight, module.launch_backward(*grads, h, weight, rstd, grads[over], True))
        assert torch.equal(dh, grads[over])


def test_offsets_past_2_to_the_31(device):
    stride, rows, N = 2**30, 3, 8
    memory = torch.UntypedStorage((stride * (rows - 1) + 2 * N) * 2, device=device)  # 4 GiB of addresses, few touched
    both = torch.empty(0, dtype=torch.float16, device=device).set_(memory, 0, (rows, 2 * N), (stride, 1))
    x, residual, weight = inputs((rows, N), torch.float16, device)
    both.copy_(torch.cat([x, residual], -1))
    far, near = (run(add_rms_norm, *t, weight, x, x) for t in (both.chunk(2, -1), (x, residual)))
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, r, w: (x.long(), r, w), "x has dtype torch.int64"),
        (lambda x, r, w: (x, r.half(), w), "residual has dtype torch.float16 but x has torch.float32"),
        (lambda x, r, w: (x, r[:1], w), r"residual has shape \(1, 8\) but x has \(2, 8\)"),
        (lambda x, r, w: (x, None, w), "residual is a NoneType"),
        (lambda x, r, w: (x, r, w[1:]), r"weight has shape \(7,\); x's rows need \(8,\)"),
        (lambda x, r, w: (x[:, :0], r[:, :0], w[:0]), "rows of 1 to 65536"),
        (lambda x, r, w: (x, r.to("meta"), w), "residual is on meta but x is on"),
        (lambda x, r, w: (x.to("meta"), r.to("meta"), w.to("meta")), "x is on device meta; move it"),
    ],
)
def test_clear_errors(wrong, message, device):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        add_rms_norm(*wrong(*inputs((2, 8), torch.float32, device)))
    assert str(caught.value).startswith("add_rms_norm: ") and "\n" not in str(caught.value)


WRONG = {
    "norm of x alone": lambda x, r, w, eps: (rms_norm.reference(x, w, eps), x + r),
    "norm of the unrounded sum": lambda x, r, w, eps: (
        rms_norm.reference(x.float() + r.float(), w, eps).to(x.dtype), x + r
    ),
    "h is no output of autograd": lambda x, r, w, eps: (
        module.reference(x, r, w, eps)[0], (x + r).detach() + 0 * (x + r)
    ),
    "residual's gradient lost": lambda x, r, w, eps: module.reference(x, r.detach() + 0 * r, w, eps),
    "h off by a bit": lambda x, r, w, eps: (module.reference(x, r, w, eps)[0], (x + r) * (1 + 2**-9)),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_caught(wrong):
    x, residual, weight = inputs((60, 100), torch.float16, "cpu")
    check(module.reference, x, residual, weight)
    with pytest.raises(AssertionError):
        check(WRONG[wrong], x, residual, weight)


def launches(M, N, dtype):
    """The forward, and the backward without and with dweight."""
    x, weight, rstd = torch.empty(M, N, dtype=dtype), torch.empty(N, dtype=dtype), torch.empty(M)
    module.launch_forward(x, x, weight, EPS, torch.empty_like(x), torch.empty_like(x), rstd)
    for weight_grad in (False, True):
        module.launch_backward(x, x, x, weight, rstd, torch.empty_like(x), weight_grad)


@pytest.mark.parametrize("arch", ["sm_75", "sm_89", "sm_90", "gfx942"])
@pytest.mark.parametrize("N", [576, 8192])
def test_compiled_code(N, arch):
    """Nothing spilled, shared memory to spare and 128-bit accesses, at the hidden sizes of real models."""
    made = compile_all(lambda: launches(64, N, torch.float16), arch)
    narrow = [2, 2, 6] if arch == "gfx942" else [1, 1, 3]  # as in test_rms_norm
    assert not [fault for compiled, allowed in zip(made, narrow, strict=True) for fault in faults(compiled, allowed)]


@pytest.mark.parametrize(
    ("N", "dtype"), [(rms_norm.MAX_N, torch.float16), (8192, torch.float32), (4096, torch.bfloat16)], ids=str
)
def test_compiled_code_of_long_rows_and_other_dtypes(N, dtype):
    for arch in ("sm_86", "sm_90"):
        made = compile_all(lambda: launches(64, N, dtype), arch)
        assert not [fault for c, narrow in zip(made, [1, 1, 3], strict=True) for fault in faults(c, narrow)]


def test_moves_what_it_declares():
    """Fully coalesced, nothing read twice: bytes moved are the cost's, but for weight, which every program reads."""
    M, N = 32, 4096
    x, residual, y, h, dh = (torch.empty(M, N, dtype=torch.float16) for _ in range(5))
    weight, rstd = torch.empty(N, dtype=torch.float16), torch.empty(M)

    def launch():
        module.launch_forward(x, residual, weight, EPS, y, h, rstd)
        module.launch_backward(y, residual, h, weight, rstd, dh, False)

    for trace, cost in zip(trace_launches(launch, arch="sm_90"), module.cost(M, N, torch.float16), strict=True):
        moved = sum(a.bytes_moved for a in trace.accesses if not a.unknown and a.argument != "weight_ptr")
        assert abs(moved - (cost.bytes_moved - weight.nbytes)) <= 0.02 * cost.bytes_moved


@pytest.mark.gpu
def test_under_torch_compile_and_in_a_graph(device):
    x, residual, weight = inputs((64, 576), torch.bfloat16, device)
    check(torch.compile(add_rms_norm, fullgraph=True), x, residual, weight)
    plain = add_rms_norm(x, residual, weight, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, h = add_rms_norm(x, residual, weight, EPS)
    graph.replay()
    assert torch.equal(y, plain[0]) and torch.equal(h, plain[1])
