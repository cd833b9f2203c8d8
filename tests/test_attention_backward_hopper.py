"""sm_90's own attention backward: whom it takes, the order of its tiles, its kernel in Python and its machine code
anywhere, its numbers on a GPU."""

import re
import subprocess
import sys
from collections import Counter, defaultdict
from types import FunctionType, SimpleNamespace

import pytest
import torch
from attention_backward_case import SHAPES, simulated, tensors
from attention_case import check
from compiled import compile_all, needs_hopper, pretended

from fastkit.kernels import attention_backward, attention_backward_hopper, attention_backward_parts
from fastkit.kernels.attention_forward import launch_forward
from fastkit.kernels.common import INTERPRETED
from fastkit.lab.portability import misfit

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")


@pytest.mark.parametrize(
    ("arch", "sizes", "taken"),
    [("sm_90", {}, True), ("sm_90", {"D": 64, "dtype": torch.float16, "T_q": 1, "T_k": 77}, True),
     ("sm_90", {"D": 80}, False), ("sm_90", {"dtype": torch.float32}, False), ("sm_90", {"T_q": 0}, False),
     ("sm_90", {"B": 70000, "H": 1, "H_k": 1, "T_q": 1, "T_k": 1}, False), ("sm_100", {}, False)],
    ids=str,
)  # fmt: skip
def test_whom_it_takes(arch, sizes, taken, monkeypatch):
    monkeypatch.setattr(attention_backward_hopper, "GLUON_MISSING", "")
    do, q, k, v, _, _, _, dk, dv = tensors(**sizes)
    assert attention_backward_hopper.takes(arch, do, q, k, v, dk, dv) == taken


def test_what_the_copy_engine_cannot_reach_is_not_taken(monkeypatch):
    monkeypatch.setattr(attention_backward_hopper, "GLUON_MISSING", "")
    do, q, k, v, _, _, _, dk, dv = tensors(device="cpu")
    for index, x in enumerate(given := [do, q, k, v, dk, dv]):
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)  # 2 bytes beyond a multiple of 16
        assert attention_backward_hopper.takes("sm_90", *given)
        assert not attention_backward_hopper.takes("sm_90", *given[:index], shifted, *given[index + 1 :])


def in_python(kernel):
    """A kernel's scalar function as Python's own."""
    gl = SimpleNamespace(maximum=max, where=lambda condition, a, b: a if condition else b)
    return FunctionType(kernel.fn.__code__, {"gl": gl})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("B", "H", "H_k", "T_q", "T_k"),
    [(4, 32, 8, 2048, 2048), (2, 6, 2, 300, 500), (1, 3, 3, 500, 300), (1, 2, 1, 1, 77)],
)
def test_tiles(B, H, H_k, T_q, T_k, causal):
    """Each once; those that are waited for come before; blocks of queries are cut off where no key is seen."""
    plan = SimpleNamespace(CAUSAL=causal, BLOCK_M=64, BLOCK_N=128)
    blocks = -(-T_k // 128)
    section = attention_backward_parts.section_heads(B * H_k, blocks, 132)
    assert B * H_k % section == 0 and (section == 1 or section * blocks <= 132)
    visited, seen, place = Counter(), defaultdict(list), (section, T_q, T_k)
    for index in range(B * H_k * blocks):
        head, key = in_python(attention_backward_parts.tile_of)(index, place, plan)
        visited[head, key] += 1
        total, seeing = in_python(attention_backward_parts.steps_of)(key, place, plan)
        whole = in_python(attention_backward_parts.whole_steps)(key, place, plan)
        assert total == -(-T_q // 64) and whole <= seeing
        for block in range(total):
            last, first = min(64 * block + 63, T_q - 1) + T_k - T_q, 64 * block + T_k - T_q
            assert (block >= total - seeing) == (not causal or last // 64 * 64 >= key // 64 * 64 or last >= key)
            assert (block >= total - whole) == (key + 64 <= T_k and (not causal or first >= key + 63))
            if block >= total - seeing:
                assert seen[head, block] == list(range(key // 128)), "as many have added theirs as its turn says"
                seen[head, block].append(key // 128)
    assert set(visited.values()) == {1} and len(visited) == B * H_k * blocks


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, options=None):
        o, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)
        ctx.options = {"causal": causal, "scale": q.shape[3] ** -0.5}
        launch_forward(q, k, v, o, lse, window=None, **ctx.options)
        ctx.options |= options or {}
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        attention_backward_hopper.launch(do, q, k, v, o, lse, *grads, **ctx.options)
        return *grads, None, None


def inputs(B, H, H_k, T_q, T_k, D, dtype, device):
    q = torch.randn(B, T_q, H, D, dtype=dtype, device=device).transpose(1, 2)
    return q, *(torch.randn(B, T_k, H_k, D, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))


OPTIONS = [{}, {"deterministic": True}]


def attend(options):
    return lambda q, k, v, causal: Attention.apply(q, k, v, causal, options)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter for the kernels before and after")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("at_once", "options"), [(1, {}), (3, {}), (1, {"deterministic": True}), (132, {"deterministic": True})]
)
def test_kernel_in_python(shape, at_once, options, monkeypatch):
    """Simulated, nothing is read before it came or overwritten while it is read, no one waits for ever."""
    simulated(monkeypatch, at_once)
    *sizes, causal = shape
    check(attend(options), *inputs(*sizes, torch.float16, "cpu"), causal)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter for the kernels before and after")
def test_one_order_in_python(monkeypatch):
    """Programs at once, and one after the other: the same bits, if asked for."""
    do, q, k, v, o, lse, *grads = tensors(1, 2, 1, 200, 600, 64, torch.float16, "cpu")
    for x in (do, q, k, v):
        x.normal_()
    launch_forward(q, k, v, o, lse, causal=True, window=None, scale=0.125)
    found = []
    for at_once in (1, 132):
        with monkeypatch.context() as patch:
            simulated(patch, at_once)
            for x in grads:
                x.fill_(torch.nan)
            attention_backward_hopper.launch(do, q, k, v, o, lse, *grads, causal=True, scale=0.125, deterministic=True)
        found.append([x.clone() for x in grads])
    assert all(map(torch.equal, *found))


def main_kernel(monkeypatch, causal=True, deterministic=False, D=128, **options):
    pretended(monkeypatch, attention_backward_hopper)("sm_90")
    call = {"causal": causal, "scale": 0.1, "deterministic": deterministic} | options
    made = compile_all(lambda: attention_backward_hopper.launch(*tensors(D=D, device="cpu"), **call), "sm_90")
    assert [each.kernel for each in made] == ["_prepare_kernel", "_backward_hopper_kernel", "_round_kernel"]
    return made[1]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("D", [64, 128])
def test_compiled_code(D, deterministic, causal, monkeypatch):
    made = main_kernel(monkeypatch, causal, deterministic, D)
    found = made.instructions
    assert not misfit(made) and made.spilled_bytes <= (0 if causal else 8)  # Triton 3.6, a register, after the loop
    assert found["WGMMA"] and found["TMA load"] and found["TMA store"] and not found["cp.async.128"]
    adds = re.findall(r"atom\.global\.gpu\.relaxed\.add(\S*)", made.code)
    assert adds == [".v4.f32"] * (2 * 64 * D // 2 // 128 // 4), "of both warp groups, four numbers a lane at a time"
    assert ("ld.acquire.gpu" in made.code) == deterministic


@pytest.mark.parametrize("D", [64, 128])
def test_what_is_beside_products(D, monkeypatch):
    """In a turn of the loop the next block's scores run while dq is added, and v do while exp2 is computed, which a
    barrier's branches keep before the wait for it. The code's blocks need not stand in the order in which they run."""
    made = main_kernel(monkeypatch, D=D)
    first, *parts = re.split(r"wgmma\.wait_group\.sync\.aligned (\d)", made.code)
    between = list(zip(["", *parts[::2]], [first, *parts[1::2]], [*parts[::2], ""], strict=True))
    added = [(after, before) for after, part, before in between if "relaxed.add" in part]
    assert added == [("1", "1")] * 2
    exp2 = [part.rpartition("ex2.approx")[2] for _, part, before in between if before == "0" and "ex2.approx" in part]
    assert len(exp2) == 2 and all("mbarrier.try_wait" in rest for rest in exp2)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("D", [64, 128])
def test_products_are_not_made_a_sequence(D, options, monkeypatch, tmp_path):
    """ptxas says where it lets each wait for the one before."""
    (tmp_path / "code.ptx").write_text(main_kernel(monkeypatch, D=D, **options).code)
    ptxas = [sys.modules["triton"].knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", "code.ptx", "-o", "code.cubin"]
    told = subprocess.run(ptxas, cwd=tmp_path, check=True, capture_output=True, text=True).stderr
    assert "registers" in told and "serialized" not in told


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (2, 8, 2, 1024, 1024, 128, True), (1, 8, 2, 1000, 1500, 64, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_close_to_the_truth(shape, dtype, options, device):
    needs_hopper()
    *sizes, causal = shape
    check(attend(options), *inputs(*sizes, dtype, device), causal)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
def test_same_bits_every_time(D, device):
    needs_hopper()
    do, q, k, v, o, lse, *grads = tensors(4, 32, 8, 2048, 2048, D, device=device)
    for x in (do, q, k, v):
        x.normal_()
    launch_forward(q, k, v, o, lse, causal=True, window=None, scale=D**-0.5)
    call = {"causal": True, "scale": D**-0.5}
    attention_backward_hopper.launch(do, q, k, v, o, lse, *grads, **call, deterministic=True)
    for i in range(20):
        again = [torch.full_like(x, torch.nan) for x in grads]
        attention_backward_hopper.launch(do, q, k, v, o, lse, *again, **call, deterministic=i % 2 == 0)
        same = [torch.equal(a, b) for a, b in zip(again, grads, strict=True)]
        assert same[1:] == [True, True] and (same[0] or i % 2)
    theirs = [torch.empty_like(x) for x in grads]
    attention_backward.launch_backward(do, q, k, v, o, lse, *theirs, window=None, dq_tiling={}, **call)
    for a, b in zip(grads, theirs, strict=True):
        assert (a.float() - b.float()).abs().mean() < 0.02 * b.float().abs().mean()
