"""compute="fp8": the products of frozen weights in FP8, in a group, a layer and a model."""

import pytest
import torch
from cards import needs_fp8
from fused_case import BATCH, WINDOWED, batch, fused, give_b, in_float64, model_of, run_layer, step, window_mask
from tiny import ARCHITECTURES, SHAPE

from fastkit.errors import FastkitError
from fastkit.kernels import merged_dequantize as merging
from fastkit.models import attend, pieces, products
from fastkit.models.patch import fused_layers, patch, patched, unpatch
from fastkit.models.plans import PLANS
from fastkit.models.products import FP8Group
from fastkit.models.projection import Adapter, Group, Projection
from fastkit.ops import dequantize_nf4, merged_dequantize_fp8, quantize_nf4, shared_scale, weight_bounds

FP8 = torch.float8_e4m3fn
pytestmark = needs_fp8


def error(ours, truth):
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


# --- a weight's scale, given; a part of a larger buffer


def adapted(N, K, r, device, size=1.0):
    weight = quantize_nf4(size * torch.randn(N, K, device=device))
    return weight, 0.1 * torch.randn(r, K, device=device), 0.1 * torch.randn(N, r, device=device)


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_scale_may_be_given(device, fresh_seed, transposed, adapter):
    weight, A, B = adapted(48, 64, 3, device)
    A, B = (A, B) if adapter else (None, None)
    bound = weight_bounds(weight)[transposed]
    w8, scale = merged_dequantize_fp8(weight, bound, A, B, 2.0, transposed=transposed)
    wide = torch.zeros(len(w8), 200, dtype=FP8, device=device)
    out = wide[:, 16 : 16 + w8.shape[1]]
    given, same = merged_dequantize_fp8(weight, None, A, B, 2.0, transposed=transposed, scale=2 * scale, out=out)
    assert given.data_ptr() == out.data_ptr() and torch.equal(same, 2 * scale)
    assert not wide[:, :16].float().any() and not wide[:, 16 + w8.shape[1] :].float().any()
    torch.testing.assert_close(2 * out.float(), w8.float(), rtol=0, atol=2**-8)  # less where it is subnormal


@pytest.mark.parametrize("counts", [(0, 0), (1, 1), (7, 5000), (130_001, 70_000)], ids=str)
def test_one_scale_for_several_weights(device, fresh_seed, dtype, counts):
    A, B = (torch.randn(n, device=device).to(dtype) for n in counts)
    scale, inverse = shared_scale(0.5, A, B, 3.0, 5001)
    assert scale.shape == inverse.shape == (5001,) and scale.dtype == torch.float32 and (scale == scale[0]).all()
    a, b = (x.double().abs().max().item() if len(x) else 0.0 for x in (A, B))
    assert scale[0].item() == pytest.approx((0.5 + 3 * a * b) / 448, rel=1e-6)
    torch.testing.assert_close(inverse, 1 / scale, rtol=2e-7, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_no_number_of_a_group_is_beyond_its_scale(fresh_seed, transposed):
    """Also where one projection has two adapters, and none."""
    group = group_of((48, 32), 64, "cpu", torch.float32)
    first, second = group.projections
    several = Projection(
        first.weight, None, (*first.adapters, Adapter(torch.randn(2, 64), torch.randn(48, 2), -3.0, 0.0)), None
    )
    for projections in ([several, second], [Projection(first.weight, None, (), None)]):
        group = FP8Group(projections, torch.float32)
        w8, scale = group.weight_fp8(transposed)
        W = torch.cat([merging.reference(p.weight, *p.stacked(), torch.float64) for p in projections])
        assert (scale == scale[0]).all() and W.abs().max() <= 448.001 * scale[0]
        assert error(w8.float() * scale[:, None], W.T if transposed else W) <= 0.04


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, b: merged_dequantize_fp8(w, None), "give either bound or scale"),
        (lambda w, b: merged_dequantize_fp8(w, b, scale=b), "give either bound or scale"),
        (lambda w, b: merged_dequantize_fp8(w, None, scale=b[1:]), "scale has shape"),
        (lambda w, b: merged_dequantize_fp8(w, b, out=torch.empty(16, 64)), "out is .*float32.* give .*float8_e4m3fn"),
        (lambda w, b: merged_dequantize_fp8(w, b, out=torch.empty(64, 16, dtype=FP8).T), "neighbours in a row"),
    ],
)
def test_clear_errors(call, message):
    weight, *_ = adapted(16, 64, 2, "cpu")
    with pytest.raises(ValueError, match=message):
        call(weight, weight_bounds(weight)[0])


# --- a group's products


def group_of(Ns, K, device, dtype, rank=4, bias=False):
    made = []
    for n, N in enumerate(Ns):
        weight, A, B = adapted(N, K, rank, device, size=10.0**-n)  # of very different sizes
        made.append(
            Projection(weight, torch.randn(N, device=device) if bias else None, (Adapter(A, B, 2.0, 0.0),), None)
        )
    return FP8Group(made, dtype)


def emulated(x, W, scale):
    """x @ W.T, in float64, of x and W rounded to e4m3 with scales of their rows, of W `scale`."""
    factors = []
    for t, s in ((x.float(), x.float().abs().amax(1) / 448), (W.float(), scale)):
        t8 = (t * (1 / s)[:, None]).clamp(-448, 448).to(FP8)  # in fp32, so that near a tie all round the same way
        factors.append(t8.double() * s[:, None])
    return factors[0] @ factors[1].T


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("Ns", [(48,), (64, 32), (32, 64, 16)], ids=str)
@pytest.mark.parametrize("M", [1, 7, 40])
def test_products_are_those_of_the_rounded_factors(device, fresh_seed, M, Ns, bias):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    group, K = group_of(Ns, 96, device, dtype, bias=bias), 96
    should = Emulated(group.projections, dtype)
    x, dy = torch.randn(M, K, device=device).to(dtype), torch.randn(M, sum(Ns), device=device).to(dtype)
    y, dx = group.forward(x), group.input_gradient(dy)
    within = 1e-3 if dtype == torch.float32 else 6e-3  # bfloat16's own rounding
    assert y.dtype == dx.dtype == dtype
    assert error(y, should.forward(x)) <= within and error(dx, should.input_gradient(dy)) <= within
    W, bias = should._weight(False)[0], 0.0 if group._bias() is None else group._bias().double()
    most = 0.05 if M > 7 else 0.13  # on the whole; of few numbers, what two roundings come to at worst
    assert 1e-3 < error(y - bias, x.double() @ W.T) <= most
    assert 1e-3 < error(dx, dy.double() @ W) <= most


class Emulated(Group):
    """A Group of plain tensors that multiplies as an FP8Group should."""

    def forward(self, x, residual=None, W=None, unscaled=False):
        y = emulated(x, *self._weight(transposed=False)) + (0.0 if self._bias() is None else self._bias().double())
        return y.to(self.dtype) if residual is None else residual + y.to(self.dtype)

    def input_gradient(self, dy, W=None, unscaled=False):
        return emulated(dy, *self._weight(transposed=True)).to(self.dtype)

    def _weight(self, transposed):
        """(W, or W.T, in float64; the scale of its rows)."""
        W = torch.cat([merging.reference(p.weight, *p.stacked(), torch.float64) for p in self.projections])
        gain = max(sum(abs(a.scaling) * len(a.A) for a in p.adapters) for p in self.projections)
        absmax = max(dequantize_nf4(p.weight, torch.float32).abs().max().item() for p in self.projections)
        W = W.T if transposed else W
        return W, shared_scale(absmax, *self.adapters_flat(), gain, len(W))[0]


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16])
def test_the_residual_is_added_in_its_dtype(fresh_seed, residual_dtype):
    group, x = group_of((48,), 64, "cpu", torch.float32), torch.randn(5, 64)
    residual = torch.randn(5, 48).to(residual_dtype)
    torch.testing.assert_close(group.forward(x, residual), (residual + group.forward(x)).to(residual_dtype))


@pytest.mark.parametrize("residual", [False, True])
def test_a_result_before_its_rows_scales(device, fresh_seed, residual):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    group, x = group_of((48, 32), 64, device, dtype), torch.randn(5, 64, device=device).to(dtype)
    dy, residual = torch.randn(5, 80, device=device).to(dtype), torch.randn(5, 80, device=device) if residual else None
    for made, whole in (
        (group.unscaled(x), group.forward(x, residual)),
        (group.input_gradient(dy, unscaled=True), group.input_gradient(dy)),
    ):
        assert isinstance(made, pieces.Unscaled) and made.numbers.dtype == dtype
        expected = made.numbers.double() * made.scale[:, None]
        expected = expected + residual if residual is not None and whole.shape == residual.shape else expected
        torch.testing.assert_close(whole.double(), expected, rtol=torch.finfo(whole.dtype).eps, atol=1e-6)
        assert pieces.joined(*pieces.apart(made)) == made and pieces.apart(whole) == (whole, None)


def test_given_rows_are_taken_as_they_are(fresh_seed):
    group, x = group_of((48,), 64, "cpu", torch.float32), torch.randn(5, 64)
    assert group.factors == FP8
    rows = pieces.quantized(x)
    assert torch.equal(group.forward(rows), group.forward(x))
    assert torch.equal(group.forward(rows._replace(scale=2 * rows.scale)), 2 * group.forward(x))


# --- a layer


def layer_inputs(B=2, T=13, dtype=torch.float32, device="cpu"):
    return (torch.randn(B, T, SHAPE["hidden_size"], device=device).to(dtype) for _ in range(2))


def check_layer(model, x, dy, plan="keep", mask=None):
    """Errors of y and x are of what the halves add to the residual stream; a gradient sees up to seven products.

    Returns the largest error beside the emulation: sums in another order, but where one such error is enough to round a
    number to its other FP8 neighbour.
    """
    ours = run_layer(fused(model, plan, "fp8"), x, dy, mask)
    emulating = fused(model, plan)
    for layer in fused_layers(emulating):
        layer.shared.group = Emulated
    emulation = run_layer(emulating, x, dy, mask)
    plain = run_layer(fused(model, plan), x, dy, mask)
    truth = run_layer(in_float64(model), x.double(), dy.double(), mask)
    assert ours.keys() == truth.keys()
    apart = []
    for name in truth:
        stream = {"y": x, "x": dy}.get(name, torch.zeros(())).double()
        within = 0.01 if x.dtype == torch.float32 else 0.1  # rounding to bfloat16 before FP8 moves some numbers there
        apart.append(error(ours[name].double() - stream, emulation[name].double() - stream))
        assert apart[-1] <= within, name
        found = error(ours[name].double() - stream, truth[name] - stream)
        assert ours[name].dtype == plain[name].dtype
        assert 1e-3 < found <= 0.25, f"{name}: {found:.3f}"
        assert found > error(plain[name].double() - stream, truth[name] - stream), f"{name} is not in FP8"
    return max(apart)


def assert_as_emulated(model, B=2, T=39):
    """In one of three draws, of adapters too, no number falls to its other neighbour. Of the tokens there are enough
    that one which does is not much of them all."""
    apart = []
    for _ in range(3):
        give_b(model)
        apart.append(check_layer(model, *layer_inputs(B, T)))
    assert min(apart) <= 1e-4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_layer_is_as_close_to_the_truth_as_four_bits_of_mantissa_allow(folder, references, fresh_seed, arch):
    assert_as_emulated(model_of(folder, arch))


def test_a_layer_through_the_interpreted_kernels(folder, fresh_seed):
    assert_as_emulated(model_of(folder, "llama"), B=1, T=5)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_layer_on_a_gpu(folder, fresh_seed, arch, plan):
    model = model_of(folder, arch, device="cuda", dtype="bf16", **WINDOWED.get(arch, {}))
    x, dy = layer_inputs(T=151, dtype=torch.bfloat16, device="cuda")
    # a small stream, lest its rounding count for more than what a layer adds
    check_layer(model, x / 4, dy, plan, window_mask(arch, 151, "cuda"))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_plan_gives_the_same_gradients(folder, references, fresh_seed, arch):
    model, (x, dy) = model_of(folder, arch), layer_inputs(B=1, T=50)
    kept = run_layer(fused(model, "keep", "fp8"), x, dy)
    for plan in PLANS:
        for name, gradient in run_layer(fused(model, plan, "fp8"), x, dy).items():
            if PLANS[plan].chunks == 1:
                assert torch.equal(gradient, kept[name]), (plan, name)
            else:  # tokens are taken in parts: a sum in another order may round a number to its FP8 neighbour
                assert (gradient - kept[name]).norm() <= 1e-3 * kept[name].norm(), (plan, name)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_the_gradients_of_q_k_and_v_come_in_fp8(folder, device, monkeypatch, fresh_seed, arch):
    """But of Qwen3, where norms come after; and no gradient is other than from a pass of its own, in any bit."""
    dtype = {"cpu": torch.float32, "cuda": torch.bfloat16}[device]
    model = model_of(folder, arch, device=device, dtype={"cpu": "fp32", "cuda": "bf16"}[device])
    x, dy = layer_inputs(B=1, T=5, dtype=dtype, device=device)
    backward, multiplied = attend.attend_backward, []
    monkeypatch.setattr(attend, "_backend", lambda *args: "torch")  # torch's own add in another order each time
    monkeypatch.setattr(FP8Group, "input_gradient", _noted(FP8Group.input_gradient, multiplied))
    found = run_layer(fused(model, "keep", "fp8"), x, dy)
    monkeypatch.setattr(attend, "attend_backward", lambda *args: backward(*args[:10]))
    expected = run_layer(fused(model, "keep", "fp8"), x, dy)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())
    ours, theirs = multiplied[: len(multiplied) // 2], multiplied[len(multiplied) // 2 :]
    assert sum(ours) - sum(theirs) == (arch != "qwen3")


def _noted(input_gradient, in_fp8):
    def call(self, dy, *args, **kwargs):
        in_fp8.append(isinstance(dy, pieces.FP8Rows))
        return input_gradient(self, dy, *args, **kwargs)

    return call


def test_some_adapters_alone_may_learn(folder, references, fresh_seed):
    model = model_of(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj.lora_A" in name or "down_proj.lora_B" in name)
    assert_as_emulated(model)


def test_bounds_are_computed_before_the_first_step_and_once(folder, references, monkeypatch):
    model = fused(model_of(folder), compute="fp8")
    monkeypatch.setattr(products, "reference_absmax", lambda weight: pytest.fail("computed in a step"))
    step(model, **BATCH)
    step(model, **BATCH)


# --- a model


def test_it_learns(folder, references):
    torch.manual_seed(0)
    tokens, curves = [batch([16, 9]), batch([12, 14])], []
    stock = model_of(folder)
    for model in (fused(stock, "keep", "fp8"), fused(stock, "leanest", "fp8"), stock):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        curve = []
        for n in range(12):
            loss = model(**tokens[n % 2], use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    ours, lean, theirs = curves
    assert theirs[0] - theirs[-1] > 0.1, "it learns nothing"
    for curve in (ours, lean):
        assert 0 < (curve - theirs).abs().max() <= 0.05 and (curve / theirs - 1).abs().mean() <= 0.003


def test_patch_takes_no_more_than_unpatch_gives_back(folder, references):
    model = model_of(folder)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    plain = step(fused(model), **BATCH)
    with patched(model, "keep", compute="fp8") as report:
        assert report.layers == SHAPE["num_hidden_layers"] and not report.left
        in_fp8 = step(model, **BATCH)
    patch(model, compute="fp8")
    assert step(model, **BATCH)[0] == in_fp8[0] != plain[0]
    unpatch(model)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    for name, attributes in before.items():
        assert after[name].keys() == attributes.keys()
        assert all(after[name][key] is value for key, value in attributes.items())
    patch(model)
    assert step(model, **BATCH)[0] == plain[0]


def test_without_gradients_nothing_is_in_fp8(folder, references):
    model = model_of(folder)
    with torch.no_grad():
        expected = model(**BATCH, use_cache=False).logits
        patch(model, compute="fp8")
        assert torch.equal(model(**BATCH, use_cache=False).logits, expected)


# --- what cannot be


def refused(model, message, **settings):
    with pytest.raises(FastkitError, match=message):
        patch(model, **{"compute": "fp8", **settings})
    assert not any("forward" in vars(module) for module in model.modules())  # left as it was


def test_what_cannot_run_in_fp8_is_said_before_anything_is_taken(folder, references):
    model = model_of(folder)
    refused(model, "there is no compute 'fp4': use one of auto, fp8", compute="fp4")
    refused(model, "layers=False fuses none", layers=False)
    refused(model_of(folder, quantize=False), r"layers\.0: q_proj: its weight is not in 4 bits")
    refused(model_of(folder, dropout=0.25), r"layers\.0: q_proj: LoRA dropout 0.25 keeps")
    refused(model_of(folder, intermediate_size=136), r"gate_proj: its weight is \[136, 64\].* multiples of 16")


def test_another_compute_asks_for_unpatch(folder, references):
    model = model_of(folder)
    patch(model)
    with pytest.raises(FastkitError, match="patched with another compute than 'fp8': unpatch it first"):
        patch(model, compute="fp8")
    unpatch(model)
    assert patch(model, compute="fp8").layers == SHAPE["num_hidden_layers"]
    assert patch(model, compute="fp8").layers == 0


def test_what_changes_later_is_no_reason_for_a_slow_path(folder, references):
    model = model_of(folder, dropout=0.25).eval()
    patch(model, compute="fp8")
    step(model, **BATCH)
    with pytest.raises(FastkitError, match=r"LoRA dropout 0\.25"):
        step(model.train(), **BATCH)


def test_an_older_card_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    products._lacking_card.cache_clear()
    for capability, says in (((8, 0), "NVIDIA A100 has no FP8 tensor cores"), ((8, 9), ""), ((12, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        found = products._lacking_card(torch.device("cuda", capability[0] + capability[1]))
        assert found.startswith(says) and bool(found) == bool(says)
    products._lacking_card.cache_clear()


@pytest.mark.gpu
def test_another_dtype_on_a_gpu_is_refused(folder):
    model = model_of(folder, device="cuda", dtype="fp32")
    patch(model, compute="fp8")
    with pytest.raises(FastkitError, match=r"gives bfloat16, and the model computes in torch\.float32"):
        step(model, **{name: t.cuda() for name, t in BATCH.items()})
