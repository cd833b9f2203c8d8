import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compiled import compile_all, faults
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch

from fastkit.kernels import common
from fastkit.kernels import rms_norm as module
from fastkit.ops import rms_norm

EPS = 1e-5
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")


def run(norm, x, weight, dy):
    """(y, dx, dweight) of one forward and backward through `norm`."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = norm(x, weight, EPS)
    y.backward(dy.to(y.dtype))
    return y, x.grad, weight.grad


def torch_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def hugging_face_norm(x, weight, eps):
    """LlamaRMSNorm.forward, transformers 5."""
    x_hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return weight * x_hat.to(x.dtype)


def check(norm, x, weight):
    """Assert that y, dx and dweight of `norm` are as close to the truth as those of torch."""
    dy = torch.randn(x.shape, device=x.device).to(x.dtype)
    ours, theirs = run(norm, x, weight, dy), run(torch_norm, x, weight, dy)
    x, weight, dy = x.double(), weight.double(), dy.double()
    truth = run(module.reference, x, weight, dy)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    scales = truth[0], rstd * weight * dy, (dy * x * rstd).abs().view(-1, x.shape[-1]).sum(0)
    for results in zip(ours, theirs, truth, ("y", "dx", "dweight"), scales, strict=True):
        assert_as_close_as_torch(*results)


def inputs(shape, dtype, device, weight_dtype=None):
    x = 3 * torch.randn(shape, device=device) + 0.5
    weight = torch.randn(shape[-1], device=device) + 1
    return x.to(dtype), weight.to(weight_dtype or dtype)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (5, 1), (1, 33), (7, 64), (2, 3, 100), (9, 576), (300, 12), (2, 2, 3, 8), (17,), (3, 4096), (2, 8192)],
    ids=str,
)
def test_close_to_the_truth(shape, dtype, device):
    check(rms_norm, *inputs(shape, dtype, device))


@given(st.integers(1, 70), st.integers(1, 700), st.integers(0, 2**31), st.sampled_from([1e-3, 1, 100]))
def test_close_to_the_truth_at_any_shape(dtype, device, rows, N, seed, scale):
    torch.manual_seed(seed)
    x, weight = inputs((rows, N), torch.float32, device)
    check(rms_norm, (x * scale).to(dtype), weight.to(dtype))


@pytest.mark.parametrize("shape", [(9, module.MAX_BLOCK_N + 1), (2, 3 * module.MAX_BLOCK_N - 5), (1, module.MAX_N)])
def test_rows_longer_than_a_block(shape, dtype, device):
    check(rms_norm, *inputs(shape, dtype, device))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_weight_of_another_dtype(weight_dtype, dtype, device):
    check(rms_norm, *inputs((6, 200), dtype, device, weight_dtype))


IN_PLACE = {  # read where they lie
    "left half": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]],
    "unaligned": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "every other row": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2],
    "the same row": lambda x: x[:1].expand(x.shape),
}
COPIED = {
    "transposed": lambda x: x.T.contiguous().T,
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "the same column": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", IN_PLACE | COPIED)
def test_layouts(layout, dtype, device):
    x, weight = inputs((24, 48), dtype, device)
    x = (IN_PLACE | COPIED)[layout](x)
    assert (common.as_rows(x).data_ptr() == x.data_ptr()) == (layout in IN_PLACE)
    check(rms_norm, x, weight.repeat_interleave(2)[::2])


def test_slices_of_a_batch_are_not_copied():
    left, right = torch.empty(2, 3, 16).chunk(2, -1)
    for half in (left, right):
        rows = common.as_rows(half)
        assert rows.data_ptr() == half.data_ptr() and rows.shape == (6, 8) and rows.stride() == (16, 1)


def test_expanded_gradient(device):
    x, weight = inputs((4, 10), torch.float32, device)
    x.requires_grad_()
    rms_norm(x, weight).sum().backward()
    (dx,) = torch.autograd.grad(module.reference(x, weight).sum(), x)
    torch.testing.assert_close(x.grad, dx)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape, dtype, device):
    x, weight = inputs(shape, dtype, device)
    y, dx, dweight = run(rms_norm, x, weight, x)
    assert y.shape == dx.shape == shape
    assert dweight.eq(0).all() and dweight.shape == (8,)


def test_squares_past_the_range_of_fp16(device):
    x = torch.full((2, 512), 1e4, dtype=torch.float16, device=device)
    x[1, ::2] *= -1
    weight = torch.ones(512, dtype=torch.float16, device=device)
    torch.testing.assert_close(rms_norm(x, weight), x.sign(), rtol=0, atol=0)


def test_within_a_rounding_of_hugging_face(dtype, device):
    x, weight = inputs((20, 300), dtype, device)
    ours, theirs = rms_norm(x, weight, EPS).float(), hugging_face_norm(x, weight, EPS).float()
    # half a unit in the last place for each rounding, ours and their two, and some of fp32 for rstd; the last place of
    # the subnormal numbers (below 6.1e-5 in fp16) is a constant
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=1.6 * torch.finfo(dtype).eps + 5e-7, atol=1.6 * subnormal)


def test_reference_gradients():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module.reference, (x, weight))


def test_frozen_weight_costs_nothing(device, monkeypatch):
    x, weight = inputs((5, 40), torch.float32, device)
    kernel, seen = module._backward_kernel, []

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: (seen.append(args), kernel[grid](*args, **kwargs))

    monkeypatch.setattr(module, "_backward_kernel", Spy())
    x.requires_grad_()
    rms_norm(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None
    assert seen[0][1] is seen[0][5] is seen[0][7] is None  # factor_ptr, dresidual_ptr, dweight_partial_ptr


def test_frozen_input(device):
    x, weight = inputs((5, 40), torch.float32, device)
    weight.requires_grad_()
    rms_norm(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, run(module.reference, x, weight, torch.ones_like(x))[2])


def test_saves_its_inputs_and_one_number_a_row(device):
    x, weight = inputs((5, 40), torch.float32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x.requires_grad_(), weight)
    new = [t for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [(t.shape, t.dtype) for t in new] == [((5,), torch.float32)]


def test_no_second_derivative(device):
    x, weight = inputs((2, 8), torch.float32, device)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_autocast_changes_nothing(dtype, device):
    x, weight = inputs((4, 96), dtype, device)
    plain = run(rms_norm, x, weight, x)
    with torch.autocast(device, torch.bfloat16):
        cast = run(rms_norm, x, weight, x)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_same_bits_every_time(dtype, device):
    x, weight = inputs((700, 24), dtype, device)  # more row tiles than programs
    first, second = (run(rms_norm, x, weight, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dx_may_overwrite_dy(dtype, device):
    x, weight = inputs((50, 100), dtype, device)
    dy, dx, rstd = torch.randn_like(x), torch.empty_like(x), torch.empty(50, device=device)
    module.launch_forward(x, weight, EPS, dx, rstd)
    dweight = module.launch_backward(dy, x, weight, rstd, dx, True)
    in_place = dy.clone()
    assert torch.equal(dweight, module.launch_backward(in_place, x, weight, rstd, in_place, True))
    assert torch.equal(dx, in_place)


@pytest.mark.parametrize("N", [300, module.MAX_BLOCK_N + 100])
def test_rows_yet_to_be_multiplied(N, device):
    dy, x, weight = (torch.randn(*shape, device=device) for shape in ((5, N), (5, N), (N,)))
    factor, rstd = torch.tensor([0.5, 1, 2, 4, 8], device=device), torch.rand(5, device=device)
    found = [torch.empty_like(x) for _ in range(2)]
    sums = [
        module.launch_backward(dy, x, weight, rstd, found[0], True, factor=factor),
        module.launch_backward(dy * factor[:, None], x, weight, rstd, found[1], True),
    ]
    assert torch.equal(*found) and torch.equal(*sums)  # by powers of two: not a bit differs


def test_offsets_past_2_to_the_31(device):
    stride, rows, N = 2**30, 3, 8
    memory = torch.UntypedStorage((stride * (rows - 1) + N) * 2, device=device)  # 4 GiB of addresses, few touched
    x = torch.empty(0, dtype=torch.float16, device=device).set_(memory, 0, (rows, N), (stride, 1))
    dense, weight = inputs((rows, N), torch.float16, device)
    x.copy_(dense)
    for ours, theirs in zip(run(rms_norm, x, weight, dense), run(rms_norm, dense, weight, dense), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, w: (x.long(), w), "x has dtype torch.int64"),
        (lambda x, w: (x.double(), w.double()), "x has dtype torch.float64"),
        (lambda x, w: (x, w.double()), "weight has dtype torch.float64"),
        (lambda x, w: ([1.0], w), "x is a list"),
        (lambda x, w: (x, None), "weight is a NoneType"),
        (lambda x, w: (x, w[1:]), r"weight has shape \(7,\); x's rows need \(8,\)"),
        (lambda x, w: (x, w[None]), r"weight has shape \(1, 8\)"),
        (lambda x, w: (x.sum(), w), r"x has shape \(\)"),
        (lambda x, w: (x[:, :0], w[:0]), "rows of 1 to 65536"),
        (lambda x, w: (x[:, :1].expand(2, 65537), w[:1].expand(65537)), "use torch.nn.functional.rms_norm"),
        (lambda x, w: (x, w.to("meta")), "weight is on meta but x is on"),
        (lambda x, w: (x.to("meta"), w.to("meta")), "x is on device meta; move it"),
    ],
)
def test_clear_errors(wrong, message, device):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        rms_norm(*wrong(*inputs((2, 8), torch.float32, device)))
    assert str(caught.value).startswith("rms_norm: ") and "\n" not in str(caught.value)


def _x_hat(x, eps):
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def _truncate(y):
    """fp32 to fp16 by cutting bits off, as the interpreter does for bfloat16."""
    return (y.detach().view(torch.int32) >> 13 << 13).view(torch.float32).half() + 0 * y.half()


WRONG = {
    "eps forgotten": lambda x, w, eps: module.reference(x, w, 0.0),
    "eps outside the root": lambda x, w, eps: (x.float() / (x.float().square().mean(-1, True).sqrt() + eps) * w).half(),
    "mean over the block, not the row": lambda x, w, eps: (_x_hat(x, eps) * (128 / 100) ** 0.5 * w).half(),
    "mean subtracted": lambda x, w, eps: module.reference(x - x.mean(-1, keepdim=True), w, eps),
    "weight counted from 1": lambda x, w, eps: module.reference(x, w + 1, eps),
    "rounded twice": hugging_face_norm,
    "truncated": lambda x, w, eps: _truncate(_x_hat(x, eps) * w),
    "rstd taken for a constant": lambda x, w, eps: (x * (_x_hat(x, eps) / x.float()).detach() * w).half(),
    "a column unwritten": lambda x, w, eps: module.reference(x, w, eps).index_fill(-1, torch.tensor([99]), torch.nan),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_caught(wrong):
    x, weight = inputs((60, 100), torch.float16, "cpu")
    x[0] *= 1e-3  # where eps matters
    check(module.reference, x, weight)
    with pytest.raises(AssertionError, match=r"error|not finite"):
        check(WRONG[wrong], x, weight)


def test_cost():
    forward, backward = module.cost(8, 1024, torch.bfloat16)
    assert forward.bytes_moved == 2 * 8 * 1024 * 2 + 1024 * 2 + 8 * 4
    assert backward.bytes_moved == 3 * 8 * 1024 * 2 + 1024 * 2 + 8 * 4
    trained = module.cost(8, 1024, torch.bfloat16, weight_grad=True)[1]
    assert trained.bytes_moved - backward.bytes_moved == 1024 * 2 and trained.flops > backward.flops > forward.flops


def launches(M, N, dtype):
    """The forward, and the backward without and with dweight."""
    x, weight, rstd = torch.empty(M, N, dtype=dtype), torch.empty(N, dtype=dtype), torch.empty(M)
    module.launch_forward(x, weight, EPS, torch.empty_like(x), rstd)
    module.launch_backward(x, x, weight, rstd, torch.empty_like(x), weight_grad=False)
    module.launch_backward(x, x, weight, rstd, torch.empty_like(x), weight_grad=True)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_89", "sm_90", "gfx942"])
@pytest.mark.parametrize("N", [576, 4096, 8192])
def test_compiled_code(N, arch):
    """Nothing spilled, shared memory to spare and 128-bit accesses, at the hidden sizes of real models."""
    made = compile_all(lambda: launches(64, N, torch.float16), arch)
    assert len(made) == 3
    # the narrow access is rstd's, with dweight one for each of up to three tiles under way; a gfx942 wave has 64 lanes,
    # too many to give each 128 bits of a weight of 576, which makes two
    narrow = [2, 2, 6] if arch == "gfx942" else [1, 1, 3]
    assert not [fault for compiled, allowed in zip(made, narrow, strict=True) for fault in faults(compiled, allowed)]


@pytest.mark.parametrize(
    ("N", "dtype"), [(module.MAX_N, torch.float16), (4096, torch.float32), (4096, torch.bfloat16)], ids=str
)
def test_compiled_code_of_long_rows_and_other_dtypes(N, dtype):
    made = compile_all(lambda: launches(64, N, dtype), "sm_90")
    assert not [fault for compiled, narrow in zip(made, [1, 1, 3], strict=True) for fault in faults(compiled, narrow)]


def test_one_number_compiles():
    """Triton makes constants of arguments that are 1."""
    assert len(compile_all(lambda: launches(1, 1, torch.bfloat16), "sm_90")) == 3


@pytest.mark.gpu
def test_under_torch_compile_and_in_a_graph(device):
    x, weight = inputs((64, 576), torch.bfloat16, device)
    check(torch.compile(rms_norm, fullgraph=True), x, weight)  # not the same bits: it fuses what the kernel keeps apart
    plain = rms_norm(x, weight, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rms_norm(x, weight, EPS)
    graph.replay()
    assert torch.equal(y, plain)


# What all kernels share, in kernels/common.py


@pytest.mark.parametrize("kernel_device", ["cuda:0", "xpu:0"])
def test_devices_without_kernels(kernel_device, monkeypatch):
    monkeypatch.setattr(common, "TRITON_MISSING", "No module named 'triton'")
    x = SimpleNamespace(device=torch.device(kernel_device), dtype=torch.float32)
    with pytest.raises(
        NotImplementedError, match=rf"op: x is on .*{kernel_device}.*(pip install triton|move it to cuda)"
    ):
        common.on_triton("op", "x", x)


def test_bfloat16_on_the_cpu_is_rounded_not_truncated():
    x, weight = inputs((40, 64), torch.bfloat16, "cpu")
    assert not common.on_triton("rms_norm", "x", x)
    check(rms_norm, x, weight)


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_without_triton_the_references_run():
    child = python(
        "import sys, torch; sys.modules['triton'] = None\n"
        "from fastkit.ops import rms_norm, swiglu\n"
        "x = torch.ones(2, 4, requires_grad=True)\n"
        "(rms_norm(x, x[0]) + swiglu(x, x)).sum().backward(); print(x.grad.shape)"
    )
    assert child.stdout == "torch.Size([2, 4])\n", child.stderr


def test_interpreter_asked_for_too_late():
    child = python(
        "import os; os.environ.pop('TRITON_INTERPRET', None); import triton\n"
        "os.environ['TRITON_INTERPRET'] = '1'; import fastkit.ops"
    )
    assert "restart Python and set it first" in child.stderr.splitlines()[-1]
