"""The fused decoder layer: its gradients against float64, every plan, dropout, what it keeps."""

import copy

import pytest
import torch
from fused_case import WINDOWED, batch, fused, in_float64, layers_of, model_of, run_layer, table, window_mask
from tiny import ARCHITECTURES, SHAPE
from tolerance import assert_as_close_as_torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastkit.kernels import attention, rope
from fastkit.models import attend, pieces, projection
from fastkit.models.half import Half
from fastkit.models.patch import patch
from fastkit.models.plans import PLANS
from fastkit.models.projection import Group, read


def inputs(B=2, T=13, dtype=torch.float32):
    return (torch.randn(B, T, SHAPE["hidden_size"], dtype=dtype) for _ in range(2))


def check_layer(model, x, dy, plan="keep", x_grad=True):
    ours = run_layer(fused(model, plan), x, dy, x_grad=x_grad)
    theirs = run_layer(model, x, dy, x_grad=x_grad)
    truth = run_layer(in_float64(model), x.double(), dy.double(), x_grad=x_grad)
    assert ours.keys() == theirs.keys() == truth.keys()
    for name in truth:  # the rule is for one operation; up to four products lie between dy and a gradient
        assert_as_close_as_torch(ours[name], theirs[name], truth[name], name, scale=4 * truth[name])


# --- gradients


@pytest.mark.parametrize("quantize", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_layer_is_as_close_to_the_truth_as_transformers(folder, references, fresh_seed, arch, quantize):
    check_layer(model_of(folder, arch, quantize), *inputs())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_norms_learn_where_they_may_and_the_first_layer_needs_no_dx(folder, references, fresh_seed, arch):
    model = model_of(folder, arch)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("layernorm.weight"))
    check_layer(model, *inputs())
    check_layer(model, *inputs(), x_grad=False)


def test_some_adapters_alone_may_learn(folder, references, fresh_seed):
    model = model_of(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj.lora_A" in name or "down_proj.lora_B" in name)
    check_layer(model, *inputs())
    check_layer(model, *inputs(), x_grad=False)


def test_biases_on_every_projection(folder, references, fresh_seed):
    check_layer(model_of(folder, "llama", attention_bias=True, mlp_bias=True), *inputs())


@pytest.mark.parametrize("arch", ["mistral", "qwen3"])
def test_a_layer_through_the_kernels(folder, fresh_seed, arch):
    """The launchers, interpreted: attention in one with a window, norms of q and k in the other."""
    check_layer(model_of(folder, arch, **({"sliding_window": 4} if arch == "mistral" else {})), *window_inputs(arch))


def window_inputs(arch):
    return inputs(B=1, T=4 if arch == "mistral" else 7)


@pytest.mark.parametrize(
    ("arch", "kernels"),
    [*((arch, "references") for arch in ARCHITECTURES), ("qwen2", "interpreted"), ("qwen3", "interpreted")],
)
def test_every_plan_gives_the_same_gradients(folder, monkeypatch, fresh_seed, arch, kernels):
    if kernels == "references":
        monkeypatch.setattr("fastkit.kernels.common.INTERPRETED", False)
    model, (x, dy) = model_of(folder, arch), inputs(B=1, T=5 if kernels == "interpreted" else 50)
    kept = run_layer(fused(model, "keep"), x, dy)
    for plan in PLANS:
        for name, gradient in run_layer(fused(model, plan), x, dy).items():
            if PLANS[plan].chunks == 1:
                assert torch.equal(gradient, kept[name]), (plan, name)
            else:  # products of other shapes, and sums over tokens that are taken in parts
                torch.testing.assert_close(gradient, kept[name], rtol=1e-5, atol=1e-5 * kept[name].abs().max().item())


def test_16_bits_are_as_close_as_transformers(folder, fresh_seed):
    """fp16 through the kernels, with adapters in fp32, as a GPU before sm_80 or a user of fp16 has it."""
    model = model_of(folder, quantize=False)
    half = copy.deepcopy(model)
    for name, parameter in half.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.half()
            dict(model.named_parameters())[name].data = parameter.data.float()  # the truth has the same weights
    x, dy = (t.half() for t in inputs(B=1, T=6))
    check_16_bits(fused(half), half, in_float64(model), x, dy)


def check_16_bits(ours, theirs, exact, x, dy, mask=None):
    """On the whole, and not number by number: transformers rounds in other places."""
    ours, theirs = run_layer(ours, x, dy, mask), run_layer(theirs, x, dy, mask)
    truth = run_layer(exact, x.double(), dy.double(), mask)
    for name in truth:
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = ((r[name].double() - truth[name]).norm() for r in (ours, theirs))
        assert error <= 1.25 * allowed + 1e-3 * truth[name].norm(), f"{name}: {error:.2e}, theirs {allowed:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bf16_on_a_gpu_is_as_close_as_transformers(folder, fresh_seed, arch, plan):
    model = model_of(folder, arch, device="cuda", dtype="bf16", **WINDOWED.get(arch, {}))
    x, dy = (t.to("cuda", torch.bfloat16) for t in inputs(B=2, T=150))
    mask = window_mask(arch, 150, "cuda")
    check_16_bits(fused(model, plan), model, in_float64(model), x, dy, mask)


def attend_case(backend, device, dtype, monkeypatch, options, T=40):
    """Gradients through `attend` by `backend`, from q, k, v as they lie in a stacked projection, beside float64's."""
    monkeypatch.setattr(attend, "_backend", lambda *args: backend)
    B, H, H_k, D = 2, 4, 2, 64
    qkv = torch.randn(B, T, (H + 2 * H_k) * D, dtype=dtype, device=device)
    do = torch.randn(B, T, H, D, dtype=dtype, device=device).transpose(1, 2)

    def split(x):
        parts = x.split([H * D, H_k * D, H_k * D], 2)
        return [part.unflatten(2, (-1, D)).transpose(1, 2) for part in parts]

    attended = attend.attend(*split(qkv), options)
    dqkv = torch.full_like(qkv, torch.nan)
    angles = torch.rand(1, T, D // 2, dtype=torch.float64, device=device).repeat(1, 1, 2)
    turns = angles.cos().to(dtype), angles.sin().to(dtype)
    attend.attend_backward(do, *split(qkv), attended, options, *split(dqkv), turns)
    exact = [x.detach().double().requires_grad_() for x in split(qkv)]
    o = attention.reference(*exact, True, options.window, options.scale)
    dq, dk, dv = torch.autograd.grad(o, exact, do.double())
    grads = *rope.reference(dq, dk, turns[0].double(), -turns[1].double()), dv
    for ours, truth in zip([attended.o, *split(dqkv)], [o, *grads], strict=True):
        error = (ours.double() - truth).norm() / truth.norm()
        assert error <= {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("backend", ["ours", "torch"])
def test_attention_by_each_backend(device, monkeypatch, fresh_seed, backend, window):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    attend_case(backend, device, dtype, monkeypatch, attend.Attend(0.1, window), T=40 if device == "cuda" else 9)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_torchs_attention_forward_and_backward_apart(monkeypatch, fresh_seed, backend):
    attend_case(backend, "cuda", torch.bfloat16, monkeypatch, attend.Attend(0.1))


# --- dropout


def test_dropout_is_that_of_peft_given_the_same_masks(folder, references, monkeypatch, fresh_seed):
    model = model_of(folder, dropout=0.25)

    def mask_of(x):
        flat = torch.rand(x.numel(), generator=torch.Generator().manual_seed(x.shape[-1]))
        return (flat >= 0.25).to(x.dtype).view(x.shape) / 0.75

    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x * mask_of(x))
    monkeypatch.setattr(Group, "_dropped", lambda self, x, j: (x * mask_of(x), mask_of(x)))
    x, dy = inputs()
    ours, theirs = run_layer(fused(model), x, dy), run_layer(model, x, dy)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-5, rtol=2e-5, msg=name)


@pytest.mark.parametrize("plan", PLANS)
def test_dropout_follows_the_seed_under_every_plan(folder, references, plan):
    model = model_of(folder, dropout=0.5)
    x, dy = inputs()

    def run(plan, seed):
        torch.manual_seed(seed)
        return run_layer(fused(model, plan), x, dy)

    # chunks of tokens draw masks of their own, so these are compared with themselves
    kept, same, other = run("keep" if PLANS[plan].chunks == 1 else plan, 0), run(plan, 0), run(plan, 1)
    assert all(torch.equal(gradient, same[name]) for name, gradient in kept.items())
    assert not torch.equal(kept["y"], other["y"])


def test_dropout_has_the_right_mean_and_is_off_in_eval(folder, references):
    model = model_of(folder, dropout=0.5)
    ours = fused(model)
    x, dy = inputs(B=1, T=4)
    torch.manual_seed(0)
    attention = layers_of(ours)[0].self_attn
    group_y = []
    with torch.no_grad():
        flat = x.view(-1, x.shape[-1])
        for _ in range(2000):
            group_y.append(Group([read(attention.v_proj)], torch.float32).forward(flat))
        plain = Group([read(attention.v_proj.eval())], torch.float32).forward(flat)
    mean, spread = torch.stack(group_y).mean(0), torch.stack(group_y).std(0)
    assert spread.min() > 0
    assert ((mean - plain).abs() <= 5 * spread / 2000**0.5).all()

    model.eval(), ours.eval()
    check = run_layer(ours, x, dy), run_layer(model, x, dy)
    for name, gradient in check[1].items():
        torch.testing.assert_close(check[0][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


# --- learning


@pytest.mark.parametrize("plan", ["keep", "recompute-all"])
def test_losses_are_those_of_transformers_step_by_step(folder, references, plan):
    torch.manual_seed(0)
    tokens = [batch([16, 9]), batch([12, 14])]
    curves = []
    stock = model_of(folder)
    for model in (fused(stock, plan), stock):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for n in range(12):
            loss = model(**tokens[n % 2], use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[1][0] - curves[1][-1] > 0.1, "it learns nothing"
    assert (curves[0] - curves[1]).abs().max() <= 1e-4


def test_accumulated_gradients_add_up(folder, references):
    model, (first, second) = model_of(folder), (batch([7]), batch([5]))
    ours = fused(model)
    for m in (ours, model):
        m.zero_grad()
        for tokens in (first, second):
            m(**tokens, use_cache=False).loss.backward()
    for (name, p), q in zip(ours.named_parameters(), model.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_sets_the_dtype_of_products(folder, references, dtype, monkeypatch):
    """And of the adapters: of the copies that are merged into the weights come their gradients too."""
    given, real = [], projection.lora_gradients

    def seen(x, dys, As, Bs, *rest, **options):
        given.extend((*As, *Bs))
        return real(x, dys, As, Bs, *rest, **options)

    monkeypatch.setattr(projection, "lora_gradients", seen)
    model, (x, dy) = model_of(folder, quantize=False), inputs(B=1, T=6)
    ours = fused(model)
    exact = run_layer(ours, x, dy)
    layer = layers_of(ours)[0]
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = layer(x, position_embeddings=table(ours, 6))
    kept = y.grad_fn.half.kept.here["hidden"]
    assert y.dtype == torch.float32 and kept.dtype == dtype
    layer.zero_grad()
    y.backward(dy)
    error = (x.grad - exact["x"]).norm() / exact["x"].norm()
    assert 0 < error < 0.02
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)
    assert [tensor.dtype for tensor in given[-14:]] == [dtype] * 14


# --- what is kept, and computed again


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("plan", "again"), [("keep", 0), ("recompute-mlp", 1), ("recompute-mlp-qkv", 2), ("recompute-all", 3)]
)
def test_no_product_is_computed_again_that_is_not_needed(folder, references, plan, again):
    model = fused(model_of(folder, quantize=False, lora=False), plan)
    with Products() as products:
        run_layer(model, *inputs())
    assert products.count == 4 + 4 + again  # forward, the gradients of the inputs, and what was not kept
    attends = []
    run = attend.attend
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(attend, "attend", lambda *args: attends.append(1) or run(*args))
        run_layer(model, *inputs())
    assert len(attends) == (2 if plan == "recompute-all" else 1)


@pytest.mark.parametrize(
    ("plan", "dropout", "again"),
    [("keep", 0.0, 0), ("recompute-mlp", 0.0, 1), ("recompute-mlp-qkv", 0.0, 2), ("keep", 0.5, 2)],
)
def test_no_norm_is_computed_again_but_for_a_product_or_dropout(
    folder, references, plan, dropout, again, monkeypatch
):  # fmt: skip
    norms, norm = [], pieces.norm
    monkeypatch.setattr(pieces, "norm", lambda *args: norms.append(1) or norm(*args))
    run_layer(fused(model_of(folder, dropout=dropout), plan), *inputs())
    assert len(norms) == 2 + again


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_keeps_what_it_says(folder, references, plan):
    model = fused(model_of(folder), plan)
    B, T, K, heads, key_heads, D, I = 2, 8, 64, 4, 2, 16, 128
    x = torch.randn(B, T, K, requires_grad=True)
    y = layers_of(model)[0](x, position_embeddings=table(model, T))
    second = y.grad_fn.half
    first = next(f.half for f, _ in y.grad_fn.next_functions if f is not None and hasattr(f, "half"))
    kept = [half.kept for half in (first, second) if half.kept is not None]
    size = sum(tensor.numel() for one in kept for tensor in (one.here or one.away).values() if one.here)
    size += sum(buffer.data.numel() for one in kept if not one.here for buffer, _, _ in one.away.values())
    Q, N = heads * D, key_heads * D
    numbers = {
        "keep": 2 * K + 2 * Q + 2 * N + 2 * I,
        "recompute-mlp": 2 * K + 2 * Q + 2 * N,
        "recompute-mlp-qkv": 2 * K + Q,
        "recompute-all": K,
    }
    assert size == B * T * numbers[plan.replace("leanest", "recompute-mlp-qkv").removesuffix("+offload")]
    y.sum().backward()
    assert y.grad_fn.half is None
    assert isinstance(first, Half) and first.kept is first.attended is second.kept is second.hidden is None


def test_what_cannot_be_is_said(folder, references):
    model, (x, dy) = fused(model_of(folder)), inputs()
    layer = layers_of(model)[0]
    y = layer(x.requires_grad_(), position_embeddings=table(model, x.shape[1]))
    y.backward(dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        y.backward(dy)
    x = x.detach()
    y = layer(x, position_embeddings=table(model, x.shape[1]))
    x += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward(dy)


def test_a_graph_without_gradients_keeps_nothing(folder, references):
    model = model_of(folder, lora=False)
    patch(model)
    (x, _) = inputs()
    y = layers_of(model)[0](x, position_embeddings=table(model, x.shape[1]))
    assert not y.requires_grad
