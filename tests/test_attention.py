"""Attention and its gradients, as close to the truth as torch's own arithmetic in the same dtype."""

import math

import pytest
import torch
from attention_case import assert_same, check, eager, inputs, run
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastkit.kernels import attention as module
from fastkit.kernels import attention_backward, attention_forward
from fastkit.kernels.common import INTERPRETED
from fastkit.ops import attention, attention_varlen

pytestmark = [
    pytest.mark.usefixtures("poisoned", "fresh_seed"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),  # the interpreter's numpy, under a mask
]


SHAPES = [
    # B, H, H_k, T_q, T_k, D, causal, window
    (1, 1, 1, 64, 64, 64, True, None),
    (2, 2, 1, 70, 70, 20, True, None),
    (1, 2, 1, 100, 100, 80, False, None),
    (1, 3, 3, 33, 90, 16, True, None),
    (1, 2, 2, 90, 33, 40, True, None),
    (1, 3, 1, 100, 100, 24, True, 40),
    (1, 2, 1, 1, 77, 33, True, None),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_the_truth(shape, dtype, device):
    *sizes, causal, window = shape
    check(attention, *inputs(*sizes, dtype, device), causal, window)


@settings(max_examples=5, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # to shrink takes minutes
@given(
    H_k=st.integers(1, 2),
    group=st.integers(1, 3),
    T_q=st.integers(40, 90),
    T_k=st.integers(40, 90),
    D=st.integers(8, 70),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 100),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_close_to_the_truth_at_any_shape(device, H_k, group, T_q, T_k, D, causal, window, scale, seed):
    torch.manual_seed(seed)
    q, k, v = inputs(1, H_k * group, H_k, T_q, T_k, D, torch.float16, device)
    check(attention, q, k, v, causal, window if causal else None, scale)


def positions_seen(T_q, T_k, window):
    """Which keys move o of each query, found by changing them: bool [T_q, T_k]."""
    q, k, v = torch.zeros(1, 1, T_q, 8), torch.zeros(1, 1, T_k, 8), torch.zeros(1, 1, T_k, 8)
    found = torch.zeros(T_q, T_k, dtype=torch.bool)
    for key in range(T_k):
        v[0, 0, :, 0] = torch.arange(T_k) == key
        found[:, key] = attention(q, k, v, True, window)[0, 0, :, 0] > 0
    return found


@pytest.mark.parametrize(("T_q", "T_k", "window"), [(5, 5, None), (3, 6, None), (6, 3, None), (7, 7, 3), (4, 6, 1)])
def test_who_sees_whom(T_q, T_k, window):
    """By the definition, in words: query i stands at i + T_k - T_q and sees the last `window` keys up to there."""
    expected = torch.zeros(T_q, T_k, dtype=torch.bool)
    for i in range(T_q):
        for j in range(T_k):
            behind = i + T_k - T_q - j
            expected[i, j] = behind >= 0 and (window is None or behind < window)
    assert torch.equal(positions_seen(T_q, T_k, window), expected)


def test_queries_that_see_no_key(dtype, device):
    q, k, v = inputs(1, 2, 1, 50, 20, 16, dtype, device)
    o, dq, dk, dv = run(attention, q, k, v, torch.ones_like(q))
    assert (o[:, :, :30] == 0).all() and (dq[:, :, :30] == 0).all() and o[:, :, 30:].all()
    assert all(x.isfinite().all() for x in (o, dq, dk, dv))


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 5, 5, 8), (1, 2, 2, 0, 5, 8), (1, 2, 1, 5, 0, 8), (1, 2, 2, 0, 0, 8)], ids=str
)
def test_nothing(shape, dtype, device):
    q, k, v = inputs(*shape, dtype, device)
    results = run(attention, q, k, v, torch.ones_like(q), False)
    assert [x.shape for x in results] == [q.shape, q.shape, k.shape, v.shape]
    assert all((x == 0).all() for x in results)


def test_scores_past_the_range_of_exp(device):
    q, k, v = inputs(1, 1, 1, 40, 40, 16, torch.float16, device)
    q, k = 30 * q, 30 * k  # scores of some thousands
    results = run(attention, q, k, v, torch.ones_like(q))
    assert all(x.isfinite().all() for x in results)
    torch.testing.assert_close(results[0].double(), eager(q.double(), k.double(), v.double()), rtol=2e-3, atol=2e-3)


def fused(x):
    """x as a slice of a stacked projection's output [B, T, (H + 1) D]."""
    B, H, T, D = x.shape
    stacked = torch.cat([x.transpose(1, 2).reshape(B, T, H * D), x.new_zeros(B, T, D)], -1)
    return stacked[..., : H * D].view(B, T, H, D).transpose(1, 2)


LAYOUTS = {
    "rows of heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of a stacked projection": fused,
    "unaligned": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    q, k, v = inputs(1, 2, 1, 34, 40, 16, dtype, device)
    do = torch.randn_like(q)
    expected = run(attention, q, k, v, do)
    change = LAYOUTS[layout]
    found = run(attention, *map(change, (q, k, v, do)))
    assert_same(found, expected)
    ours = module.on_triton("attention", "q", q) and not module.lacking(module.architecture(q.device), dtype)
    if layout == "rows of heads" and ours:
        assert all(x.transpose(1, 2).is_contiguous() for x in found[:1])


def test_gradients_of_a_sum(device):
    """Its do is one number, expanded: strides of 0."""
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 2, 20, 20, 8, torch.float32, device))
    attention(q, k, v).sum().backward()
    expected = run(attention, q, k, v, torch.ones_like(q))
    assert_same([x.grad for x in (q, k, v)], expected[1:])


def test_the_copy_engine_changes_nothing(device):
    """TMA's path through both kernels: the same bits."""
    if not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90")
    q, k, v = inputs(1, 2, 1, 50, 70, 24, torch.float16, device)
    do, found = torch.randn_like(q), []
    for TMA in (False, True):
        o, dq, dk, dv = (torch.empty_like(x) for x in (q, q, k, v))
        lse = torch.empty(q.shape[:3], device=device)
        options = {"causal": True, "window": 40, "scale": 0.2, "TMA": TMA}
        blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4}
        attention_forward.launch_forward(q, k, v, o, lse, **options, **blocks)
        attention_backward.launch_backward(
            do, q, k, v, o, lse, dq, dk, dv, **options, dq_tiling=blocks, dk_dv_tiling=blocks
        )
        found.append((o, lse, dq, dk, dv))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_lse(dtype, device):
    if not module.on_triton("attention", "q", torch.empty(0, dtype=dtype, device=device)):
        pytest.skip("the reference has none")
    if not INTERPRETED and dtype == torch.float32:
        pytest.skip("fp32 is torch's on a GPU")
    q, k, v = inputs(1, 2, 1, 50, 20, 16, dtype, device)
    lse = torch.empty(1, 2, 50, device=device)
    attention_forward.launch_forward(q, k, v, torch.empty_like(q), lse, causal=True, window=None, scale=0.25)
    s = (q.double() @ k.double().mT * 0.25).masked_fill(~module.seen_pairs(50, 20, True, None, device), -math.inf)
    torch.testing.assert_close(lse, s.logsumexp(-1).float(), rtol=1e-5, atol=1e-5)


def test_offsets_past_2_to_the_31(device):
    stride, T, D = 2**30, 20, 8
    memory = torch.UntypedStorage((stride * 2 + T * D) * 2, device=device)  # 4 GiB of addresses, few touched
    far = torch.empty(0, dtype=torch.float16, device=device).set_(memory, 0, (1, 3, T, D), (0, stride, D, 1))
    q, *_ = inputs(1, 3, 3, T, T, D, torch.float16, device)
    far.copy_(q)
    do = torch.randn_like(q)
    for ours, theirs in zip(run(attention, far, far, far, do), run(attention, q, q, q, do), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_more_than_2_to_the_31_numbers(device):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    H, T, D = 130, 2**17, 128  # 2.2e9 numbers
    q = torch.randn(1, H, T, D, dtype=torch.float16, device=device)
    k, v = (torch.randn(1, 1, T, D, dtype=torch.float16, device=device) for _ in range(2))
    o = attention(q, k, v, True, 64)
    end = attention(q[:, -1:, -128:], k[:, :, -256:], v[:, :, -256:], True, 64)
    assert_same([o[:, -1:, -128:]], [end])


def test_no_second_derivative(device):
    if not module.on_triton("attention", "q", torch.empty(0, dtype=torch.float16, device=device)):
        pytest.skip("the reference's own")
    q, k, v = (x.requires_grad_() for x in inputs(1, 1, 1, 8, 8, 8, torch.float16, device))
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_same_bits_every_time_and_under_autocast(dtype, device):
    if not INTERPRETED and dtype == torch.float32:
        pytest.skip("fp32 is torch's on a GPU, and its sums have no fixed order")
    q, k, v = inputs(1, 4, 2, 60, 60, 16, dtype, device)
    first = run(attention, q, k, v, q)
    with torch.autocast(device, torch.bfloat16):
        second = run(attention, q, k, v, q)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_reference_gradients():
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 1, 5, 4, 3, torch.float64, "cpu"))
    for options in ((False, None), (True, None), (True, 2)):
        assert torch.autograd.gradcheck(lambda q, k, v, o=options: module.reference(q, k, v, *o), (q, k, v))


def test_bfloat16_on_the_cpu_is_the_reference():
    check(attention, *inputs(1, 2, 1, 80, 80, 32, torch.bfloat16, "cpu"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda q, k, v: attention(q.int(), k, v), "q has dtype torch.int32"),
        (lambda q, k, v: attention(q, k.half(), v), "k has dtype torch.float16 but q has torch.float32"),
        (lambda q, k, v: attention(q, k, v[:, :, 1:]), r"v has shape \(2, 2, 5, 8\) but k has \(2, 2, 6, 8\)"),
        (lambda q, k, v: attention(q, k[..., 1:], v[..., 1:]), r"k has shape .* but q has"),
        (lambda q, k, v: attention(q[:1], k, v), r"k has shape .* but q has"),
        (lambda q, k, v: attention(q[0], k, v), r"q has shape \(4, 6, 8\); give \[B, H, T, D\]"),
        (lambda q, k, v: attention(q[:, :3], k, v), "3 query heads cannot share 2 key heads"),
        (lambda q, k, v: attention(q, k, v, False, 4), "window is 4 with causal=False"),
        (lambda q, k, v: attention(q, k, v, True, 0), "window is 0"),
        (lambda q, k, v: attention(q, k, v, scale=-1), "scale is -1.0; give a positive number"),
        (lambda q, k, v: attention(*(x.repeat(1, 1, 1, 33) for x in (q, k, v))), "heads of 264 numbers; 1 to 256"),
        (lambda q, k, v: attention(*(x.to("meta") for x in (q, k, v))), "q is on device meta; move it"),
        (lambda q, k, v: attention_varlen(q[0], k[0], v[0], [0, 4], 4), "cu_seqlens is a list"),
        (lambda q, k, v: attention_varlen(q[0], k[0], v[0], torch.arange(2), 4), r"cu_seqlens is a torch.int64 \(2,\)"),
        (lambda q, k, v: attention_varlen(q[0], k[0], v[0], torch.arange(2).int(), 4.5), "4.5 and 4.5; give integers"),
    ],
)
def test_clear_errors(wrong, message):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        wrong(*inputs(2, 4, 2, 6, 6, 8, torch.float32, "cpu"))
    assert str(caught.value).startswith(("attention: ", "attention_varlen: ")) and "\n" not in str(caught.value)


def _without_delta(q, k, v):
    """The softmax's denominator taken for a constant."""
    s = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    s = s.masked_fill(~module.seen_pairs(q.shape[2], k.shape[2], True, None), -math.inf)
    return ((s - s.logsumexp(-1, keepdim=True).detach()).exp() @ v.float()).to(q.dtype)


WRONG = {
    "sees the future": lambda q, k, v: module.reference(q, k, v, False),
    "a window where there is none": lambda q, k, v: module.reference(q, k, v, True, 60),
    "scale forgotten": lambda q, k, v: module.reference(q, k, v, True, None, 1.0),
    "heads in another order": lambda q, k, v: module.reference(q, k.flip(1), v.flip(1)),
    "delta forgotten": _without_delta,
    "rounded to bfloat16": lambda *qkv: module.reference(*(x.bfloat16() for x in qkv)).half(),
    "a row unwritten": lambda q, k, v: module.reference(q, k, v).index_fill(2, torch.tensor([79]), math.nan),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_caught(wrong):
    q, k, v = inputs(1, 2, 2, 80, 80, 16, torch.float16, "cpu")
    check(module.reference, q, k, v)
    with pytest.raises(AssertionError, match=r"error|not finite"):
        check(WRONG[wrong], q, k, v)


def test_dv_wrong_in_the_fifth_digit_is_caught():
    """What `check` allows for scores summed anew is no room for more."""
    q, k, v = inputs(1, 2, 2, 80, 80, 16, torch.float32, "cpu")
    check(module.reference, q, k, v)
    with pytest.raises(AssertionError, match="dv: "):
        check(lambda q, k, v: module.reference(q, k, v + 2e-5 * (v - v.detach())), q, k, v)


def test_cost():
    forward, backward = module.cost(2, 4, 2, 8, 8, 16, torch.float16, causal=False)
    assert forward.flops == 4 * 16 * 2 * 4 * 64 and backward.flops == 2.5 * forward.flops
    q, k, lse = 2 * 4 * 8 * 16 * 2, 2 * 2 * 8 * 16 * 2, 2 * 4 * 8 * 4
    assert forward.bytes_moved == 2 * q + 2 * k + lse and backward.bytes_moved == 4 * q + 4 * k + lse
    for T_q, T_k, window in ((8, 8, None), (3, 8, None), (8, 3, None), (8, 8, 2), (8, 3, 2)):
        pairs = int(module.seen_pairs(T_q, T_k, True, window).sum())
        assert module.cost(1, 1, 1, T_q, T_k, 1, causal=True, window=window)[0].flops == 4 * pairs


@pytest.mark.gpu
def test_torch_compile_traces_all_of_it(device):
    q, k, v = inputs(1, 4, 2, 256, 256, 64, torch.float16, device)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v) * 2, fullgraph=True)
    assert_same(run(compiled, q, k, v, q), run(lambda *x: attention(*x) * 2, q, k, v, q))


@pytest.mark.gpu
def test_cuda_graph(device):
    q, k, v = (x.requires_grad_() for x in inputs(1, 4, 2, 256, 256, 64, torch.float16, device))

    def step():
        return torch.autograd.grad(attention(q, k, v), (q, k, v), q.detach())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.copy_(torch.randn_like(q))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
