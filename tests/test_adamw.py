import copy as copies
import math

import pytest
import torch
from adamw_case import BETAS, BITS, EPS, LR, assert_same, inputs
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch

from fastkit.kernels import adamw as module
from fastkit.kernels.adamw_state import BLOCK_N, State, decoded
from fastkit.ops import adamw

pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")


def torch_step(param, state, grad, weight_decay=0.0, max_norm=None, lr=LR):
    """(param, m, v) after torch's own step from `state` (m, v, step), in the dtype of m."""
    m, v, step = state
    param = torch.nn.Parameter(param.to(m.dtype))
    optimizer = torch.optim.AdamW([param], lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay)
    moments = {"exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[param] = {"step": torch.tensor(float(step)), **moments}
    param.grad = grad.to(m.dtype)
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_([param], max_norm)
    optimizer.step()
    return param.detach(), moments["exp_avg"], moments["exp_avg_sq"]


def check(step, param, grad, weight_decay=0.0, max_norm=None, taken=3):
    """Assert that `step` takes param and its state to where torch takes them, as close to the truth as torch."""
    state = State.zeros(param)
    state.step.fill_(taken)
    state.state1.copy_(0.1 * torch.randn_like(state.state1))
    state.state2.copy_(0.01 * torch.rand_like(state.state2))
    before = (state.state1.clone(), state.state2.clone(), taken)
    theirs = torch_step(param, before, grad, weight_decay, max_norm)
    truth = torch_step(param.double(), (before[0].double(), before[1].double(), taken), grad, weight_decay, max_norm)
    start = param.clone()
    param = param.clone()
    norm, found_inf = step(param, grad, state, LR, BETAS, EPS, weight_decay, max_norm)
    assert_as_close_as_torch(param, theirs[0].to(param.dtype), truth[0], "param")
    if param.dtype == torch.float32:  # the change alone, whose errors param's own size would hide
        change, true_change = param.double() - start.double(), truth[0] - start.double()
        rounding = 2 * start.abs().max().double() * torch.finfo(torch.float32).eps
        assert (change - true_change).abs().max() <= rounding + 2e-6 * true_change.abs().max(), "change of param"
    clip = 1.0 if max_norm is None else min(1.0, max_norm / max(grad.double().norm().item(), 1e-30))
    terms = BETAS[0] * before[0].double().abs() + (1 - BETAS[0]) * clip * grad.double().abs()  # which may cancel
    assert_as_close_as_torch(state.state1, theirs[1], truth[1], "m", terms)
    assert_as_close_as_torch(state.state2, theirs[2], truth[2], "v")
    norms = [torch.linalg.vector_norm(grad.to(dtype)) for dtype in (torch.float32, torch.float64)]
    assert_as_close_as_torch(norm, *norms, "norm")
    assert found_inf == 0 and state.step == taken + 1 and state.arrivals == 0


@pytest.mark.parametrize("n", [1, 255, 1024, 5001])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_close_to_the_truth(n, max_norm, dtype, device):
    param, (grad,) = inputs(n, dtype, device)
    check(adamw, param, grad, 0.1, max_norm)


@given(
    n=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
    weight_decay=st.sampled_from([0.0, 0.3]),
    max_norm=st.sampled_from([None, 1e-3, 1e3]),
    taken=st.sampled_from([0, 1, 10, 100_000]),
    grad_dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_close_to_the_truth_at_any_size(dtype, device, n, seed, weight_decay, max_norm, taken, grad_dtype):
    torch.manual_seed(seed)
    param, (grad,) = inputs(n, dtype, device)
    check(adamw, param, grad.to(grad_dtype), weight_decay, max_norm, taken)


def test_twenty_steps_of_torch(device):
    """Weight decay, bias correction and clipping, from nothing on."""
    param, grads = inputs(3000, device=device, steps=20)
    theirs, truth = (param.clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    state = State.zeros(param)
    for p in (theirs, truth):
        optimizer = torch.optim.AdamW([p], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1)
        for grad in grads:
            p.grad = grad.to(p.dtype)
            torch.nn.utils.clip_grad_norm_([p], 1.0)
            optimizer.step()
    for grad in grads:
        adamw(param, grad, state, LR, BETAS, EPS, weight_decay=0.1, max_norm=1.0)
    assert_as_close_as_torch(param, theirs.detach(), truth.detach(), "param")
    assert state.step == 20


@BITS
def test_weight_decay_by_the_block(bits, device):
    param, (grad,) = inputs(1000, device=device)
    decays = torch.tensor([0.0, 0.5, 0.0, 0.1], device=device)
    whole, state = param.clone(), State.zeros(param, bits)
    adamw(whole, grad, state, LR, weight_decay=decays)
    for block, decay in enumerate(decays.tolist()):
        here = slice(block * BLOCK_N, min((block + 1) * BLOCK_N, 1000))
        part = param[here].clone()
        adamw(part, grad[here], State.zeros(part, bits), LR, weight_decay=decay)
        torch.testing.assert_close(whole[here], part, rtol=0, atol=1e-7)


@BITS
def test_lr_in_a_tensor(bits, device):
    param, (grad,) = inputs(700, device=device)
    one, two = param.clone(), param.clone()
    adamw(one, grad, State.zeros(param, bits), LR, weight_decay=0.1)
    adamw(two, grad, State.zeros(param, bits), torch.tensor(LR, device=device), weight_decay=0.1)
    assert torch.equal(one, two)


@BITS
def test_the_loss_scale_is_taken_out(bits, device):
    param, (grad,) = inputs(700, device=device)
    scale = torch.tensor(1024.0, device=device)  # a power of two: dividing by it is exact
    one, two = param.clone(), param.clone()
    norm, _ = adamw(one, grad, State.zeros(param, bits), LR, max_norm=0.5)
    scaled_norm, _ = adamw(two, grad * scale, State.zeros(param, bits), LR, max_norm=0.5, grad_scale=scale)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norm, scaled_norm)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's numpy: inf times 0
@BITS
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_without_a_finite_norm_is_skipped(bits, bad, dtype, device):
    param, grads = inputs(1300, dtype, device, steps=3)
    twin = param.clone()
    state, twin_state = State.zeros(param, bits), State.zeros(param, bits)
    copy = torch.zeros_like(param)
    _, found_inf = adamw(param, grads[0], state, LR, weight_decay=0.1, max_norm=1.0, copy=copy)
    adamw(twin, grads[0], twin_state, LR, weight_decay=0.1, max_norm=1.0)
    assert found_inf == 0
    grads[1][777] = bad
    copied = copy.clone()
    norm, found_inf = adamw(param, grads[1], state, LR, weight_decay=0.1, max_norm=1.0, copy=copy)
    assert found_inf == 1 and not norm.isfinite() and torch.equal(copy, copied)
    assert_same(state, twin_state)
    assert torch.equal(param, twin)
    for p, s in ((param, state), (twin, twin_state)):
        adamw(p, grads[2], s, LR, weight_decay=0.1, max_norm=1.0)
    assert torch.equal(param, twin) and state.step == 2


@BITS
def test_same_bits_every_time_and_after_a_resume(bits, dtype, device):
    param, grads = inputs(9000, dtype, device, steps=2)
    results = []
    for _ in range(2):
        p, state = param.clone(), State.zeros(param, bits)
        norms = [adamw(p, grad, state, LR, max_norm=1.0)[0] for grad in grads]
        results.append((p, state, norms))
    assert torch.equal(results[0][0], results[1][0]) and results[0][2] == results[1][2]
    assert_same(results[0][1], results[1][1])
    p, state = param.clone(), State.zeros(param, bits)
    adamw(p, grads[0], state, LR, max_norm=1.0)
    p, state = p.clone(), copies.deepcopy(state)
    adamw(p, grads[1], state, LR, max_norm=1.0)
    assert torch.equal(p, results[0][0])


@BITS
@pytest.mark.parametrize("copy_dtype", [torch.float16, torch.float32])
def test_copy_is_param_rounded_once(bits, copy_dtype, device):
    param, (grad,) = inputs(1100, device=device)
    copy = torch.empty(1100, dtype=copy_dtype, device=device)
    adamw(param, grad, State.zeros(param, bits), LR, copy=copy)
    assert torch.equal(copy, param.to(copy_dtype))


@BITS
def test_nothing(bits, device):
    param = torch.empty(0, device=device)
    norm, found_inf = adamw(param, param.clone(), State.zeros(param, bits), LR, max_norm=1.0)
    assert norm == 0 and found_inf == 0


@BITS
def test_no_gradient_changes_only_by_decay(bits, device):
    param, _ = inputs(600, device=device)
    expected, state = param * (1 - LR * 0.5), State.zeros(param, bits)
    adamw(param, torch.zeros_like(param), state, LR, weight_decay=0.5, max_norm=1.0)
    torch.testing.assert_close(param, expected)
    if bits == 8:  # bytes that stand for 0, whatever the absmax of blocks to come
        assert (
            decoded(state.state1, torch.ones(3, device=device), state.codebook[0]) == 0
        ).all() and state.absmax1.sum() == 0


def test_reference_in_bfloat16_on_the_cpu():
    param, (grad,) = inputs(700, torch.bfloat16)
    check(adamw, param, grad, 0.1, 0.1)


WRONG = {
    "no bias correction": lambda m, v, t, p, g: (m, v, p - LR * m / (v.sqrt() + EPS)),
    "m alone corrected": lambda m, v, t, p, g: (m, v, p - LR / (1 - BETAS[0] ** t) * m / (v.sqrt() + EPS)),
    "correction one step late": lambda m, v, t, p, g: _step(m, v, t - 1, p),
    "decay of the gradient (Adam)": lambda m, v, t, p, g: (m + 0.1 * (1 - BETAS[0]) * p, v, _step(m, v, t, p)[2]),
    "decay forgotten": lambda m, v, t, p, g: _step(m, v, t, p / (1 - LR * 0.1)),
    "v of |g|": lambda m, v, t, p, g: (m, v + (1 - BETAS[1]) * (g.abs() - g * g), _step(m, v, t, p)[2]),
    "state in fp16": lambda m, v, t, p, g: (m.half().float(), v, _step(m, v, t, p)[2]),
}


def _step(m, v, t, p):
    root = (v / (1 - BETAS[1] ** t)).sqrt()
    return m, v, p - LR / (1 - BETAS[0] ** t) * m / (root + EPS)


@pytest.mark.parametrize("wrong", ["right", *WRONG])
def test_wrong_steps_are_caught(wrong):
    def step(param, grad, state, lr, betas, eps, weight_decay, max_norm):
        state.step += 1
        m = state.state1.lerp(grad, 1 - betas[0])
        v = betas[1] * state.state2 + (1 - betas[1]) * grad * grad
        formula = WRONG.get(wrong, lambda m, v, t, p, g: _step(m, v, t, p))
        m, v, p = formula(m, v, int(state.step), param * (1 - lr * weight_decay), grad)
        for old, new in ((state.state1, m), (state.state2, v), (param, p)):
            old.copy_(new)
        return torch.linalg.vector_norm(grad), torch.zeros(())

    param, (grad,) = inputs(4000)
    if wrong == "right":
        check(step, param, grad, 0.1)
    else:
        with pytest.raises(AssertionError):
            check(step, param, grad, 0.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a: a | {"param": a["param"].double()}, "param has dtype torch.float64"),
        (lambda a: a | {"grad": None}, "grad is a NoneType"),
        (lambda a: a | {"grad": a["grad"][:-1]}, r"grad has shape \(599,\); give \(600,\)"),
        (lambda a: a | {"param": a["param"].view(2, 300).T}, "param has shape .* is not contiguous"),
        (lambda a: a | {"copy": a["param"][:1].expand(600)}, "copy has shape .* is not contiguous"),
        (lambda a: a | {"grad": a["grad"].to("meta")}, "grad is on meta but param is on"),
        (lambda a: a | {"state": State.zeros(a["param"][:-1])}, r"state1 has shape \(599,\)"),
        (lambda a: a | {"weight_decay": torch.zeros(2)}, r"weight_decay has shape \(2,\); give \(3,\)"),
        (lambda a: a | {"lr": torch.zeros((), dtype=torch.float64)}, "lr has dtype torch.float64"),
        (lambda a: a | {"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0; give 0 <="),
        (lambda a: a | {"eps": -1.0}, "eps is -1.0"),
        (lambda a: a | {"max_norm": math.nan}, "max_norm is nan"),
        (lambda a: a | {"state": State.zeros(a["param"], 16)}, "the state has 16 bits"),
    ],
)
def test_clear_errors(wrong, message):
    param, (grad,) = inputs(600)
    arguments = {"param": param, "grad": grad, "state": State.zeros(param), "lr": LR}
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        adamw(**wrong(arguments))
    assert str(caught.value).startswith("adamw: ") and "\n" not in str(caught.value)


def test_cost():
    norm, update = module.cost(2560, torch.float32, torch.bfloat16)
    assert norm.bytes_moved == 2560 * 2 and update.bytes_moved == 2560 * (2 + 2 * 4 + 4 * 4)
    _, update = module.cost(2560, torch.bfloat16, torch.bfloat16, bits=8, copy_dtype=torch.float16)
    assert update.bytes_moved == 2560 * (2 + 2 * 2 + 4 + 2) + 4 * 10 * 4
