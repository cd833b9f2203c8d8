"""Every rung of attention's ladder computes it, fits the architectures that it claims, and differs as it says."""

import pytest
import torch
from tolerance import SLACK, assert_as_close_as_torch

from fastkit.kernels.ladders import attention as module
from fastkit.kernels.ladders import rung as rungs
from fastkit.kernels.ladders.attention import attend
from fastkit.lab.compiling import compile_launch
from fastkit.lab.launches import catch
from fastkit.lab.portability import misfit

pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")
NAMES = [rung.name for rung in module.RUNGS]
PLAIN = ("naive", "tiled", "online")


def named(name):
    return next(rung for rung in module.RUNGS if rung.name == name)


def check(q, k, v, name):
    ours = attend(q, k, v, name)
    s = q @ k.mT * q.shape[-1] ** -0.5
    theirs = s.softmax(-1) @ v
    p = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).softmax(-1)
    truth = p @ v.double()
    rounding = torch.finfo(q.dtype).eps / 2 / SLACK  # of p, before it multiplies v
    assert_as_close_as_torch(ours, theirs, truth, scale=truth.abs() + rounding * (p**2 @ v.double() ** 2).sqrt())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 40, 20), (1, 2, 33, 64)], ids=str)
def test_close_to_the_truth(name, shape, dtype, device):
    if lacking := named(name).lacking(torch.device(device)):
        pytest.skip(f"{name} {lacking}")
    if name not in PLAIN and dtype == torch.float32:
        dtype = torch.float16
    q, k, v = ((2 * torch.randn(shape, device=device)).to(dtype) for _ in range(3))
    check(q, k, v, name)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_and_large_scores(name, device):
    if lacking := named(name).lacking(torch.device(device)):
        pytest.skip(f"{name} {lacking}")
    q = torch.randn(1, 1, 20, 16, device=device).half()
    assert attend(q[:, :, :0], q[:, :, :0], q[:, :, :0], name).shape == (1, 1, 0, 16)
    assert attend(60 * q, 60 * q, q, name).isfinite().all()  # scores of some ten thousands


def test_wrong_input():
    q = torch.randn(1, 2, 4, 8)
    wrong = {
        r"k has shape \(1, 2, 3, 8\)": (q, q[:, :, :3], q),
        "k has dtype torch.float16 but q has": (q, q.half(), q),
        "q has strides": (q.mT.contiguous().mT, q, q),
        "there is no rung 'fast'": (q, q, q, "fast"),
    }
    for message, arguments in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            attend(*arguments)
    with pytest.raises(ValueError, match=r"takes float16 and bfloat16, and q has torch\.float32: use 'online'"):
        named("pipelined").launch(q, q, q, q)
    long = torch.empty(1, 1, 40000, 1)
    with pytest.raises(ValueError, match="up to 32768, and q has T = 40000: use 'tiled'"):
        named("naive").launch(long, long, long, long)


def compiled(name, arch, D=128, dtype=torch.float16):
    tensors = [torch.empty(1, 2, 256, D, dtype=dtype) for _ in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "architecture", lambda device: arch)
        patch.setattr(rungs, "architecture", lambda device: arch)
        return [compile_launch(launch, arch) for launch in catch(lambda: named(name).launcher(*tensors))]


@pytest.mark.parametrize(("arch", "names"), [("sm_75", PLAIN), ("sm_89", NAMES), ("sm_90", NAMES[3:])])
def test_rungs_fit(arch, names):
    for name in names:
        for made in compiled(name, arch):
            assert not misfit(made) and made.spilled_bytes <= 16, f"{name} on {arch}: {made.spilled_bytes} spilled"


def test_rungs_differ_in_what_multiplies_and_what_loads():
    made = {name: compiled(name, "sm_90") for name in NAMES}
    assert [len(launches) for launches in made.values()] == [3, 1, 1, 1, 1]
    for name, launches in made.items():
        assert all(("WGMMA" in c.instructions) == (name not in PLAIN) for c in launches)
    assert (
        not made["tensor_cores"][0].instructions["cp.async.128"] and made["pipelined"][0].instructions["cp.async.128"]
    )


def test_cost():
    cost = module.cost(2, 3, 5, 7, torch.float32)
    assert cost.flops == 4 * 2 * 3 * 5 * 5 * 7 and cost.bytes_moved == 4 * 2 * 3 * 5 * 7 * 4
