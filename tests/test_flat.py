"""Many parameters as one for the optimizer: the same updates, in the tensors that the model holds."""

import copy

import bitsandbytes
import pytest
import torch
from torch import nn

from fastkit.errors import FastkitError
from fastkit.train.flat import Flat, can_be_flat


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 90), nn.Tanh(), nn.Linear(90, 110), nn.Tanh(), nn.Linear(110, 3))


def learn(model, optimizer, steps=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 70, generator=generator)
        model(x).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def flat_of(model, cls, **settings):
    flat = Flat(list(model.parameters()))
    return flat, flat.attach(cls([flat.parameter], **settings))


@pytest.mark.parametrize("cls", [torch.optim.AdamW, bitsandbytes.optim.AdamW32bit], ids=["torch", "bitsandbytes"])
def test_updates_are_those_of_one_parameter_after_another(cls):
    model, settings = network(), dict(lr=1e-2, weight_decay=0.1)
    other = copy.deepcopy(model)
    _, optimizer = flat_of(model, cls, **settings)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    ours, theirs = learn(model, optimizer), learn(other, cls(other.parameters(), **settings))
    assert (ours - before).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_8_bit_states_learn_as_well():
    model = network()
    flat, optimizer = flat_of(model, bitsandbytes.optim.AdamW8bit, lr=1e-2)
    exact = copy.deepcopy(model)
    ours = learn(model, optimizer)
    theirs = learn(exact, torch.optim.AdamW(exact.parameters(), lr=1e-2, weight_decay=1e-2))
    assert optimizer.state[flat.parameter]["state1"].dtype == torch.uint8
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_the_model_sees_its_own_tensors_and_no_gradient_stays():
    model = network()
    shapes = [p.shape for p in model.parameters()]
    flat, optimizer = flat_of(model, torch.optim.AdamW, lr=1e-2)
    assert [p.shape for p in model.parameters()] == shapes and all(p.is_leaf for p in model.parameters())
    learn(model, optimizer, steps=1)
    assert flat.parameter.grad is None
    assert torch.equal(flat.parameter, torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_numbers_that_were_put_elsewhere_are_taken_up():
    model = network()
    _, optimizer = flat_of(model, torch.optim.SGD, lr=0.0)
    with torch.no_grad():
        model[0].weight.fill_(2.0)  # in place
    model[2].weight.data = torch.full_like(model[2].weight, 3.0)  # another tensor
    learn(model, optimizer, steps=1)
    assert (model[0].weight == 2).all() and (model[2].weight == 3).all()


def test_a_parameter_without_a_gradient_has_zeros():
    model = network()
    _, optimizer = flat_of(model, torch.optim.SGD, lr=1.0)
    before = model[0].weight.detach().clone()
    model[4].bias.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_several_dtypes_are_refused():
    model = network()
    model[0].half()
    assert not can_be_flat(list(model.parameters()))
    with pytest.raises(FastkitError, match="several kinds"):
        Flat(list(model.parameters()))
