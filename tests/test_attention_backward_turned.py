"""sm_90's own attention backward in its places: whose it is, dq turned back as it is rounded, a half of a layer."""

import pytest
import torch
from attention_backward_case import SHAPES, simulated, tensors
from compiled import compile_all, faults, needs_hopper, pretended

from fastkit.kernels import attention, attention_backward, attention_backward_ends, attention_backward_hopper, rope
from fastkit.kernels.attention_forward import launch_forward
from fastkit.kernels.common import INTERPRETED
from fastkit.lab.compiling import ARCHITECTURES
from fastkit.lab.launches import catch
from fastkit.lab.portability import misfit
from fastkit.models import attend, pieces

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")

TABLES = ["[T, D]", "[1, T, D]", "[B, T, D]"]


def table(B, T, D, shape, dtype=torch.float32, device="cpu"):
    """cos and sin, in one of TABLES."""
    half = torch.rand({"[T, D]": (T, D // 2), "[1, T, D]": (1, T, D // 2), "[B, T, D]": (B, T, D // 2)}[shape])
    angles = torch.cat([6.28 * half] * 2, -1).to(device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def check_turned(given, grads, causal, cos, sin):
    """dq turned back on its way has the bits of rope's, given the unrounded sums."""
    call = {"causal": causal, "scale": given[1].shape[3] ** -0.5, "deterministic": True}
    sums = torch.full_like(grads[0], torch.nan, dtype=torch.float32)
    attention_backward_hopper.launch(*given, sums, *(torch.empty_like(x) for x in grads[1:]), **call)
    expected = torch.full_like(grads[0], torch.nan)
    rope.launch(sums, sums[:, :0], cos, sin, expected, expected[:, :0], inverse=True)
    attention_backward_hopper.launch(*given, *grads, **call, cos=cos, sin=sin)
    assert torch.equal(grads[0], expected) and not any(x.isnan().any() for x in grads)


def turned_case(B, H, H_k, T_q, T_k, D, causal, dtype, device):
    do, q, k, v, o, lse, *grads = tensors(B, H, H_k, T_q, T_k, D, dtype, device)
    for x in (do, q, k, v):
        x.normal_()
    for x in grads:
        x.fill_(torch.nan)
    launch_forward(q, k, v, o, lse, causal=causal, window=None, scale=D**-0.5)
    return (do, q, k, v, o, lse), grads


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter for the kernels before and after")
@pytest.mark.parametrize(
    ("shape", "of_table"),
    [((2, 2, 2, 77, 200, 128, True), "[B, T, D]"), ((1, 4, 1, 200, 77, 64, True), "[T, D]"),
     ((1, 3, 1, 1, 131, 64, False), "[1, T, D]")],
    ids=str,
)  # fmt: skip
def test_turned_in_python(shape, of_table, monkeypatch):
    simulated(monkeypatch, 3)
    given, grads = turned_case(*shape, torch.float16, "cpu")
    check_turned(given, grads, shape[-1], *table(shape[0], shape[3], shape[5], of_table))


def check_half(backend, B, H, H_k, T, D, dtype, device):
    """The gradients that a layer's half has of q, k and v side by side, turned back, beside float64's."""
    qkv = torch.randn(B, T, (H + 2 * H_k) * D, device=device).to(dtype)
    do = torch.randn(B, T, H, D, device=device).to(dtype).transpose(1, 2)

    def heads(x):
        return [part.unflatten(2, (-1, D)).transpose(1, 2) for part in x.split([H * D, H_k * D, H_k * D], 2)]

    options, turns = attend.Attend(D**-0.5), table(B, T, D, "[1, T, D]", device=device)
    attended = attend.attend(*heads(qkv), options)._replace(backend=backend)
    dqkv = torch.full_like(qkv, torch.nan)
    attend.attend_backward(do, *heads(qkv), attended, options, *heads(dqkv), turns)
    exact = [x.detach().double().requires_grad_() for x in heads(qkv)]
    dq, dk, dv = torch.autograd.grad(attention.reference(*exact), exact, do.double())
    grads = *rope.reference(dq, dk, turns[0].double(), -turns[1].double()), dv
    for ours, truth in zip(heads(dqkv), grads, strict=True):
        assert (ours.double() - truth).norm() <= 10 * torch.finfo(dtype).eps / 8 * truth.norm()


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter for the kernels before and after")
@pytest.mark.parametrize("backend", ["ours", "cudnn"])
def test_a_half_in_python(backend, monkeypatch):
    """With torch asked for the same bits, as `poisoned` asks, also after a forward for cuDNN's backward."""
    simulated(monkeypatch, 3)
    pretended(monkeypatch, attention_backward_hopper, attention_backward)("sm_90")
    monkeypatch.setattr(attend, "_backend", lambda *args: "ours")
    launched, launch = [], attention_backward_hopper.launch
    monkeypatch.setattr(
        attention_backward_hopper, "launch", lambda *args, **options: launched.append(1) or launch(*args, **options)
    )
    check_half(backend, 1, 4, 2, 150, 64, torch.float16, "cpu")
    assert launched


def test_second_heads_may_be_none(device):
    """Keys' gradients, where those of queries are turned already."""
    dk = torch.randn(2, 9, 2, 32, device=device).half().transpose(1, 2)
    turns, found = table(2, 9, 32, "[1, T, D]", device=device), dk.clone()
    expected, _ = rope.reference(dk, dk[:, :0], turns[0], -turns[1])
    pieces.rotate_(found, found[:, :0], *turns, inverse=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def dispatched(monkeypatch, sizes, **options):
    """(names of what `launch_backward` launches on sm_90, what it returns)"""
    pretended(monkeypatch, attention_backward_hopper, attention_backward)("sm_90")
    told, call = [], {"causal": True, "window": None, "scale": 0.1} | options
    given = tensors(**{"device": "cpu"} | sizes)
    names = [each.name for each in catch(lambda: told.append(attention_backward.launch_backward(*given, **call)))]
    return names, told[0]


OWN = ["_backward_dq_kernel", "_backward_dk_dv_kernel"]


@pytest.mark.parametrize(
    ("sizes", "options", "own"),
    [({}, {}, False), ({"D": 64}, {"causal": False}, False), ({}, {"window": 64}, True), ({"D": 80}, {}, True),
     ({}, {"TMA": True}, True), ({}, {"dq_tiling": {}}, True), ({}, {"dk_dv_tiling": {"BLOCK_M": 32}}, True)],
    ids=str,
)  # fmt: skip
def test_whom_attention_hands_over(sizes, options, own, monkeypatch):
    names, turned = dispatched(monkeypatch, sizes, **options)
    assert not turned and names == (OWN if own else ["_prepare_kernel", "_backward_hopper_kernel", "_round_kernel"])


@pytest.mark.parametrize(("R", "D", "turned"), [(128, 128, True), (64, 128, False), (80, 80, False)])
def test_dq_is_turned_where_all_of_a_head_is(R, D, turned, monkeypatch):
    cos, sin = table(2, 256, R, "[1, T, D]")
    assert dispatched(monkeypatch, {"D": D}, cos=cos, sin=sin)[1] == turned


@pytest.mark.parametrize("asked", [True, False])
def test_one_order_where_torch_asks_for_it(asked, monkeypatch):
    torch.use_deterministic_algorithms(asked, warn_only=True)  # `poisoned` ends it
    told, launch = [], attention_backward_hopper.launch
    monkeypatch.setattr(
        attention_backward_hopper, "launch", lambda *args, **options: told.append(options) or launch(*args, **options)
    )
    dispatched(monkeypatch, {})
    assert [options["deterministic"] for options in told] == [asked]


@pytest.mark.parametrize(
    ("T", "arch", "in_fp8", "asked", "ours"),
    [(1024, "sm_90", False, False, True), (1023, "sm_90", False, False, False), (1024, "sm_90", True, False, False),
     (1024, "sm_100", False, False, False), (16, "sm_90", True, True, True), (16, "sm_89", False, True, True)],
)  # fmt: skip
def test_who_follows_a_forward_for_cudnn(T, arch, in_fp8, asked, ours, monkeypatch):
    pretended(monkeypatch, attention_backward_hopper, attend)(arch)
    torch.use_deterministic_algorithms(asked, warn_only=True)
    do, q, k, v, _, _, _, dk, dv = tensors(T_q=T, T_k=T)
    assert attend._in_place_of_cudnn(do, q, k, v, dk, dv, in_fp8) == ours


@pytest.mark.parametrize("heads", [32, 9])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("of_table", [None, torch.float32, torch.bfloat16])
def test_compiled_rounding(D, heads, of_table, monkeypatch):
    pretended(monkeypatch, attention_backward_hopper)("sm_90")
    cos, sin = (None, None) if of_table is None else table(2, 256, D, "[1, T, D]", of_table)
    call = {"causal": True, "scale": 0.1, "cos": cos, "sin": sin}
    given = tensors(H=heads, H_k=1, D=D, device="cpu")
    *_, made = compile_all(lambda: attention_backward_hopper.launch(*given, **call), "sm_90")
    narrow = 0 if of_table is None else 2  # the angles, which several heads share
    assert made.kernel == "_round_kernel" and faults(made, narrow) == [] and made.registers <= 96


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rounding_fits_every_architecture(arch):
    dtype = torch.float16 if arch == "sm_75" else torch.bfloat16
    for name, launch in attention_backward_ends.examples(dtype).items():
        (made,) = compile_all(launch, arch)
        assert not misfit(made) and made.spilled_bytes <= (0 if "round" in name else 8)


@pytest.mark.gpu
@pytest.mark.parametrize("of_table", TABLES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 9, 3, 1000, 1500, 64, True)], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_turned_close_to_the_truth(shape, of_table, dtypes, device):
    needs_hopper()
    B, *_, T_q, _, D, causal = shape
    given, grads = turned_case(*shape, dtypes[0], device)
    cos, sin = table(B, T_q, D, of_table, dtypes[1], device)
    check_turned(given, grads, causal, cos, sin)
    do, *exact = (x.double() for x in given[:4])
    exact = [x.requires_grad_() for x in exact]
    (dq,) = torch.autograd.grad(attention.reference(*exact, causal), exact[:1], do)
    truth, _ = rope.reference(dq, dq[:, :0], cos.double(), -sin.double())
    assert (grads[0].double() - truth).norm() <= 1e-2 * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("T", [1024, 333])
@pytest.mark.parametrize("backend", ["ours", "cudnn"])
@pytest.mark.parametrize("asked", [True, False], ids=["the same bits", "any order"])
def test_a_half_on_a_gpu(backend, T, D, asked, device, monkeypatch):
    needs_hopper()
    torch.use_deterministic_algorithms(asked, warn_only=True)
    monkeypatch.setattr(attend, "_backend", lambda *args: backend)
    check_half(backend, 2, 8, 2, T, D, torch.bfloat16, device)
