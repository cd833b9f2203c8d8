import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from fastkit.kernels import rope as module
from fastkit.ops import rope, rope_

pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")


def run(rotate, q, k, cos, sin, position_ids, dq, dk):
    """(q_out, k_out, dq, dk) of one forward and backward through `rotate`."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    outputs = rotate(q, k, cos, sin, position_ids)
    torch.autograd.backward(outputs, (dq.to(q.dtype), dk.to(k.dtype)))
    return *outputs, q.grad, k.grad


def hugging_face(q, k, cos, sin, position_ids):
    """transformers' own function, on the heads' first R numbers as its models with partial rotation do."""
    rotary = cos.shape[-1]
    cos, sin = (t.to(q.dtype) if position_ids is None else t.to(q.dtype)[position_ids] for t in (cos, sin))
    cos, sin = (t[None] if t.dim() == 2 else t for t in (cos, sin))
    turned = apply_rotary_pos_emb(q[..., :rotary], k[..., :rotary], cos, sin)
    return tuple(torch.cat([a, b[..., rotary:]], -1) for a, b in zip(turned, (q, k), strict=True))


def check(rotate, q, k, cos, sin, position_ids=None):
    """Assert that both outputs and both gradients of `rotate` are as close to the truth as transformers'."""
    dq, dk = (torch.randn(x.shape, device=x.device).to(x.dtype) for x in (q, k))
    ours, theirs = (run(f, q, k, cos, sin, position_ids, dq, dk) for f in (rotate, hugging_face))
    doubles = [t.double() for t in (q, k, cos, sin)]
    truth = run(module.reference, *doubles, position_ids, dq.double(), dk.double())
    scale = max(1.0, cos.abs().max().item())
    scales = [scale * t.double().abs() for t in (q, k, dq, dk)]
    for results in zip(ours, theirs, truth, ("q", "k", "dq", "dk"), scales, strict=True):
        assert_as_close_as_torch(*results)


def inputs(B, q_heads, k_heads, T, D, dtype, device):
    """q and k as a projection and transformers' transpose leave them."""
    return tuple(torch.randn(B, T, H, D, device=device).to(dtype).transpose(1, 2) for H in (q_heads, k_heads))


def table(rows, R, device, dtype=torch.float32, batch=()):
    angles = 10 * torch.randn(*batch, rows, R // 2, device=device)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


SHAPES = [  # B, q_heads, k_heads, T, D, R
    (1, 1, 1, 1, 2, 2),
    (2, 4, 2, 5, 16, 16),
    (1, 9, 3, 7, 64, 64),
    (2, 28, 4, 3, 128, 128),
    (1, 40, 40, 3, 128, 128),
    (2, 4, 1, 4, 96, 96),
    (2, 3, 5, 4, 80, 32),
    (1, 2, 2, 3, 10, 6),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_the_truth(shape, dtype, device):
    *sizes, R = shape
    check(rope, *inputs(*sizes, dtype, device), *table(shape[3], R, device))


@given(
    B=st.integers(1, 3), q_heads=st.integers(1, 12), k_heads=st.integers(1, 6), T=st.integers(1, 9),
    half=st.integers(1, 24), rest=st.integers(0, 9), seed=st.integers(0, 2**31), packed=st.booleans(),
)  # fmt: skip
def test_close_to_the_truth_at_any_shape(dtype, device, B, q_heads, k_heads, T, half, rest, seed, packed):
    torch.manual_seed(seed)
    q, k = inputs(B, q_heads, k_heads, T, 2 * half + rest, dtype, device)
    position_ids = torch.randint(0, 30, (B, T), device=device) if packed else None
    check(rope, q, k, *table(30 if packed else T, 2 * half, device), position_ids)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [(), (1,), (2,)], ids=str)
def test_tables(table_dtype, batch, dtype, device):
    check(rope, *inputs(2, 4, 2, 5, 32, dtype, device), *table(5, 32, device, table_dtype, batch))


def test_tables_as_views(device):
    q, k = inputs(2, 4, 2, 5, 32, torch.float32, device)
    cos, sin = table(5, 32, device)
    for view in (lambda t: t.expand(2, 5, 32), lambda t: t.T.contiguous().T):
        check(rope, q, k, view(cos), view(sin))
    check(rope, q, k, cos, sin.T.contiguous().T)


LAYOUTS = {
    "heads first": lambda x: x.contiguous(),
    "part of a stacked projection": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
    "every other number": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "heads repeated": lambda x: x[:, :1].expand(x.shape),
    "tokens last": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    q, k = inputs(2, 4, 2, 5, 32, dtype, device)
    check(rope, LAYOUTS[layout](q), LAYOUTS[layout](k), *table(5, 32, device))


def test_strides_are_kept(device):
    q, k = inputs(2, 4, 2, 5, 32, torch.float32, device)
    q_out, k_out = rope(q, k, *table(5, 32, device))
    assert q_out.stride() == q.stride() and k_out.stride() == k.stride()


@pytest.mark.parametrize("shape", [(0, 4, 2, 5, 8), (2, 4, 2, 0, 8)], ids=str)
def test_nothing(shape, dtype, device):
    q, k = inputs(*shape, dtype, device)
    results = run(rope, q, k, *table(shape[3], 8, device), None, q, k)
    assert [r.shape for r in results] == [q.shape, k.shape] * 2


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(2, 6), (1, 6), (6,)], ids=str)
def test_packed_sequences(ids_dtype, shape, dtype, device):
    """Two sequences in a row of 6 tokens are turned as each alone would be."""
    q, k = inputs(2, 4, 2, 6, 32, dtype, device)
    cos, sin = table(20, 32, device)
    position_ids = torch.tensor([0, 1, 2, 3, 0, 1], dtype=ids_dtype, device=device).expand(shape)
    packed = rope(q, k, cos, sin, position_ids)
    for part, length in ((slice(0, 4), 4), (slice(4, 6), 2)):
        alone = rope(q[:, :, part], k[:, :, part], cos[:length], sin[:length])
        assert all(torch.equal(a[:, :, part], b) for a, b in zip(packed, alone, strict=True))
    check(rope, q, k, cos, sin, position_ids)


SCALINGS = {
    "default": {"rope_type": "default"},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.2},
}  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_tables_of_transformers(scaling, dtype, device):
    """Tables as transformers makes them for a model; a token far behind the original window is one of those turned."""
    parameters = {"rope_theta": 10000.0} | SCALINGS[scaling]
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=256, rope_parameters=parameters)
    q, k = inputs(2, 2, 1, 5, 32, dtype, device)
    position_ids = torch.tensor([[0, 1, 2, 3, 250], [7, 8, 9, 10, 11]], device=device)
    embedding = LlamaRotaryEmbedding(config).to(device)
    cos, sin = embedding(q.float(), position_ids)
    assert cos.shape == (2, 5, 32) and (scaling == "yarn") == (cos.abs().max().item() > 1.1)
    check(rope, q, k, cos, sin)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rest", [0, 5])
def test_in_place(packed, rest, dtype, device):
    q, k = inputs(2, 4, 2, 5, 32 + rest, dtype, device)
    cos, sin = table(9 if packed else 5, 32, device)
    position_ids = torch.randint(0, 9, (2, 5), device=device) if packed else None
    out_of_place = rope(q, k, cos, sin, position_ids)
    assert all(a is b for a, b in zip(rope_(q, k, cos, sin, position_ids), (q, k), strict=True))
    assert torch.equal(q, out_of_place[0]) and torch.equal(k, out_of_place[1])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("k_heads", "rest", "packed"), [(2, 0, False), (8, 0, True), (1, 5, False), (3, 6, True)])
def test_tokens_yet_to_be_multiplied_in_place(k_heads, rest, packed, inverse, dtype, device):
    """Bits of the passes in fp32 apart: multiply, turn, round. v, read and written beside k, is only multiplied."""
    B, T, D, sizes = 2, 5, 32 + rest, (8, k_heads, k_heads)
    qkv = torch.randn(B, T, sum(sizes) * D, device=device).to(dtype)
    scale, (cos, sin) = torch.rand(B * T, device=device) + 0.5, table(9 if packed else T, 32, device)
    position_ids = torch.randint(0, 9, (B, T), device=device) if packed else None

    def heads(x):
        return [part.unflatten(2, (-1, D)).transpose(1, 2) for part in x.split([n * D for n in sizes], 2)]

    q, k, v = heads(qkv.float() * scale.view(B, T, 1))
    module.launch(q, k, cos, sin, q, k, position_ids, inverse)
    expected = [x.to(dtype) for x in (q, k, v)]
    q, k, v = heads(qkv)
    module.launch(q, k, cos, sin, q, k, position_ids, inverse, scale=scale, v=v, v_out=v)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), expected, strict=True))


@pytest.mark.parametrize(("k_heads", "rest"), [(2, 0), (3, 6)])
def test_values_go_beside_the_keys(k_heads, rest, dtype, device):
    """Out of place, bit by bit as they were."""
    B, T, D = 2, 5, 32 + rest
    q, k, v = (torch.randn(B, T, n, D, device=device).to(dtype).transpose(1, 2) for n in (4, k_heads, k_heads))
    cos, sin = table(T, 32, device)
    into = torch.full((B, T, 4 + 2 * k_heads, D), torch.nan, dtype=dtype, device=device).transpose(1, 2)
    q_out, k_out, v_out = into.split([4, k_heads, k_heads], 1)
    module.launch(q, k, cos, sin, q_out, k_out, inverse=True, v=v, v_out=v_out)
    expected = torch.empty_like(q), torch.empty_like(k)
    module.launch(q, k, cos, sin, *expected, inverse=True)
    assert torch.equal(q_out, expected[0]) and torch.equal(k_out, expected[1]) and torch.equal(v_out, v)


def test_in_place_on_the_cpu_in_bfloat16():
    q, k = inputs(1, 2, 1, 3, 8, torch.bfloat16, "cpu")
    cos, sin = table(3, 8, "cpu")
    expected = rope(q, k, cos, sin)
    rope_(q, k, cos, sin)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


def test_turned_back(device):
    """Where nothing is scaled, the backward of the forward is what went in."""
    q, k = inputs(2, 4, 2, 5, 32, torch.float32, device)
    cos, sin = table(5, 32, device)
    turned, back = ([torch.empty_like(q), torch.empty_like(k)] for _ in range(2))
    module.launch(q, k, cos, sin, *turned)
    module.launch(*turned, cos, sin, *back, inverse=True)
    torch.testing.assert_close(back[0], q)
    torch.testing.assert_close(back[1], k)


@pytest.mark.parametrize("BLOCK_T", [1, 2, 4])
def test_any_tile_gives_the_same(BLOCK_T, device):
    q, k = inputs(2, 40, 8, 5, 128, torch.float32, device)
    cos, sin = table(5, 128, device)
    outputs = torch.empty_like(q), torch.empty_like(k)
    module.launch(q, k, cos, sin, *outputs, BLOCK_T=BLOCK_T)
    assert all(torch.equal(a, b) for a, b in zip(outputs, rope(q, k, cos, sin), strict=True))


def test_positions_outside_the_table_show(device):
    """The kernel itself reads nothing there; on a GPU nothing checks the positions before."""
    q, k = inputs(1, 2, 1, 4, 8, torch.float32, device)
    cos, sin = table(6, 8, device)
    outputs = torch.empty_like(q), torch.empty_like(k)
    module.launch(q, k, cos, sin, *outputs, torch.tensor([[0, -1, 5, 6]], device=device))
    for output in outputs:
        assert output[:, :, [1, 3]].isnan().all() and not output[:, :, [0, 2]].isnan().any()


def test_reference_gradients():
    q, k = (torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cos, sin = table(3, 6, "cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: module.reference(q, k, cos, sin), (q, k))


def test_one_output_used(device):
    q, k = (x.requires_grad_() for x in inputs(1, 2, 1, 4, 8, torch.float32, device))
    cos, sin = table(4, 8, device)
    rope(q, k, cos, sin)[1].square().sum().backward()
    assert q.grad.eq(0).all() and k.grad.abs().sum() > 0


def test_saves_neither_q_nor_k(device):
    q, k = inputs(1, 2, 1, 4, 8, torch.float32, device)
    cos, sin = table(4, 8, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        rope(q.requires_grad_(), k, cos, sin)
    assert saved == [cos.data_ptr(), sin.data_ptr()]


def test_no_second_derivative(device):
    q, k = inputs(1, 2, 1, 4, 8, torch.float32, device)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(rope(q, k, *table(4, 8, device))[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_offsets_past_2_to_the_31(device):
    stride, T, D = 2**30, 3, 8
    memory = torch.UntypedStorage((stride * (T - 1) + 2 * D) * 2, device=device)  # 4 GiB of addresses, few touched
    for strides in ((1, 2 * D, stride, 1), (stride, 1, D, 1), (1, stride, D, 1)):
        sizes = [T if step == stride else 1 for step in strides[:3]]
        far = [
            torch.empty(0, dtype=torch.float16, device=device).set_(memory, at, (*sizes, D), strides) for at in (0, D)
        ]
        near = [torch.randn(*sizes, D, device=device).half() for _ in range(2)]
        for a, b in zip(far, near, strict=True):
            a.copy_(b)
        cos, sin = table(sizes[2], D, device)
        expected = rope(*near, cos, sin)
        assert all(torch.equal(a, b) for a, b in zip(rope_(*far, cos, sin), expected, strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda q, k, c, s, p: (q.int(), k, c, s), "q has dtype torch.int32"),
        (lambda q, k, c, s, p: (q, k.half(), c, s), "k has dtype torch.float16 but q has torch.float32"),
        (lambda q, k, c, s, p: (q[0], k, c, s), r"q has shape \(4, 5, 8\) and k \(2, 2, 5, 8\)"),
        (lambda q, k, c, s, p: (q, k[:, :, :4], c, s), r"k \(2, 2, 4, 8\); both need"),
        (lambda q, k, c, s, p: (q, k, c, s[:4]), r"sin has shape \(4, 8\)"),
        (lambda q, k, c, s, p: (q, k, c[:4], s[:4]), r"cos has shape \(4, 8\); q needs \[2 or 1, 5, 8\]"),
        (lambda q, k, c, s, p: (q, k, c[:, :7], s[:, :7]), "must be even and at most q's 8"),
        (lambda q, k, c, s, p: (q[..., :4], k[..., :4], c, s), "must be even and at most q's 4"),
        (lambda q, k, c, s, p: (q, k, c.requires_grad_(), s), "requires a gradient"),
        (lambda q, k, c, s, p: (q, k, c, s, p.float()), "position_ids has dtype torch.float32"),
        (lambda q, k, c, s, p: (q, k, c, s, p[:, :4]), r"position_ids has shape \(2, 4\)"),
        (lambda q, k, c, s, p: (q, k, c[None], s[None], p), "needs .* a table"),
        (lambda q, k, c, s, p: (q, k, c, s, p.to("meta")), "position_ids is on meta"),
        (lambda q, k, c, s, p: (q, k, c.to("meta"), s), "cos is on meta"),
        (lambda q, k, c, s, p: (*(t.to("meta") for t in (q, k, c, s)),), "q is on device meta; move it"),
        (lambda q, k, c, s, p: (*(t[..., :1].expand(2, -1, 5, 1026) for t in (q, k)), c, s), "of up to 1024"),
    ],
)
def test_clear_errors(wrong, message, device):
    q, k = inputs(2, 4, 2, 5, 8, torch.float32, device)
    position_ids = torch.zeros(2, 5, dtype=torch.int64, device=device)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        rope(*wrong(q, k, *table(5, 8, device), position_ids))
    assert str(caught.value).startswith("rope: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("position", [-1, 5])
def test_positions_outside_the_table_are_refused_on_the_cpu(position):
    q, k = inputs(1, 2, 1, 3, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"position_ids reach from .* but cos has 5 rows; give a longer table"):
        rope(q, k, *table(5, 8, "cpu"), torch.tensor([[0, position, 1]]))


def test_in_place_refuses_what_it_would_spoil(device):
    q, k = inputs(1, 2, 1, 4, 8, torch.float32, device)
    cos, sin = table(4, 8, device)
    with pytest.raises(ValueError, match="rope_: k requires a gradient; use rope, or"):
        rope_(q, k.clone().requires_grad_(), cos, sin)
    for bad in (q[:, :1].expand(q.shape), q.mT.contiguous().mT):
        with pytest.raises(ValueError, match="rope_: q has strides"):
            rope_(bad, k, cos, sin)


def _interleaved(q, k, cos, sin, position_ids):
    """The pairs of GPT-J: neighbours."""
    half = cos.shape[-1] // 2

    def turn(x):
        x1, x2, c, s = x[..., ::2].float(), x[..., 1::2].float(), cos[:, :half], sin[:, :half]
        return torch.stack([x1 * c - x2 * s, x2 * c + x1 * s], -1).flatten(-2).to(x.dtype)

    return turn(q), turn(k)


WRONG = {
    "turned back": lambda q, k, c, s, p: module.reference(q, k, c, -s),
    "neighbours paired": _interleaved,
    "k as it was": lambda q, k, c, s, p: (module.reference(q, k, c, s)[0], k * 1),
    "the next token's angle": lambda q, k, c, s, p: module.reference(q, k, c.roll(1, 0), s.roll(1, 0)),
    "halves exchanged": lambda q, k, c, s, p: module.reference(q.roll(16, -1), k.roll(16, -1), c, s),
    "angles in fp16, thrice rounded": lambda q, k, c, s, p: hugging_face(q, k, c.half() * (1 + 2**-10), s, p),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_caught(wrong):
    q, k = inputs(2, 4, 2, 5, 32, torch.float16, "cpu")
    cos, sin = table(5, 32, "cpu")
    check(lambda q, k, c, s, p: module.reference(q, k, c, s), q, k, cos, sin)
    with pytest.raises(AssertionError, match="error"):
        check(WRONG[wrong], q, k, cos, sin)


@pytest.mark.gpu
def test_under_torch_compile_and_in_a_graph(device):
    q, k = inputs(2, 4, 2, 5, 32, torch.bfloat16, device)
    cos, sin = table(9, 32, device)
    position_ids = torch.randint(0, 9, (2, 5), device=device)
    plain = run(rope, q, k, cos, sin, position_ids, q, k)
    compiled = run(torch.compile(rope, fullgraph=True), q, k, cos, sin, position_ids, q, k)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = rope(q, k, cos, sin, position_ids)
    graph.replay()
    assert torch.equal(outputs[0], plain[0]) and torch.equal(outputs[1], plain[1])
