"""sm_90's own attention forward: whom it takes, the order of its tiles and its machine code anywhere, its numbers on a
GPU."""

import math
from collections import Counter
from types import FunctionType, SimpleNamespace

import pytest
import torch
from attention_case import check, check_draws
from compiled import compile_all, needs_hopper, pretended

from fastkit.kernels import attention as module
from fastkit.kernels import attention_forward, attention_hopper, attention_parts
from fastkit.lab.launches import catch
from fastkit.lab.portability import misfit
from fastkit.models import attend, pieces
from fastkit.ops import attention

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")


@pytest.fixture
def on_hopper(monkeypatch):
    """As if there were such a GPU."""
    pretended(monkeypatch, attention_hopper, attention_forward)("sm_90")


def tensors(B=2, H=4, H_k=2, T_q=256, T_k=256, D=128, dtype=torch.bfloat16, device="meta"):
    """q, k, v, o and lse; in memory heads lie within rows."""
    q, o = (torch.empty(B, T_q, H, D, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
    k, v = (torch.empty(B, T_k, H_k, D, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
    return q, k, v, o, torch.empty(B, H, T_q, device=device)


OPTIONS = {"causal": True, "window": None, "scale": 0.1}


@pytest.mark.parametrize(
    ("sizes", "options", "taken"),
    [
        ({}, {}, True),
        ({"D": 64, "dtype": torch.float16, "T_q": 1, "T_k": 77}, {"causal": False}, True),
        ({"D": 80}, {}, False),
        ({}, {"window": 100}, False),
        ({}, {"TMA": False}, False),
        ({}, {"BLOCK_N": 64}, False),
    ],
    ids=str,
)
def test_whom_it_takes(sizes, options, taken, on_hopper):
    caught = catch(lambda: attention_forward.launch_forward(*tensors(**sizes), **OPTIONS | options))
    assert [launch.name for launch in caught] == ["_hopper_kernel" if taken else "_forward_kernel"]


def test_what_the_copy_engine_cannot_read_is_not_taken(on_hopper):
    q, k, v, o, lse = tensors()
    for index, x in enumerate((q, k, v, o)):
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)  # 2 bytes beyond a multiple of 16
        given = [*(torch.empty_like(x, device="cpu") for x in (q, k, v, o)), torch.empty(lse.shape)]
        given[index] = shifted
        (launch,) = catch(lambda given=given: attention_forward.launch_forward(*given, **OPTIONS))
        assert launch.name == "_forward_kernel"


def in_python(kernel, program=0, programs=1):
    """A kernel's scalar function as Python's own."""
    gl = SimpleNamespace(
        minimum=min, maximum=max, where=lambda condition, a, b: a if condition else b,
        program_id=lambda axis: program, num_programs=lambda axis: programs,
    )  # fmt: skip
    names = {"gl": gl}
    for name in ("index_of",):
        names[name] = FunctionType(getattr(attention_parts, name).fn.__code__, names)
    return FunctionType(kernel.fn.__code__, names)


@pytest.mark.parametrize(
    ("B", "H", "H_k", "T_q", "T_k", "section"),
    [(4, 32, 8, 2048, 2048, 16), (2, 6, 2, 300, 500, 1), (1, 3, 3, 500, 300, 3)],
)
def test_every_tile_is_visited_once_and_programs_have_as_much_to_do(B, H, H_k, T_q, T_k, section):
    plan = SimpleNamespace(GROUP=H // H_k, CAUSAL=True, BLOCK_M=128, BLOCK_N=128)
    blocks, sizes = -(-T_q // 128), (section, B * H_k // section, T_q, T_k)
    tiles, programs, visited, work = B * H * blocks, 132, Counter(), Counter()
    for program in range(programs):
        index_of = in_python(attention_parts.index_of, program, programs)
        for turn in range(in_python(attention_parts.turns_of, program, programs)(tiles)):
            head, row, n = in_python(attention_parts.tile_of)(index_of(turn), sizes, plan)
            visited[head, row] += 1
            work[program] += n
            seen = min(max(row + 128 + T_k - T_q, 1), T_k)
            assert n == -(-seen // 128)
    assert set(visited.values()) == {1} and set(visited) == {(h, 128 * b) for h in range(B * H) for b in range(blocks)}
    assert max(work.values()) <= 1.04 * sum(work.values()) / programs + -(-T_k // 128)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", [64, 128])
def test_compiled_code(D, causal, on_hopper):
    options = OPTIONS | {"causal": causal}
    (made,) = compile_all(lambda: attention_forward.launch_forward(*tensors(D=D, device="cpu"), **options), "sm_90")
    found = made.instructions
    assert made.kernel == "_hopper_kernel" and not misfit(made) and made.spilled_bytes == 0
    assert found["WGMMA"] and found["TMA load"] and found["TMA store"] and not found["cp.async.128"]
    # of each warp group's last loop: the softmax between the waits for the scores and for p v
    waits = [part.split("wgmma.wait_group.sync.aligned 0")[0] for part in made.code.split("wait_group.sync.aligned 1")]
    assert [part.count("ex2.approx") for part in waits[1:]] == [66, 66]


SHAPES = [
    # B, H, H_k, T_q, T_k, D, causal
    (2, 4, 2, 256, 256, 128, True),
    (1, 3, 1, 333, 467, 128, True),
    (1, 2, 2, 467, 333, 64, True),
    (2, 2, 1, 300, 1000, 128, False),
    (1, 2, 1, 7, 130, 64, True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("programs", [3, 132])
def test_close_to_the_truth(shape, dtype, programs, device, monkeypatch):
    needs_hopper()
    monkeypatch.setattr(attention_hopper, "sm_count", lambda device: programs)
    B, H, H_k, T_q, T_k, D, causal = shape
    sizes, draws = ((T_q, H), (T_k, H_k), (T_k, H_k)), []
    for _ in range(16):
        draws.append([torch.randn(B, T, heads, D, dtype=dtype, device=device).transpose(1, 2) for T, heads in sizes])
    check_draws(attention, draws, causal)
    q, k, v = draws[0]
    o, lse = torch.empty_like(q), torch.empty(B, H, T_q, device=device)
    (caught,) = catch(lambda: attention_forward.launch_forward(q, k, v, o, lse, **OPTIONS | {"causal": causal}))
    assert caught.name == "_hopper_kernel"
    attention_forward.launch_forward(q, k, v, o, lse, **OPTIONS | {"causal": causal})
    s = q.double() @ k.double().repeat_interleave(H // H_k, 1).mT * OPTIONS["scale"]
    if causal:
        s = s.masked_fill(~module.seen_pairs(T_q, T_k, True, None, device), -math.inf)
    torch.testing.assert_close(lse, s.logsumexp(-1).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_same_bits_every_time(device):
    needs_hopper()
    q, k, v, o, lse = tensors(4, 32, 8, 2048, 2048, device=device)
    for x in (q, k, v):
        x.normal_()
    attention_forward.launch_forward(q, k, v, o, lse, **OPTIONS)
    for _ in range(50):
        again, again_lse = torch.empty_like(o), torch.empty_like(lse)
        attention_forward.launch_forward(q, k, v, again, again_lse, **OPTIONS)
        assert torch.equal(again, o) and torch.equal(again_lse, lse)


class Paired(torch.autograd.Function):
    """A half's attention, as it attends and differentiates, by itself."""

    @staticmethod
    def forward(ctx, q, k, v, causal):
        attended = attend.attend(q, k, v, attend.Attend(q.shape[-1] ** -0.5))
        ctx.found = q, k, v, attended
        return attended.o

    @staticmethod
    def backward(ctx, do):
        q, k, v, attended = ctx.found
        grads, do = [torch.empty_like(x) for x in (q, k, v)], do.transpose(1, 2).contiguous().transpose(1, 2)
        attend.attend_backward(do, q, k, v, attended, attend.Attend(q.shape[-1] ** -0.5), *grads, (None, None))
        return *grads, None


def not_turned(dq, dk, cos, sin, into, v, inverse):
    for to, x in zip(into, (dq, dk, v), strict=True):
        if x is not None:  # else it is copied by whoever asks
            to.copy_(x)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("ours", [True, False], ids=["our forward", "its forward"])
def test_cudnn_differentiates_what_was_computed(D, ours, monkeypatch):
    """Its backward reads o and lse, whoever wrote them."""
    q, k, v = (torch.randn(2, 1024, h, D, device="cuda").bfloat16().transpose(1, 2) for h in (4, 2, 2))
    if attention_forward.architecture(q.device) != "sm_90":
        pytest.skip("our forward is for sm_90")
    monkeypatch.setattr(attend, "_backend", lambda *args: "cudnn")
    monkeypatch.setattr(attend, "_faster_than_cudnn", lambda *args: ours)
    monkeypatch.setattr(attend, "_in_place_of_cudnn", lambda *args, **options: False)
    monkeypatch.setattr(pieces, "rotate_", not_turned)
    check(Paired.apply, q, k, v, True)
