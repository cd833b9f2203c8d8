import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch

from fastkit.kernels import linear_cross_entropy as module
from fastkit.kernels.loss_terms import Terms
from fastkit.ops import cross_entropy, linear_cross_entropy

pytestmark = [
    pytest.mark.usefixtures("poisoned", "fresh_seed"),
    # the interpreter's numpy; the infinity, of a cap's exp, is harmless
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]
ALL_TERMS = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}


@pytest.fixture(params=[4, 10**6], ids=["many parts", "one part"])
def parts(request, monkeypatch):
    monkeypatch.setattr(module, "part_rows", lambda M, V, itemsize: request.param)


def run(loss_of, hidden, weight, labels, bias=None, g=1.0, **keywords):
    """(loss, dhidden, dweight[, dbias]) of one forward and backward through `loss_of`."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    loss = loss_of(*leaves[:2], labels, *leaves[2:], **keywords)
    loss.backward(torch.full_like(loss, g))
    return loss.detach(), *(leaf.grad for leaf in leaves)


def theirs(hidden, weight, labels, bias=None, items=None, label_smoothing=0.0, z_loss=0.0, softcap=None, off=0.0):
    """As a model on torch has it: logits in the dtype of hidden, upcast, then the loss.

    The logits are of products like ours, since torch may add up others, of more rows say, in another order.

    off  by how much, relatively, logits are off after the upcast
    """
    rows, labels = hidden[labels != -100], labels[labels != -100]
    whole = F.linear(rows, weight, bias)
    step = module.part_rows(len(rows), len(weight), rows.element_size())
    with torch.no_grad():
        buffer = module.logits_buffer(min(step, len(rows)), len(weight), rows)
        z = torch.cat([module.logits_of(x, weight, bias, buffer).float() for x in rows.split(step)])
    z = z * (1 + off) + (whole - whole.detach()).float()  # the latter 0, with the gradient of the whole product
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    total = F.cross_entropy(z, labels, reduction="sum", label_smoothing=label_smoothing)
    total = total + z_loss * z.logsumexp(-1).square().sum()
    return total / (items or max(len(labels), 1))


def truth_of(hidden, weight, labels, bias=None, items=None, **terms):
    items = items or (labels != -100).sum().clamp(min=1)
    return module.reference(hidden, weight, labels, bias, Terms(**terms)).sum() / items


def check(loss_of, hidden, weight, labels, bias=None, g=1.0, items=None, **terms):
    """Assert that the loss and all gradients of `loss_of` are as close to the truth as those of torch.

    In 16 bits, where dlogits lies halfway between two numbers, the last bit of fp32 decides to which of them it is
    rounded, and that shows in the products. So torch's error is the largest of three, with such bits turned. In fp16 it
    is that under a loss scale: without one, torch's dlogits are too small for fp16, and its error a matter of luck.
    """
    g *= 1024 if hidden.dtype == torch.float16 else 1
    arguments = (hidden, weight, labels, bias, g)
    mine = run(loss_of, *arguments, **({} if items is None else {"num_items_in_batch": items}), **terms)
    doubles = [None if x is None else x.double() for x in (hidden, weight, bias)]
    truth = run(truth_of, doubles[0], doubles[1], labels, doubles[2], g, items=items, **terms)
    offs = (0.0,) if hidden.dtype == torch.float32 else (0.0, 1e-6, -1e-6)
    torchs = zip(*(run(theirs, *arguments, items=items, off=off, **terms) for off in offs), strict=True)
    torchs = [max(found, key=lambda x, t=t: (x - t).abs().max()) for found, t in zip(torchs, truth, strict=True)]
    names = ("loss", "dhidden", "dweight", "dbias")
    for results in zip(mine, torchs, truth, names[: len(mine)], _sizes(truth, *doubles, labels, g), strict=False):
        assert_as_close_as_torch(*results)


def _sizes(truth, hidden, weight, bias, labels, g):
    """How large the terms are that results are sums of: fp32 errs by them, not by what is left when they cancel."""
    logits = hidden.abs() @ weight.abs().T + (0 if bias is None else bias.abs())
    error = g * logits.amax()  # of a probability, from its logit's, and of what is multiplied by it
    yield truth[0] + logits.amax(-1).mean()
    yield truth[1].abs() + error * weight.abs().amax() / labels.numel()
    yield truth[2].abs() + error * hidden.abs().amax()
    yield truth[3].abs() + error


def inputs(shape, V, dtype, device, ignored=0.3, bias=False):
    hidden = torch.randn(shape, device=device).to(dtype)
    weight = (2 * torch.randn(V, shape[-1], device=device) / shape[-1] ** 0.5).to(dtype)
    labels = torch.randint(0, V, shape[:-1], device=device)
    labels = labels.masked_fill(torch.rand(shape[:-1], device=device) < ignored, -100)
    return hidden, weight, labels, *([torch.randn(V, device=device).to(dtype)] if bias else [])


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignored", [0, 0.4])
@pytest.mark.parametrize(
    ("shape", "V"), [((1, 1), 1), ((7, 24), 40), ((2, 5, 16), 333), ((3,), 9), ((9, 64), 1500)], ids=str
)
def test_close_to_the_truth(shape, V, ignored, bias, dtype, device):
    check(linear_cross_entropy, *inputs(shape, V, dtype, device, ignored, bias))


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 40)),
    V=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    bias=st.booleans(),
    terms=st.sampled_from([{}, ALL_TERMS]),
    g=st.sampled_from([1.0, 0.25, 4.0]),
)
def test_close_to_the_truth_at_any_shape(dtype, device, shape, V, seed, bias, terms, g):
    torch.manual_seed(seed)
    check(linear_cross_entropy, *inputs(shape, V, dtype, device, bias=bias), **{"g": g} | terms)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("how", ["given", "all", "found", "given, with ignored ones among them", "turned around"])
def test_kept_rows(how, dtype, device):
    hidden, weight, labels, bias = inputs((2, 10, 16), 50, dtype, device, bias=True)
    flat = labels.view(-1)
    rows = torch.arange(20, device=device)
    kept = {
        "given": rows[flat != -100],
        "all": "all",
        "found": None,
        "given, with ignored ones among them": rows,
        "turned around": rows[flat != -100].flip(0),
    }[how]
    expected = run(truth_of, hidden.double(), weight.double(), labels, bias.double())
    results = run(linear_cross_entropy, hidden, weight, labels, bias, kept=kept)
    for ours, due in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.double(), due, rtol=0.02, atol=4 * torch.finfo(dtype).eps)
    assert results[1].view(20, 16)[flat == -100].eq(0).all()


def test_rows_not_kept_are_ignored(device):
    hidden, weight, labels = inputs((6, 8), 20, torch.float32, device, ignored=0)
    kept = torch.tensor([4, 1], device=device)
    loss = linear_cross_entropy(hidden, weight, labels, kept=kept)
    torch.testing.assert_close(loss, F.cross_entropy(hidden[kept] @ weight.T, labels[kept]))


def test_micro_batches_equal_one_batch(device):
    """Gradients accumulated over micro-batches with other numbers of labels, divided by the number in all."""
    hidden, weight, labels = inputs((12, 16), 70, torch.float32, device)
    labels[:4], labels[4:8] = -100, labels[4:8].clamp(min=0)
    items = (labels != -100).sum()
    whole = run(linear_cross_entropy, hidden, weight, labels)
    sums = [0, 0, []]
    for part in (slice(0, 4), slice(4, 7), slice(7, 12)):
        loss, dhidden, dweight = run(linear_cross_entropy, hidden[part], weight, labels[part], num_items_in_batch=items)
        sums = [sums[0] + loss, sums[1] + dweight, [*sums[2], dhidden]]
    torch.testing.assert_close(sums[0], whole[0])
    torch.testing.assert_close(torch.cat(sums[2]), whole[1])
    torch.testing.assert_close(sums[1], whole[2])


@pytest.mark.parametrize("keywords", [{"reduction": "sum"}, {"num_items_in_batch": 5}], ids=str)
def test_reductions(keywords, device):
    hidden, weight, labels = inputs((8, 16), 30, torch.float32, device)
    ours = run(linear_cross_entropy, hidden, weight, labels, **keywords)
    expected = run(lambda h, w, y: cross_entropy(h @ w.T, y, **keywords), hidden, weight, labels)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kept", [None, "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_rows_ignored(reduction, kept, dtype, device):
    hidden, weight, labels, bias = inputs((2, 3, 8), 20, dtype, device, ignored=2, bias=True)
    results = run(linear_cross_entropy, hidden, weight, labels, bias, kept=kept, reduction=reduction, **ALL_TERMS)
    assert all(result.eq(0).all() for result in results)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape, dtype, device):
    results = run(linear_cross_entropy, *inputs(shape, 20, dtype, device))
    assert [result.shape for result in results] == [(), shape, (20, 8)]
    assert all(result.eq(0).all() for result in results)


def test_layouts(dtype, device):
    hidden, weight, labels = inputs((8, 24), 50, dtype, device)
    wide = torch.cat([hidden, hidden.flip(0)], -1)[:, :24]
    for layout in ((wide, weight), (hidden, weight.T.contiguous().T), (hidden.T.contiguous().T, weight)):
        check(linear_cross_entropy, *layout, labels)


def test_a_loss_scale_saves_small_gradients_in_fp16(device):
    """A gradient scaled in time survives in fp16, though each row's share of the mean is below fp16's numbers."""
    rows, items = 64, 2**22
    hidden, weight, labels = inputs((rows, 32), 100, torch.float16, device, ignored=0)
    check(linear_cross_entropy, hidden, weight, labels, g=2.0**6, items=items)
    found = run(linear_cross_entropy, hidden, weight, labels, g=2.0**16, num_items_in_batch=items)
    assert found[1].count_nonzero() > rows * 30


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_one_trained_tensor(trained, device):
    names = ("hidden", "weight", "labels", "bias")
    tensors = dict(zip(names, inputs((5, 8), 20, torch.float32, device, bias=True), strict=True))
    expected = dict(zip(("loss", "hidden", "weight", "bias"), run(linear_cross_entropy, **tensors), strict=True))
    tensors[trained] = tensors[trained].clone().requires_grad_()
    linear_cross_entropy(**tensors).backward()
    torch.testing.assert_close(tensors[trained].grad, expected[trained])


def saved_by(hidden, weight, labels):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, labels)
    return saved


def test_saves_only_the_gradients_that_are_wanted(device):
    hidden, weight, labels = inputs((6, 8), 40, torch.float32, device)
    assert saved_by(hidden, weight, labels) == []
    assert set(saved_by(hidden.requires_grad_(), weight, labels)) == {(6, 8), ()}
    assert set(saved_by(hidden.requires_grad_(), weight.requires_grad_(), labels)) == {(6, 8), (40, 8), ()}


def test_nothing_is_made_without_gradients(device, monkeypatch):
    hidden, weight, labels = inputs((6, 8), 40, torch.float32, device)
    expected, made = linear_cross_entropy(hidden, weight, labels), []
    make = module.make
    monkeypatch.setattr(module, "make", lambda *arguments: made.append(make(*arguments)) or made[-1])
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert torch.equal(loss, expected) and made[0].dhidden is made[0].dweight is made[0].dbias is None


def test_the_logits_are_never_held(device, monkeypatch):
    """Of what is allocated, nothing has a number for each row and column; a frozen head gets no gradient's memory."""
    monkeypatch.setattr(module, "part_rows", lambda M, V, itemsize: 4)
    hidden, weight, labels = inputs((32, 8), 64, torch.float32, device, ignored=0)
    sizes = []
    for name in ("empty", "zeros", "empty_like", "zeros_like"):
        make = getattr(torch, name)
        noted = lambda *size, make=make, **rest: sizes.append(make(*size, **rest)) or sizes[-1]  # noqa: E731
        monkeypatch.setattr(torch, name, noted)
    linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    assert max(tensor.numel() for tensor in sizes) == 4 * 64
    assert tuple(hidden.shape) in [tuple(tensor.shape) for tensor in sizes]


def test_the_backward_runs_once(device):
    hidden, weight, labels = inputs((6, 8), 40, torch.float32, device)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_second_derivative(device):
    hidden, weight, labels = inputs((2, 8), 10, torch.float32, device, ignored=0)
    (dhidden,) = torch.autograd.grad(
        linear_cross_entropy(hidden.requires_grad_(), weight, labels).square(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dhidden.sum().backward()


def test_autocast_changes_nothing(dtype, device):
    arguments = inputs((4, 16), 30, dtype, device, bias=True)
    plain = run(linear_cross_entropy, *arguments)
    with torch.autocast(device, torch.bfloat16):
        cast = run(linear_cross_entropy, *arguments)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_same_bits_every_time(dtype, device):
    arguments = inputs((9, 16), 300, dtype, device)
    first, second = (run(linear_cross_entropy, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("numbers", [1, 2048, 2049, 140001])
def test_scale(numbers, dtype, device):
    x = torch.randn(numbers, device=device).to(dtype)
    for factor in (1.0, 0.5, 3.0):
        scaled = x.clone()
        module.launch_scale(scaled, torch.tensor(factor, device=device))
        assert torch.equal(scaled, (x.float() * factor).to(dtype))


@pytest.mark.parametrize(
    ("V", "itemsize", "rows", "mebibytes"), [(32000, 2, 1024, 63), (128256, 2, 1024, 251), (151936, 2, 1024, 297)]
)
def test_part_rows(V, itemsize, rows, mebibytes):
    assert module.part_rows(8192, V, itemsize) == rows and rows * V * itemsize <= mebibytes * 2**20
    assert module.part_rows(100, V, itemsize) == 100
    assert module.part_rows(10**6, 1000, itemsize) % module.PART_ROWS == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("V", "gib"), [(32000, 0.10), (128256, 0.30)])
def test_memory(V, gib, device):
    """Beyond inputs and outputs, at 8192 rows of 4096 numbers."""
    hidden = torch.randn(8192, 4096, dtype=torch.float16, device=device, requires_grad=True)
    weight = torch.randn(V, 4096, dtype=torch.float16, device=device) * 0.02
    labels = torch.randint(0, V, (8192,), device=device)
    linear_cross_entropy(hidden, weight, labels).backward()  # cuBLAS's workspace, and the gradient
    before = torch.cuda.memory_allocated()
    hidden.grad = None
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, labels).backward()
    assert torch.cuda.max_memory_allocated() - before <= gib * 2**30


@pytest.mark.gpu
def test_compiled_graphs_and_cuda_graphs(device):
    hidden, weight, labels = inputs((64, 128), 1000, torch.float16, device)
    expected = run(linear_cross_entropy, hidden, weight, labels)
    compiled = run(torch.compile(linear_cross_entropy, fullgraph=True), hidden, weight, labels)
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b)
    x, graph = hidden.clone().requires_grad_(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = linear_cross_entropy(x, weight, labels)
        (dx,) = torch.autograd.grad(loss, x)
    graph.replay()
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(dx, expected[1])


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_if_the_rows_are_known(device):
    hidden, weight, labels = inputs((64, 128), 1000, torch.float16, device)
    kept, items = (labels != -100).nonzero()[:, 0], (labels != -100).sum()
    run(linear_cross_entropy, hidden, weight, labels, kept=kept)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows in (kept, "all"):
            run(linear_cross_entropy, hidden, weight, labels, kept=rows, num_items_in_batch=items)
            run(linear_cross_entropy, hidden, weight, labels, kept=rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda h, w, y: ((h.double(), w.double(), y), {}), "hidden has dtype torch.float64"),
        (lambda h, w, y: ((h, w.half(), y), {}), "weight has dtype torch.float16 but hidden has torch.float32"),
        (lambda h, w, y: ((h, w, y, w[:, 0].half()), {}), "bias has dtype torch.float16 but hidden has torch.float32"),
        (lambda h, w, y: ((h, w, y, w[0]), {}), r"bias has shape \(4,\); weight needs \(9,\)"),
        (lambda h, w, y: ((h, w.T, y), {}), r"hidden has shape \(2, 4\) and weight \(4, 9\)"),
        (lambda h, w, y: ((h, w[:0], y), {}), r"weight \(0, 4\)"),
        (lambda h, w, y: ((h.sum(), w, y), {}), r"hidden has shape \(\)"),
        (lambda h, w, y: ((h, w.to("meta"), y), {}), "weight is on meta but hidden is on"),
        (lambda h, w, y: ((h, w, y[1:]), {}), r"labels has shape \(1,\)"),
        (lambda h, w, y: ((h, w, y.float()), {}), "labels is torch.float32"),
        (lambda h, w, y: ((h, w, y), {"kept": [0]}), r"kept is \[0\]; give a tensor"),
        (lambda h, w, y: ((h, w, y), {"kept": "none"}), "kept is 'none'; give a tensor"),
        (lambda h, w, y: ((h, w, y), {"kept": y == 1}), r"kept is torch.bool \(2,\)"),
        (lambda h, w, y: ((h, w, y), {"kept": y.to("meta")}), "kept is on meta but hidden is on"),
        (lambda h, w, y: ((h, w, y), {"reduction": "none"}), "reduction is 'none'; .*use cross_entropy"),
        (lambda h, w, y: ((h, w, y), {"softcap": -1.0}), "softcap is -1.0"),
        (lambda h, w, y: ((h.to("meta"), w.to("meta"), y.to("meta")), {"kept": "all"}), "hidden is on device meta"),
    ],
)
def test_clear_errors(wrong, message, device):
    arguments, keywords = wrong(*inputs((2, 4), 9, torch.float32, device, ignored=0))
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        linear_cross_entropy(*arguments, **keywords)
    assert str(caught.value).startswith("linear_cross_entropy: ") and "\n" not in str(caught.value)


def _sum_over_rows(hidden, weight, labels, bias=None, **terms):
    return truth_of(hidden.float(), weight.float(), labels, bias, items=labels.numel())


WRONG = {
    "divided by all rows": _sum_over_rows,
    "dlogits in 8 bits": lambda h, w, y: truth_of(_Coarse.apply(h.float()), w.float(), y),
    "ignored rows counted": lambda h, w, y: truth_of(h.float(), w.float(), y.clamp(min=0)),
    "frozen hidden": lambda h, w, y: truth_of(h.float().detach() + 0 * h.float(), w.float(), y),
}


class _Coarse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx.to(torch.float8_e4m3fn).to(dx.dtype)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_losses_are_caught(wrong):
    arguments = inputs((40, 16), 60, torch.float16, "cpu")
    check(truth_of, *arguments)
    with pytest.raises(AssertionError, match=r"error|not finite"):
        check(WRONG[wrong], *arguments)
