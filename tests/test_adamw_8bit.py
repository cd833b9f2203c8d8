"""AdamW's state in 8 bits, and in bitsandbytes' format."""

import copy as copies

import pytest
import torch
from adamw_case import BETAS, EPS, LR, bitsandbytes_step, inputs
from hypothesis import example, given
from hypothesis import strategies as st

from fastkit.kernels import adamw as module
from fastkit.kernels.adamw_state import BLOCK_N, State, codebook, dynamic_map, encoded, midpoints
from fastkit.ops import adamw

pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_that_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


def test_tree_is_the_midpoints_in_search_order():
    for qmap, tree in zip(*codebook(torch.device("cpu")).chunk(2), strict=True):
        for x in (*qmap.tolist(), *midpoints(qmap).tolist(), -2.0, 2.0):
            node = 1
            for _ in range(8):
                node = 2 * node + (x > tree[node].item())
            assert node - 256 == (torch.tensor(x) > midpoints(qmap)).sum()


@example(seed=2688, signed=False, n=1, power=12)  # a subnormal number
@given(seed=st.integers(0, 2**31), signed=st.booleans(), n=st.integers(1, 1500), power=st.sampled_from([1, 4, 12]))
def test_encoded_is_nearest(seed, signed, n, power):
    torch.manual_seed(seed)
    x, qmap = torch.randn(n) * torch.rand(n) ** power, dynamic_map(signed)
    x = x if signed else x.square()
    codes, absmax = encoded(x, qmap)
    values = qmap.double() * absmax.double().repeat_interleave(BLOCK_N)[:n, None]
    distance = (values - x.double()[:, None]).abs()
    ours = distance.gather(1, codes[:, None])[:, 0]
    assert (ours - distance.amin(1) <= 1e-7 * x.abs()).all()
    assert ((absmax == 0) | (absmax >= torch.finfo(torch.float32).tiny)).all()


@pytest.mark.parametrize("n", [1, 300, 2048, 5001])
def test_eight_bits_as_the_reference_rounds(n, dtype, device):
    """A 32-bit step from what the bytes stand for, then bytes again. Ties may fall otherwise on a GPU."""
    param, grads = inputs(n, dtype, device, steps=3)
    state = State.zeros(param, 8)
    for step, grad in enumerate(grads):
        twin, twin_state = param.clone(), copies.deepcopy(state)
        if step == 1:  # memory beyond n, and absmax of other sizes
            twin_state.absmax1 *= 3
            state.absmax1 *= 3
        adamw(param, grad, state, LR, weight_decay=0.1, max_norm=1.0)
        module.reference(twin, grad, twin_state, LR, weight_decay=0.1, max_norm=1.0)
        torch.testing.assert_close(param, twin)
        for name in ("absmax1", "absmax2"):
            torch.testing.assert_close(getattr(state, name), getattr(twin_state, name), rtol=1e-5, atol=0)
        for name in ("state1", "state2"):
            apart = (getattr(state, name).int() - getattr(twin_state, name).int()).abs()
            assert apart.max() <= 1 and apart.sum() <= 1 + n / 500, name


def test_bytes_of_bitsandbytes_triton_kernel():
    """The same codes and absmax, bit for bit, in the interpreter: both multiply or divide by the same absmax."""
    pytest.importorskip("bitsandbytes")
    kernels = pytest.importorskip("bitsandbytes.backends.triton.kernels_8bit_quant")
    if torch.cuda.is_available():
        pytest.skip("on a GPU divisions are approximate")
    for signed in (True, False):
        x = torch.randn(BLOCK_N * 8) * torch.rand(BLOCK_N * 8) ** 4
        x, qmap = (x if signed else x.square()), dynamic_map(signed)
        ours, theirs = encoded(x, qmap), kernels.quantize_blockwise_triton(x, qmap, BLOCK_N)
        assert (ours[0] != theirs[0]).sum() <= 2 and torch.equal(ours[1], theirs[1])


def test_steps_of_bitsandbytes(device):
    """Each step from bitsandbytes' own state, read from and written to its state_dict.

    Its CPU backend rounds to multiples of 2/65535 of absmax before it looks for the nearest value; its CUDA backend
    keeps the sign of m, and decays after the step, not before.
    """
    param, grads = inputs(8192, device=device, steps=4)
    state = State.zeros(param, 8)
    saved = None
    for grad in grads:
        theirs, saved = bitsandbytes_step(param, grad, before=saved)
        ours = param.clone()
        adamw(ours, grad, state, LR, BETAS, EPS)
        approximate = 1e-3 if device == "cuda" else 1e-5  # its 1 - beta^t is fp32, with a fast power
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=approximate * LR)
        assert state.step == saved["step"]
        for which, qmap in zip("12", state.codebook[:2], strict=True):
            mine, yours = getattr(state, f"state{which}"), saved[f"state{which}"]
            absmax, their_absmax = getattr(state, f"absmax{which}"), saved[f"absmax{which}"]
            torch.testing.assert_close(absmax, their_absmax, rtol=1e-5, atol=0)
            big = qmap[yours.int()].abs() > 1e-3
            assert (mine[big] != yours[big]).float().mean() < 0.05
            assert (mine.int() - yours.int())[big].abs().max() <= 1
            assert (qmap[mine.int()] - qmap[yours.int()])[~big].abs().max() < 2e-4
        state.load_bitsandbytes(saved)
        assert torch.equal(state.state1, saved["state1"]) and torch.equal(state.absmax2, saved["absmax2"])
        param = theirs


def test_a_flat_state_is_that_of_its_parameters():
    """bitsandbytes trains two parameters, fastkit goes on with both in one buffer, then bitsandbytes with each."""
    shapes = ((33, 130), (64, 80))  # the first one's last block is not full
    starts, n = (0, 17 * BLOCK_N), 17 * BLOCK_N + 64 * 80
    params, grads = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    trained = [bitsandbytes_step(p, g) for p, g in zip(params, grads, strict=True)]
    flat, flat_grad = torch.zeros(n), torch.zeros(n)
    state = State.zeros(flat, 8)
    for start, (param, saved), grad in zip(starts, trained, grads, strict=True):
        state.part(start, param.shape).load_bitsandbytes(saved)
        flat[start : start + param.numel()] = param.flatten()
        flat_grad[start : start + param.numel()] = grad.flatten()
    adamw(flat, flat_grad, state, LR, BETAS, EPS)
    for start, (param, saved), grad in zip(starts, trained, grads, strict=True):
        alone, alone_state = param.clone(), State.zeros(param, 8)
        alone_state.load_bitsandbytes(saved)
        adamw(alone, grad, alone_state, LR, BETAS, EPS)
        part = state.part(start, param.shape)
        assert torch.equal(flat[start : start + param.numel()].view(param.shape), alone)
        assert torch.equal(part.state1, alone_state.state1) and torch.equal(part.absmax2, alone_state.absmax2)
        theirs, _ = bitsandbytes_step(alone, grad, before=copies.deepcopy(part.to_bitsandbytes()))
        adamw(alone, grad, part, LR, BETAS, EPS)
        torch.testing.assert_close(alone, theirs, rtol=1e-5, atol=1e-5 * LR)
        part.step.fill_(2)  # it is the flat one's, which the next part shares


def test_32_bit_state_of_bitsandbytes():
    param, grads = inputs(500, steps=2)  # bitsandbytes keeps parameters of fewer than 4096 numbers in 32 bits
    theirs, saved = bitsandbytes_step(param, grads[0])
    state = State.zeros(param)
    state.load_bitsandbytes(saved)
    assert state.to_bitsandbytes().keys() == saved.keys() and state.step == 1
    ours = theirs.clone()
    adamw(ours, grads[1], state, LR, BETAS, EPS)
    torch.testing.assert_close(ours, bitsandbytes_step(theirs, grads[1], before=saved)[0])


def test_states_that_do_not_fit():
    state, other = State.zeros(torch.empty(5120), 8), State.zeros(torch.empty(5000), 8)
    with pytest.raises(ValueError, match=r"state1 has 5000 numbers of torch.uint8 in the saved state, here 5120 of"):
        state.load_bitsandbytes(other.to_bitsandbytes())
    with pytest.raises(ValueError, match=r"of torch.float32 in the saved state"):
        state.load_bitsandbytes(State.zeros(torch.empty(5120)).to_bitsandbytes())
    with pytest.raises(ValueError, match="qmap2 is not bitsandbytes' dynamic map"):
        state.load_bitsandbytes(state.to_bitsandbytes() | {"qmap2": torch.zeros(256)})
    with pytest.raises(ValueError, match="numbers 100 to 200 are no part of a state of 5120"):
        state.part(100, (100,))
