import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerance import SLACK, assert_as_close_as_torch
from transformers.loss.loss_utils import ForCausalLMLoss

from fastkit.kernels import cross_entropy as module
from fastkit.kernels.loss_terms import Terms
from fastkit.ops import cross_entropy

pytestmark = [
    pytest.mark.usefixtures("poisoned", "fresh_seed"),
    # the interpreter's numpy; the infinity, of a cap's exp, is harmless
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]
ALL_TERMS = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}
KINDS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 1e-2},
    "capped": {"softcap": 2.0},
    "all": ALL_TERMS,
}


def run(loss_of, logits, labels, dloss, **kind):
    """(losses, dlogits) of one forward and backward through `loss_of`."""
    logits = logits.detach().requires_grad_()
    losses = loss_of(logits, labels, **kind)
    losses.backward(dloss.to(losses.dtype))
    return losses.detach(), logits.grad


def ours(logits, labels, **kind):
    return cross_entropy(logits, labels, reduction="none", **kind)


def theirs(logits, labels, label_smoothing=0.0, z_loss=0.0, softcap=None):
    """As a model on torch has it: logits upcast, then the loss."""
    z = logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)
    flat, labels = z.reshape(-1, z.shape[-1]), labels.reshape(-1)
    losses = F.cross_entropy(flat, labels.long(), reduction="none", label_smoothing=label_smoothing)
    losses = losses + (z_loss * flat.logsumexp(-1).square()).where(labels != -100, 0)
    return losses.view(logits.shape[:-1])


def truth_of(logits, labels, **kind):
    return module.reference(logits, labels, Terms(**kind))


def check(loss_of, logits, labels, **kind):
    """Assert that losses and dlogits of `loss_of` are as close to the truth as those of torch."""
    dloss = torch.randn(labels.shape, device=labels.device)
    mine = run(loss_of, logits, labels, dloss, **kind)
    torchs = run(theirs, logits, labels, dloss, **kind)
    truth = run(truth_of, logits.double(), labels, dloss.double(), **kind)
    # a loss is a difference of lse and a logit, a gradient one of a probability and 1
    sizes = (truth[0] + logits.double().abs().amax(-1), dloss[..., None].double().expand(logits.shape))
    for results in zip(mine, torchs, truth, ("losses", "dlogits"), sizes, strict=True):
        assert_as_close_as_torch(*results)


def inputs(shape, dtype, device, ignored=0.2):
    logits = (3 * torch.randn(shape, device=device)).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], device=device)
    return logits, labels.masked_fill(torch.rand(shape[:-1], device=device) < ignored, -100)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (17,), (2, 3, 100), (3, 1025), (2, 9000)], ids=str)
def test_close_to_the_truth(shape, kind, dtype, device):
    check(ours, *inputs(shape, dtype, device), **KINDS[kind])


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 700)),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-2, 1, 8]),
    kind=st.sampled_from(list(KINDS)),
)
def test_close_to_the_truth_at_any_shape(dtype, device, shape, seed, size, kind):
    torch.manual_seed(seed)
    logits, labels = inputs(shape, torch.float32, device, ignored=0.5)
    check(ours, (size * logits).to(dtype), labels, **KINDS[kind])


IN_PLACE = {
    "columns of wider rows": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]],
    "unaligned": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "the same row": lambda x: x[:1].expand(x.shape),
}
COPIED = {
    "transposed": lambda x: x.T.contiguous().T,
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", IN_PLACE | COPIED)
def test_layouts(layout, dtype, device):
    logits, labels = inputs((5, 300), dtype, device)
    check(ours, (IN_PLACE | COPIED)[layout](logits), labels, **ALL_TERMS)


@pytest.mark.parametrize("how", ["mean", "sum", "int", "tensor"])
def test_reductions(how, device):
    logits, labels = inputs((2, 8, 50), torch.float32, device)
    count = (labels != -100).sum()
    wanted = {
        "mean": ({}, count),
        "sum": ({"reduction": "sum"}, 1),
        "int": ({"num_items_in_batch": 31}, 31),
        "tensor": ({"num_items_in_batch": torch.tensor(31, device=device)}, 31),
    }
    keywords, divided_by = wanted[how]
    logits.requires_grad_()
    loss = cross_entropy(logits, labels, **keywords)
    (dlogits,) = torch.autograd.grad(loss, logits)
    expected = theirs(logits, labels).sum() / divided_by
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(dlogits, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("items", [None, 40])
def test_as_hugging_face(items, dtype, device):
    logits, labels = inputs((2, 12, 70), dtype, device)
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:]
    found = []
    for loss_of in (
        lambda x: cross_entropy(x, shifted, num_items_in_batch=items),
        lambda x: ForCausalLMLoss(x, labels, vocab_size=70, num_items_in_batch=items),
    ):
        x = logits.clone().requires_grad_()
        loss = loss_of(x)
        found.append((loss, torch.autograd.grad(loss, x)[0]))
    torch.testing.assert_close(*(loss for loss, _ in found), rtol=SLACK, atol=0)
    torch.testing.assert_close(*(dx for _, dx in found), rtol=torch.finfo(dtype).eps, atol=SLACK)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction, dtype, device):
    logits, labels = inputs((3, 40), dtype, device, ignored=2)
    logits[0] = torch.nan
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the reference multiplies by 0")
    logits.requires_grad_()
    loss = cross_entropy(logits, labels, reduction=reduction, **ALL_TERMS)
    loss.sum().backward()
    assert loss.eq(0).all() and logits.grad.eq(0).all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape, dtype, device):
    logits, labels = inputs(shape, dtype, device)
    logits.requires_grad_()
    loss = cross_entropy(logits, labels)
    loss.backward()
    assert loss == 0 and logits.grad.shape == shape


def test_other_labels(device):
    logits, labels = inputs((6, 30), torch.float32, device, ignored=0)
    expected = cross_entropy(logits, labels, reduction="none")
    assert torch.equal(cross_entropy(logits, labels.int(), reduction="none"), expected)
    assert torch.equal(cross_entropy(logits, labels, reduction="none", ignore_index=-1), expected)
    zeroed = cross_entropy(logits, labels, reduction="none", ignore_index=int(labels[2]))
    assert torch.equal(zeroed, expected.where(labels != labels[2], 0))


def test_logits_past_the_range_of_exp(device):
    logits = torch.tensor([[6e4, -6e4, 0.0], [-6e4, -6e4, -6e4]], dtype=torch.float16, device=device)
    labels = torch.tensor([1, 2], device=device)
    losses, dlogits = run(ours, logits, labels, torch.ones(2, device=device))
    torch.testing.assert_close(losses, torch.tensor([120000.0, math.log(3)], device=device))
    torch.testing.assert_close(dlogits[0], torch.tensor([1.0, -1.0, 0.0], dtype=torch.float16, device=device))


@pytest.mark.parametrize("V", [7, 20000])
def test_masked_columns(V, device):
    """-inf, as of columns that may not be chosen, also a whole lane and a whole block of them."""
    logits, labels = inputs((2, V), torch.float32, device, ignored=0)
    logits[:, : V // 2], labels = -torch.inf, labels.clamp(min=V // 2)
    found = (run(loss_of, logits, labels, torch.ones(2, device=device)) for loss_of in (ours, theirs))
    for mine, torchs in zip(*found, strict=True):
        torch.testing.assert_close(mine, torchs)


def test_labels_that_are_no_column_are_nan(device):
    """What a GPU does with them, where nothing looks at labels before; nothing beyond the row is read."""
    logits, labels = torch.randn(3, 40, device=device), torch.tensor([40, -1, 2**40], device=device)
    loss, largest, total = torch.empty(3, 3, device=device)
    module.launch_forward(logits, labels, Terms(), loss, largest, total)
    assert loss.isnan().all() and total.isfinite().all() and torch.equal(largest, logits.amax(-1))


def test_reference_gradients():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, -100, 6, 3])
    for kind in KINDS.values():
        assert torch.autograd.gradcheck(lambda x, kind=kind: truth_of(x, labels, **kind), logits)


def test_saves_its_inputs_and_two_numbers_a_row(device):
    logits, labels = inputs((5, 40), torch.float32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(logits.requires_grad_(), labels)
    new = [t for t in saved if t.data_ptr() not in (logits.data_ptr(), labels.data_ptr())]
    assert [(t.shape, t.dtype) for t in new] == [((5,), torch.float32)] * 2


def test_gradient_written_over_the_logits(dtype, device):
    logits, labels = inputs((6, 1500), dtype, device)
    expected = run(ours, logits, labels, torch.ones(6, device=device))[1]
    owned = (logits.clone().requires_grad_() * 1).detach().requires_grad_()
    loss = cross_entropy(owned, labels, reduction="sum", overwrite_logits=True)
    (dlogits,) = torch.autograd.grad(loss, owned, retain_graph=True)
    assert torch.equal(dlogits, expected) and dlogits.data_ptr() == owned.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_second_derivative(device):
    logits, labels = inputs((2, 8), torch.float32, device, ignored=0)
    logits.requires_grad_()
    (dlogits,) = torch.autograd.grad(cross_entropy(logits, labels).square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dlogits.sum().backward()


def test_autocast_changes_nothing(dtype, device):
    logits, labels = inputs((4, 96), dtype, device)
    plain = run(ours, logits, labels, torch.ones(4, device=device))
    with torch.autocast(device, torch.bfloat16):
        cast = run(ours, logits, labels, torch.ones(4, device=device))
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_same_bits_every_time(dtype, device):
    logits, labels = inputs((9, 3000), dtype, device)
    first, second = (run(ours, logits, labels, torch.ones(9, device=device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_gradient_in_the_forward(kind, dtype, device):
    """What linear_cross_entropy launches: the same losses, and dlogits over the logits."""
    logits, labels = inputs((7, 1500), dtype, device)
    terms, dloss = Terms(**KINDS[kind]), torch.tensor(0.25, device=device)
    expected = run(ours, logits, labels, dloss.expand(7), **KINDS[kind])
    loss = torch.empty(7, device=device)
    module.launch_forward(logits, labels, terms, loss, dlogits=logits, dloss=dloss)
    torch.testing.assert_close(loss, expected[0], rtol=SLACK, atol=SLACK)
    torch.testing.assert_close(logits, expected[1], rtol=torch.finfo(dtype).eps, atol=SLACK)


def test_offsets_past_2_to_the_31(device):
    stride, rows, V = 2**30, 3, 24
    memory = torch.UntypedStorage((stride * (rows - 1) + V) * 2, device=device)  # 4 GiB of addresses, few touched
    far = torch.empty(0, dtype=torch.float16, device=device).set_(memory, 0, (rows, V), (stride, 1))
    logits, labels = inputs((rows, V), torch.float16, device, ignored=0)
    dloss, loss = torch.ones((), device=device), torch.empty(rows, device=device)
    expected = run(ours, logits, labels, dloss.expand(rows))
    far.copy_(logits)
    for result, due in zip(run(ours, far, labels, dloss.expand(rows)), expected, strict=True):
        assert torch.equal(result, due)
    module.launch_forward(far, labels, Terms(), loss, dlogits=far, dloss=dloss)
    torch.testing.assert_close(far, expected[1], rtol=torch.finfo(torch.float16).eps, atol=SLACK)


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits(device):
    M, V = 16400, 131072
    if torch.cuda.mem_get_info()[0] < 3 * M * V * 2:
        pytest.skip("needs 12 GiB of free GPU memory")
    logits = torch.zeros(M, V, dtype=torch.float16, device=device)
    labels = torch.full((M,), V - 1, device=device)
    losses, dlogits = run(ours, logits, labels, torch.ones(M, device=device))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(V)))
    assert dlogits[:, -1].float().add(1).abs().max() < 1e-3 and (dlogits[:, 0] > 0).all()


@pytest.mark.gpu
def test_compiled_graphs_and_cuda_graphs(device):
    logits, labels = inputs((64, 1000), torch.float16, device)
    dloss = torch.ones(64, device=device)
    expected = run(ours, logits, labels, dloss)
    compiled = run(torch.compile(ours, fullgraph=True), logits, labels, dloss)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))
    x, graph = logits.clone().requires_grad_(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = cross_entropy(x, labels)
        (dx,) = torch.autograd.grad(loss, x)
    graph.replay()
    eager = cross_entropy(x, labels)
    assert torch.equal(loss, eager) and torch.equal(dx, torch.autograd.grad(eager, x)[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, y: ((x.long(), y), {}), "logits has dtype torch.int64"),
        (lambda x, y: ((x.double(), y), {}), "logits has dtype torch.float64"),
        (lambda x, y: ((x, y.float()), {}), "labels is torch.float32"),
        (lambda x, y: ((x, 3), {}), "labels is int"),
        (lambda x, y: ((x, y[1:]), {}), r"labels has shape \(1,\) on .*; one for each row is \(2,\)"),
        (lambda x, y: ((x, y.to("meta")), {}), r"labels has shape \(2,\) on meta; one for each row is \(2,\) on c"),
        (lambda x, y: ((x[:, :0], y), {}), r"logits has shape \(2, 0\)"),
        (lambda x, y: ((x.sum(), y), {}), r"logits has shape \(\)"),
        (lambda x, y: ((x, y), {"reduction": "max"}), "reduction is 'max'"),
        (lambda x, y: ((x, y), {"reduction": "sum", "num_items_in_batch": 3}), "num_items_in_batch is for"),
        (lambda x, y: ((x, y), {"num_items_in_batch": y}), r"num_items_in_batch has shape \(2,\)"),
        (lambda x, y: ((x, y), {"label_smoothing": 1.5}), "label_smoothing is 1.5"),
        (lambda x, y: ((x, y), {"softcap": 0.0}), "softcap is 0.0"),
        (lambda x, y: ((x.T, y.repeat(4)), {"overwrite_logits": True}), "overwrite_logits needs contiguous"),
        (lambda x, y: ((x.to("meta"), y.to("meta")), {}), "logits is on device meta; move it"),
    ],
)
def test_clear_errors(wrong, message, device):
    arguments, keywords = wrong(*inputs((2, 8), torch.float32, device, ignored=0))
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        cross_entropy(*arguments, **keywords)
    assert str(caught.value).startswith("cross_entropy: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [8, -1, -99])
def test_labels_out_of_range_on_the_cpu(label):
    with pytest.raises(ValueError, match=f"labels has {label}; give 0 to 7, or -100"):
        cross_entropy(torch.randn(2, 8), torch.tensor([3, label]))


WRONG = {
    "ignored rows counted": lambda x, y, **k: truth_of(x.float(), y.clamp(min=0), **k),
    "no cap": lambda x, y, softcap, **k: truth_of(x.float(), y, **k),
    "cap taken for a constant": lambda x, y, softcap, **k: truth_of(
        x.float() + (softcap * torch.tanh(x.float() / softcap) - x.float()).detach(), y, **k
    ),
    "smoothing of the others alone": lambda x, y, label_smoothing, **k: truth_of(
        x.float(), y, label_smoothing=label_smoothing * 99 / 100, **k
    ),
    "z-loss of the maximum": lambda x, y, z_loss, **k: (
        truth_of(x.float(), y, **k) + (z_loss * x.float().amax(-1) ** 2).where(y != -100, 0)
    ),
    "softmax in fp16": lambda x, y, **k: truth_of(x.float(), y, **k) - x.float().logsumexp(-1).where(y != -100, 0)
    + x.logsumexp(-1).float().where(y != -100, 0),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_losses_are_caught(wrong):
    logits, labels = inputs((60, 100), torch.float16, "cpu")
    check(truth_of, logits, labels, **ALL_TERMS)
    with pytest.raises(AssertionError, match=r"error|not finite"):
        check(WRONG[wrong], logits, labels, **ALL_TERMS)
