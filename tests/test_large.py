"""Tensors of more than 2^31 numbers, where an offset of 32 bits wraps. AdamW's is in test_adamw_compiled.py.

All numbers are 0 but those of some rows, the last beyond the 2^31st number. These must be right, and all others 0, so
that what was read or written in a wrong place shows.
"""

import gc

import pytest
import torch
import torch.nn.functional as F
from attention_case import check as check_attention
from attention_case import inputs
from test_lora_gradients import check as check_lora
from test_merged_dequantize import SCALING
from test_merged_dequantize import check as check_merged
from test_nf4_matvec import check as check_matvec
from test_rope import table
from tolerance import SLACK, assert_as_close_as_torch

from fastkit.kernels import (
    add_rms_norm,
    cross_entropy,
    geglu,
    linear_cross_entropy,
    merged_dequantize,
    nf4,
    rms_norm,
    rope,
    swiglu,
)
from fastkit.kernels.loss_terms import Terms
from fastkit.ops import (
    attention,
    attention_varlen,
    dequantize_nf4,
    lora_gradients,
    merged_dequantize_fp8,
    nf4_matvec,
    quantize_nf4,
    weight_bounds,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned", "fresh_seed")]

BEYOND = 2**31
N = 4096  # numbers in a row
M = BEYOND // N + 300  # rows


def needs(gib: int) -> None:
    """Skip the test where less GPU memory is free."""
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory and there are {free:.1f}")


def places(rows: int) -> list[slice]:
    """The rows that are not 0: four at the start, in the middle and at the end, at multiples of 4."""
    return [slice(start, start + 4) for start in (0, rows // 8 * 4, rows - 4)]


def taken(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The rows of x, counted in `dim`, that are not 0."""
    return torch.cat([x.narrow(dim, rows.start, 4) for rows in places(x.shape[dim])], dim)


def sparse(*shape: int, device: str, dim: int = 0, dtype=torch.float16) -> torch.Tensor:
    x = torch.zeros(shape, dtype=dtype, device=device)
    for rows in places(shape[dim]):
        part = x.narrow(dim, rows.start, 4)
        part.copy_(torch.randn(part.shape, device=device))
    return x


def run(op, rows, whole, gradients) -> list[torch.Tensor]:
    """What `op` returns for tensors of rows and others, then the gradients of all that have one."""
    given = [x.detach().requires_grad_() if x.is_floating_point() else x for x in (*rows, *whole)]
    outputs = op(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, gradients)
    return [x.detach() for x in outputs] + [x.grad for x in given if x.is_floating_point()]


def check(op, reference, rows, whole, gradients, dim: int = 0) -> list[torch.Tensor]:
    """Assert that results of `op` are right in the rows that are not 0, and 0 in all others; return them.

    rows       tensors with rows in `dim`, as all results have, but for the gradients of `whole`
    reference  op in torch and, given float64, the truth
    """

    def doubled(tensors):
        return [x.double() if x.is_floating_point() else x for x in tensors]

    few, due = ([taken(x, dim) for x in tensors] for tensors in (rows, gradients))
    ours = run(op, rows, whole, gradients)
    theirs = run(reference, few, whole, due)
    truth = run(reference, doubled(few), doubled(whole), doubled(due))
    size = rows[0].shape[dim]
    for i, (mine, other, true) in enumerate(zip(ours, theirs, truth, strict=True)):
        in_rows = mine.shape != true.shape
        assert_as_close_as_torch(taken(mine, dim) if in_rows else mine, other, true, f"result {i}")
        if in_rows:
            assert mine.shape[dim] == size and mine.count_nonzero() == taken(mine, dim).count_nonzero(), f"result {i}"
    return ours


@pytest.mark.parametrize("columns", [N, 2 * rms_norm.MAX_BLOCK_N], ids=["a block", "longer than a block"])
def test_rms_norm(columns, device):
    needs(24)
    x, dy = (sparse(BEYOND // columns + 300, columns, device=device) for _ in range(2))
    weight = torch.randn(columns, dtype=torch.float16, device=device)
    check(rms_norm.rms_norm, rms_norm.reference, [x], [weight], [dy])


def test_add_rms_norm(device):
    needs(48)
    rows = [sparse(M, N, device=device) for _ in range(4)]
    weight = torch.randn(N, dtype=torch.float16, device=device)
    check(add_rms_norm.add_rms_norm, add_rms_norm.reference, rows[:2], [weight], rows[2:])


@pytest.mark.parametrize("layout", ["one row", "halves"])
@pytest.mark.parametrize("module", [swiglu, geglu], ids=["swiglu", "geglu"])
def test_gated(module, layout, device):
    needs(32)
    op = {swiglu: swiglu.swiglu, geglu: geglu.geglu}[module]
    if layout == "one row":
        gate, up = (sparse(M, N, device=device) for _ in range(2))
    else:
        gate, up = sparse(M, N, device=device).chunk(2, -1)
    check(op, module.reference, [gate, up], [], [sparse(*gate.shape, device=device)])


@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
def test_rope(layout, device):
    needs(24)
    heads, D = 32, N // 32
    B, T = (3, M // 12 * 4 + 4) if layout == "tokens first" else (1, M)

    def rows(heads):
        if layout == "tokens first":
            return sparse(B, T, heads, D, device=device, dim=1).transpose(1, 2)
        return sparse(B, heads, T, D, device=device, dim=2)

    angles = table(T, D, device)
    few = [taken(x) for x in angles]
    check(
        lambda q, k: rope.rope(q, k, *angles), lambda q, k: rope.reference(q, k, *few),
        [rows(heads), rows(2)], [], [rows(heads), rows(2)], dim=2,
    )  # fmt: skip


def test_cross_entropy(device):
    needs(16)
    V = 2**17
    rows = BEYOND // V + 300
    logits = sparse(rows, V, device=device)
    labels = torch.full((rows,), -100, device=device)
    for place in places(rows):
        labels[place] = torch.randint(V, (4,), device=device)
    _, dlogits = check(
        lambda logits: cross_entropy.cross_entropy(logits, labels, reduction="none"),
        lambda logits: cross_entropy.reference(logits, taken(labels), Terms()),
        [logits], [], [torch.ones(rows, device=device)],
    )  # fmt: skip
    loss, dloss = torch.empty(rows, device=device), torch.ones((), device=device)
    cross_entropy.launch_forward(logits, labels, Terms(), loss, dlogits=logits, dloss=dloss)  # in place, in one pass
    torch.testing.assert_close(taken(logits), taken(dlogits), rtol=torch.finfo(logits.dtype).eps, atol=SLACK)
    assert logits.count_nonzero() == taken(logits).count_nonzero()


def test_linear_cross_entropy(device):
    """With a gradient that the backward has to multiply by, in a pass over all of dhidden."""
    needs(16)
    V = 64
    hidden = sparse(M, N, device=device).requires_grad_()
    weight = torch.randn(V, N, device=device).half() / N**0.5
    labels = torch.full((M,), -100, device=device)
    for place in places(M):
        labels[place] = torch.randint(V, (4,), device=device)
    (0.3 * linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, kept="all")).backward()
    few = taken(hidden.detach()).double().requires_grad_()
    losses = linear_cross_entropy.reference(few, weight.double(), taken(labels), None, Terms())
    (0.3 * losses.mean()).backward()
    bound = 2 * torch.finfo(hidden.dtype).eps * few.grad.abs().max().item()  # dlogits and dhidden are rounded
    torch.testing.assert_close(taken(hidden.grad).double(), few.grad, rtol=0, atol=bound)
    assert hidden.grad.count_nonzero() == taken(hidden.grad).count_nonzero()


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "packed"])
def test_attention(layout, device):
    """The last queries of the last head, behind so many zeros that q has more than 2^31 numbers."""
    needs(40)
    D, T, window, few = 128, 2**17, 64, 256
    heads = BEYOND // (T * D) + 2
    cu = torch.tensor([0, T // 2 + 8, T], dtype=torch.int32, device=device)

    def attend(q, k, v, *options):
        def behind_zeros(x, heads):
            if layout == "heads first":
                return F.pad(x, (0, 0, T - x.shape[2], 0, heads - 1, 0))
            return F.pad(x.transpose(1, 2), (0, 0, heads - 1, 0, T - x.shape[2], 0)).transpose(1, 2)

        q, k, v = behind_zeros(q, heads), behind_zeros(k, 1), behind_zeros(v, 1)
        assert q.numel() > BEYOND
        if layout == "packed":
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            return attention_varlen(q, k, v, cu, T, *options).transpose(0, 1)[None, -1:, -few:]
        return attention(q, k, v, *options)[:, -1:, -few:]

    q, k, v = inputs(1, 1, 1, few, few + window, D, torch.float16, device)
    check_attention(attend, q, k, v, True, window)


@pytest.mark.parametrize(("K", "outputs", "r"), [(N, 64, 16), (64, N, 16), (64, N, 64)])
def test_lora_gradients(K, outputs, r, device):
    needs(16)
    x, dy = sparse(M, K, device=device), sparse(M, outputs, device=device)
    A, B = (0.1 * torch.randn(shape, device=device).half() for shape in ((r, K), (outputs, r)))
    found = lora_gradients(x, [dy], [A], [B], [0.5])
    check_lora(taken(x), [taken(dy)], [A], [B], [0.5], gradients=lambda *_: found)


def random_weight(device) -> nf4.NF4Weight:
    """[M, N], of random bytes."""
    weight = nf4.empty_nf4((M, N), torch.bfloat16, device=device)
    for x in (weight.packed, weight.absmax):
        x.random_(0, 256)
    weight.nested_absmax.uniform_(0.5, 1)
    weight.nested_code.copy_(torch.linspace(-1, 1, 256))
    weight.offset.fill_(2)
    return weight


def rows_of(weight: nf4.NF4Weight, rows: slice) -> nf4.NF4Weight:
    """Some rows of `weight`, as many as share a nested_absmax."""
    blocks = N // weight.blocksize

    def part(x, numbers):
        return x[rows.start * numbers : rows.stop * numbers]

    nested = weight.nested_absmax[rows.start * blocks // 256 : rows.stop * blocks // 256]
    return nf4.NF4Weight(
        part(weight.packed, N // 2), part(weight.absmax, blocks), (4, N), weight.dtype, weight.blocksize,
        weight.code, weight.offset, nested, weight.nested_code,
    )  # fmt: skip


def test_quantize_nf4(device):
    needs(12)
    x = sparse(M, N, device=device, dtype=torch.bfloat16)
    weight, few = quantize_nf4(x), quantize_nf4(taken(x))
    packed = weight.packed.view(M, -1)
    assert torch.equal(taken(packed), few.packed.view(12, -1))
    assert torch.equal(taken(weight.absmax.view(M, -1)), few.absmax.view(12, -1))
    zeros = packed == packed[4, 0]  # two indices of 0
    assert zeros.logical_not().count_nonzero() == taken(zeros).logical_not().count_nonzero()


def test_dequantize_nf4(device):
    needs(12)
    weight = random_weight(device)
    w = dequantize_nf4(weight)
    for rows in places(M):
        assert torch.equal(w[rows], nf4.reference(rows_of(weight, rows)))


@pytest.mark.parametrize("transposed", [False, True])
def test_merged_dequantize(transposed, device):
    needs(12)
    weight = random_weight(device)
    A, B = (0.1 * torch.randn(shape, device=device).bfloat16() for shape in ((16, N), (M, 16)))
    w = merged_dequantize.merged_dequantize(weight, A, B, SCALING, transposed=transposed)
    for rows in places(M):
        found = w[:, rows].T if transposed else w[rows]
        check_merged(rows_of(weight, rows), A, B[rows], merge=lambda *_, found=found: found)


@pytest.mark.parametrize("transposed", [False, True])
def test_merged_dequantize_fp8(transposed, device):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("GPUs before sm_89 have no FP8")
    needs(16)
    weight = random_weight(device)
    A, B = (0.1 * torch.randn(shape, device=device).bfloat16() for shape in ((16, N), (M, 16)))
    bounds = weight_bounds(weight)
    w8, scale = merged_dequantize_fp8(weight, bounds[transposed], A, B, SCALING, transposed=transposed)
    for rows in places(M):
        few = rows_of(weight, rows)
        assert torch.equal(bounds[0][rows], weight_bounds(few)[0])
        true = merged_dequantize.reference(few, A, B[rows], SCALING, torch.float64)
        found, each = (w8[:, rows].T, scale[None, :]) if transposed else (w8[rows], scale[rows, None])
        bound = (2**-4 + 1e-6) * true.abs() + 2**-10 * each  # half of the last of 4 significant bits, or of the least
        assert ((found.double() * each - true).abs() <= bound).all()


@pytest.mark.parametrize(("rows_x", "dtype"), [(1, torch.float32), (3, torch.float16)], ids=str)
def test_nf4_matvec(rows_x, dtype, device):
    needs(8)
    weight, x = random_weight(device), torch.randn(rows_x, N, device=device).to(dtype)
    y = nf4_matvec(x, weight)
    for rows in places(M):
        check_matvec(x, rows_of(weight, rows), matvec=lambda *_, rows=rows: y[:, rows])
