"""How close is close enough: as close to the truth as torch gets in the same dtype.

A fixed tolerance is too wide for one shape and too tight for another, and it says nothing about rounding. So a test
computes the truth in fp64 and lets torch compute the same in the dtype under test. Our error, by its maximum and by its
mean, may exceed torch's by a few units in the last place of fp32, the precision in which every kernel accumulates,
whatever the dtype of its output. That much, relative to the largest (the mean) true value, covers another order of the
additions and a GPU's approximations of exp and rsqrt. It is far below one rounding to fp16 or bf16: truncating where
one should round, or rounding twice where torch rounds once, fails the test.

The largest of many roundings is a matter of luck, too: of two that are equally good, each is ahead by some percent half
of the time. So 5% more than torch's largest error is no worse; their mean leaves no such room. Where luck decides
nevertheless, as of few numbers or of errors that ours and torch's do not share, a test takes several draws: the bound
is of what they err by on average, and each by itself is held to the most that any kernel here may err by, WIDEST.

Where terms cancel, the result is smaller than they are, but not its error: pass the size of the terms as `scale`.
"""

import torch

SLACK = 8 * torch.finfo(torch.float32).eps
LUCK = 1.05
KINDS = ("largest", "mean")
WIDEST = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # more than torch's, of the truth


def assert_as_close_as_torch(ours, theirs, truth, name: str = "result", scale: torch.Tensor | None = None) -> None:
    """Assert that `ours` errs from `truth` (fp64) no more than `theirs` does, plus SLACK times `scale` (or truth)."""
    assert_draws_as_close_as_torch([(ours, theirs, truth, name, scale)])


def assert_draws_as_close_as_torch(draws, kinds=KINDS) -> None:
    """The same of several draws of (ours, theirs, truth, name, scale): of the average of their largest errors, and of
    the mean of all; or of one of the two."""
    found = [_errors(*draw) for draw in draws]
    ours, _, _, name, *_ = draws[0]
    counts = torch.tensor([draw[0].numel() for draw in draws], dtype=torch.float64)
    for kind in kinds:
        weights, luck = {"largest": (torch.ones_like(counts), LUCK), "mean": (counts, 1.0)}[kind]
        all_of_them = torch.tensor([one[kind] for one in found], dtype=torch.float64)
        error, their_error, room, _ = (weights @ all_of_them / weights.sum().clamp(min=1)).tolist()
        allowed = luck * their_error + SLACK * room
        assert error <= allowed, f"{name}: {kind} error {error:.3e}, torch's {their_error:.3e}, allowed {allowed:.3e}"
        for error, their_error, _, size in (one[kind] for one in found if len(found) > 1):
            allowed = their_error + WIDEST[ours.dtype] * size
            assert error <= allowed, f"{name}: {kind} error {error:.3e} of one draw, allowed {allowed:.3e}"


def _errors(ours, theirs, truth, name, scale):
    """By their largest and by their mean: (our error, torch's, the scale, the truth)."""
    assert truth.dtype == torch.float64, f"{name}: the truth is in {truth.dtype}, not in float64"
    assert ours.dtype == theirs.dtype, f"{name}: ours is in {ours.dtype}, torch's in {theirs.dtype}"
    assert ours.shape == theirs.shape == truth.shape, f"{name}: {ours.shape}, {theirs.shape}, {truth.shape}"
    if truth.numel() == 0:
        return dict.fromkeys(KINDS, (0.0, 0.0, 0.0, 0.0))
    ours, theirs, truth = (tensor.detach().cpu().double() for tensor in (ours, theirs, truth))
    scale = truth if scale is None else scale.cpu()
    assert truth.isfinite().all() and theirs.isfinite().all(), f"{name}: torch's own result is no yardstick"
    assert ours.isfinite().all(), f"{name}: {(~ours.isfinite()).sum()} of {ours.numel()} numbers are not finite"
    return {
        kind: tuple(measure(numbers.abs()).item() for numbers in (ours - truth, theirs - truth, scale, truth))
        for kind, measure in (("largest", torch.max), ("mean", torch.mean))
    }
