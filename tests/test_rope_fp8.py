"""RoPE's backward in FP8: the bits of a turn and of a quantization after it, in one pass."""

import pytest
import torch
from cards import needs_fp8
from compiled import compile_all, faults
from hypothesis import given
from hypothesis import strategies as st
from test_rope import LAYOUTS, SHAPES, table

from fastkit.kernels import fp8_rows, rope, rope_fp8
from fastkit.lab.tracer import trace_launches
from fastkit.models import attend, pieces

FP8 = torch.float8_e4m3fn
pytestmark = [needs_fp8, pytest.mark.usefixtures("poisoned", "fresh_seed")]


def gradients(B, q_heads, k_heads, T, D, dtype, device):
    """dq, dk and dv as cuDNN leaves them, their tokens of sizes from 1e-2 to 1e2, with zeros of either sign."""
    size = 10 ** torch.empty(B, 1, T, 1, device=device).uniform_(-2, 2)
    found = []
    for heads in (q_heads, k_heads, k_heads):
        x = torch.randn(B, T, heads, D, device=device).transpose(1, 2) * size
        found.append((x * (torch.rand_like(x) > 0.1)).to(dtype))
    return found


def outputs(dq, dk):
    """(dqkv [M, N], dqkv8, scale [M]), unwritten."""
    M, N = dq.shape[0] * dq.shape[2], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[3]
    dqkv = torch.empty(M, N, dtype=dq.dtype, device=dq.device)
    return dqkv, torch.empty(M, N, dtype=FP8, device=dq.device), torch.empty(M, device=dq.device)


def split(dqkv, q, k):
    """dqkv [M, N] as dq, dk and dv, shaped as q, k and k."""
    B, _, T, D = q.shape
    parts = dqkv.split([q.shape[1] * D, k.shape[1] * D, k.shape[1] * D], 1)
    return [part.view(B, T, part.shape[1] // D, D).transpose(1, 2) for part in parts]


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def both(dq, dk, dv, cos, sin, **tiling):
    """(dqkv, dqkv8, scale) of the kernel, and of two passes."""
    ours, theirs = outputs(dq, dk), outputs(dq, dk)
    rope_fp8.launch(dq, dk, dv, cos, sin, *ours, **tiling)
    into = split(theirs[0], dq, dk)
    rope.launch(dq, dk, cos, sin, *into[:2], inverse=True)
    into[2].copy_(dv)
    fp8_rows.launch(*theirs)
    return ours, theirs


def check(*gradients_and_table, **tiling):
    """Both are the same, bit by bit."""
    for name, a, b in zip(("dqkv", "dqkv8", "scale"), *both(*gradients_and_table, **tiling), strict=True):
        assert torch.equal(bits(a), bits(b)), name


@pytest.mark.parametrize("shape", [*SHAPES, (1, 40, 8, 2, 64, 64), (1, 32, 32, 2, 96, 96)], ids=str)
def test_kernel_writes_the_bits_of_two_passes(shape, dtype, device):
    *sizes, R = shape
    check(*gradients(*sizes, dtype, device), *table(shape[3], R, device))


@given(
    B=st.integers(1, 3), q_heads=st.integers(1, 12), k_heads=st.integers(1, 6), T=st.integers(1, 5),
    half=st.integers(1, 24), rest=st.integers(0, 9), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_bits_of_two_passes_at_any_shape(dtype, device, B, q_heads, k_heads, T, half, rest, seed):
    torch.manual_seed(seed)
    check(*gradients(B, q_heads, k_heads, T, 2 * half + rest, dtype, device), *table(T, 2 * half, device))


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [(), (1,), (2,)], ids=str)
def test_kernel_with_any_table(table_dtype, batch, dtype, device):
    check(*gradients(2, 4, 2, 5, 32, dtype, device), *table(5, 32, device, table_dtype, batch))


def test_kernel_with_the_positions_of_packed_sequences(dtype, device):
    """Which come in the table: a row for each token."""
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1], [4, 5, 0, 0, 1, 2]], device=device)
    check(*gradients(2, 4, 2, 6, 32, dtype, device), *(x[position_ids] for x in table(9, 32, device)))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("every other number", "tokens last")])
def test_kernel_reads_any_strides(layout, dtype, device):
    """Of each gradient its own; also heads that start at odd addresses."""
    dq, dk, dv = gradients(2, 4, 2, 5, 32, dtype, device)
    angles = table(5, 32, device)
    for found in ((LAYOUTS[layout](dq), dk, dv), (dq, LAYOUTS[layout](dk), dv), (dq, dk, LAYOUTS[layout](dv))):
        check(*found, *angles)
    check(*(torch.cat([x[..., :1], x], -1)[..., 1:] for x in (dq, dk, dv)), *angles)


def test_kernel_writes_rows_of_a_larger_buffer(dtype, device):
    dq, dk, dv = gradients(2, 4, 2, 5, 32, dtype, device)
    angles, plain = table(5, 32, device), outputs(dq, dk)
    rope_fp8.launch(dq, dk, dv, *angles, *plain)
    M, N = plain[0].shape
    dqkv, dqkv8 = (torch.zeros(M, N + 3, dtype=x.dtype, device=device) for x in plain[:2])
    rope_fp8.launch(dq, dk, dv, *angles, dqkv[:, :N], dqkv8[:, :N], scale := torch.empty(M, device=device))
    assert torch.equal(dqkv[:, :N], plain[0]) and torch.equal(scale, plain[2])
    assert torch.equal(bits(dqkv8[:, :N].contiguous()), bits(plain[1]))
    assert not dqkv[:, N:].any() and not dqkv8[:, N:].float().any()


@pytest.mark.parametrize("num_warps", [1, 4])
def test_kernel_by_any_number_of_warps(num_warps, device):
    check(*gradients(1, 28, 4, 2, 128, torch.float16, device), *table(2, 128, device), num_warps=num_warps)


@pytest.mark.filterwarnings("ignore:invalid value encountered in")  # the interpreter's numpy
def test_kernel_with_rows_of_zeros_and_of_what_is_no_number(device):
    found, (cos, sin) = gradients(1, 4, 2, 4, 32, torch.float16, device), table(4, 32, device)
    cos[0], sin[0] = 1.0, 0.0  # the first token does not turn
    for x in found:
        x[:, :, 0], x[:, :, 1] = -0.0, 0.0
    check(*(x[:, :, :2] for x in found), cos[:2], sin[:2])
    found[0][0, 1, 2, 3], found[2][0, 1, 3, 5] = torch.inf, torch.nan
    for ours, theirs in zip(*both(*found, cos, sin), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 4, 2, 5, 8), (2, 4, 2, 0, 8)], ids=str)
def test_nothing(shape, device):
    check(*gradients(*shape, torch.float16, device), *table(shape[3], 8, device))


# --- through attention's backward


BACKENDS = ["ours", "torch", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cudnn", "flash"))]


@pytest.mark.parametrize("takes", [True, False], ids=["one pass", "too many heads for one"])
@pytest.mark.parametrize("backend", [*BACKENDS, "interpreted"])
def test_attention_hands_them_on(backend, takes, device, monkeypatch):
    """With FP8 asked for, dqkv is as without, and its rows in FP8 are those of a pass of its own."""
    if interpreted := backend == "interpreted":  # the kernel on a CPU too, where FP8Rows come of the reference
        backend = "torch"
        monkeypatch.setattr(attend, "on_fp8_kernels", lambda *args: True)
    monkeypatch.setattr(attend, "_backend", lambda *args: backend)
    monkeypatch.setattr(rope_fp8, "takes", lambda *args: takes)
    dtype, T = (torch.bfloat16, 150) if device == "cuda" else (torch.float32, 5)
    options, D = attend.Attend(0.1), 64
    q, k, v = (torch.randn(2, T, n, D, device=device).to(dtype).transpose(1, 2) for n in (4, 2, 2))
    do, attended = torch.randn_like(q), attend.attend(q, k, v, options)
    turns = table(T, D, device, dtype, (1,))
    plain, (dqkv, *expected) = outputs(q, k)[0], outputs(q, k)
    assert attend.attend_backward(do, q, k, v, attended, options, *split(plain, q, k), turns) is None
    rows = attend.attend_backward(do, q, k, v, attended, options, *split(dqkv, q, k), turns, dqkv)
    if backend in ("ours", "torch"):  # the others add in another order each time
        assert torch.equal(bits(dqkv), bits(plain))
    if interpreted and takes:
        fp8_rows.launch(dqkv, *expected)
    else:
        expected = pieces.quantized(dqkv)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(rows, expected, strict=True))


# --- what is compiled, what moves


def test_which_models_it_takes():
    def takes(q_heads, k_heads, D=128, R=128):
        return rope_fp8.takes(*(torch.empty(1, n, 1, D) for n in (q_heads, k_heads)), torch.empty(1, R))

    # Mistral-7B, Qwen2.5-7B, Llama-2-13B, Qwen2.5-14B, Llama-3-70B
    assert all(takes(*heads) for heads in ((32, 8), (28, 4), (40, 40), (40, 8), (64, 8))) and takes(32, 32, 96, 96)
    assert not takes(64, 64) and not takes(40, 40, 256, 256)
    assert not takes(40, 40, 128, 96)  # what is not turned has lanes of its own


def launches(q_heads, k_heads, D, B=2, T=8, R=None, dtype=torch.bfloat16, table_dtype=torch.bfloat16):
    dq, dk, dv = (torch.empty(B, T, n, D, dtype=dtype, device="meta") for n in (q_heads, k_heads, k_heads))
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    cos, sin = (torch.empty(T, R or D, dtype=table_dtype, device="meta") for _ in range(2))
    rope_fp8.launch(dq, dk, dv, cos, sin, *outputs(dq, dk))


@pytest.mark.parametrize("arch", ["sm_89", "sm_90", "sm_100"])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [(32, 8, 128), (28, 4, 128), (40, 40, 128), (64, 8, 128), (32, 32, 96), (14, 2, 64)], ids=str
)
def test_compiled_code(sizes, table_dtype, arch):
    """Nothing spills; what has 16 bits moves by 128, the 8 numbers that a thread has side by side by 64 in FP8."""
    (made,) = compile_all(lambda: launches(*sizes, table_dtype=table_dtype), arch)
    assert not faults(made, narrow=3)  # two of FP8, and the scale
    assert made.instructions["st.global.64"] == 2 and made.instructions["st.global.32"] == 1
    assert "st.shared.128" not in made.instructions  # no number changes threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(32, 8, 128, 2, 8, 128), (32, 8, 96, 2, 8, 48), (40, 40, 128, 2, 8, 64), (3, 1, 10, 2, 8, 6)], ids=str
)
def test_nothing_spills_at_other_sizes(sizes, dtype):
    (made,) = compile_all(lambda: launches(*sizes, dtype), "sm_90")
    assert made.spilled_bytes == 0


def test_one_binary_for_all_batches():
    codes = set()
    for B, T in ((4, 2048), (3, 333), (1, 16), (1, 1)):
        (made,) = compile_all(lambda B=B, T=T: launches(32, 8, 128, B, T), "sm_90")
        codes.add(made.code)
    assert len(codes) == 1


def test_moves_what_it_declares():
    """Every sector asked for once and whole; but the table's row once by each warp, of which the first brings it."""
    B, T, D = 2, 4, 128
    q, k, _ = gradients(B, 32, 8, T, D, torch.float16, "cpu")
    dq, dk, dv = split(torch.randn(B * T, 48 * D).half(), q, k)  # one allocation: the tracer names a load by its own
    cos, sin = table(T, D, "cpu")
    (trace,) = trace_launches(
        lambda: rope_fp8.launch(dq, dk, dv, cos, sin, *outputs(dq, dk)), arch="sm_90", programs=64
    )
    rows = [a for a in trace.accesses if a.argument in ("dq_ptr", "dqkv_ptr", "dqkv8_ptr")]
    assert len(rows) == 6 and all(access.efficiency == 1 for access in rows)
    declared = rope_fp8.cost(B, T, 32, 8, D, torch.float16).bytes_moved - 4 * T * D - 4 * B * T
    assert sum(access.bytes_moved for access in rows) == declared == 5 * B * T * 48 * D
