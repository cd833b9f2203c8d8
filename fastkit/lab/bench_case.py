"""What `fastkit bench` times: contenders that do the same on the same inputs; and how cases are built."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fastkit.kernels.common import Cost
from fastkit.lab.bench_peers import peers, said

DEVICE = "cuda"
ROWS = 8192  # 4 sequences of 2,048 tokens
NO_BACKWARD = "has no backward of its own"


@dataclass
class Case:
    """One operation at one size. Contenders return their result, one tensor or several.

    expected  the result in accurate arithmetic; a contender that is far from it is not timed
    output    what contenders without a result of their own write
    tensor    whether the card's way to do it fast is its tensor cores
    memory    whether what a run allocates at its peak is told, its result included
    tolerance of a result's largest number, how far it may be off; None: what its dtype allows
    absent    contenders that could not enter, and why
    """

    op: str
    size: str
    dtype: torch.dtype
    cost: Cost
    contenders: dict[str, Callable]
    expected: tuple[torch.Tensor, ...]
    output: torch.Tensor | None = None
    tensor: bool = False
    memory: bool = False
    tolerance: float | None = None
    absent: dict[str, str] = field(default_factory=dict)


def half() -> torch.dtype:
    """The 16-bit type that the card computes in."""
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def rows() -> int:
    """ROWS, or fewer on a card with little free memory."""
    return ROWS if torch.cuda.mem_get_info()[0] > 14 * 2**30 else ROWS // 4


def both_ways(
    op: str, size: str, costs: Sequence[Cost], reference: Callable, functions: dict[str, Callable], inputs: tuple,
    fixed: tuple = (), **options,
) -> Iterator[Case]:  # fmt: skip
    """The forward of `functions` and of peers, then their backward with the graph kept, for as many as autograd knows.

    fixed  what peers are made of beside the inputs; options: of Case
    """
    results, absent = _results(op, functions, inputs, fixed)
    y, dy, truth = differentiated(reference, inputs)
    forward, backward, no_backward = {}, {}, dict(absent)
    for who, (function, own, result) in results.items():
        forward[who] = lambda function=function, own=own: function(*own)
        if first(result).requires_grad:
            backward[who] = lambda y=result, own=own: torch.autograd.grad(y, own, dy, retain_graph=True)
        else:
            no_backward[who] = NO_BACKWARD
    dtype = inputs[0].dtype
    yield Case(f"{op} forward", size, dtype, costs[0], forward, y, absent=absent, **options)
    yield Case(f"{op} backward", size, dtype, costs[1], backward, truth, absent=no_backward, **options)


def together(
    op: str, size: str, costs: Sequence[Cost], reference: Callable, functions: dict[str, Callable], inputs: tuple,
    fixed: tuple = (), **options,
) -> Case:  # fmt: skip
    """Forward and backward of `functions` and of peers in one run, as in a training step."""
    results, absent = _results(op, functions, inputs, fixed)
    y, dy, truth = differentiated(reference, inputs)

    def run(function, own):
        result = function(*own)
        return *as_tuple(result), *torch.autograd.grad(result, own, dy)

    contenders = {}
    for who, (function, own, result) in results.items():
        if first(result).requires_grad:
            contenders[who] = functools.partial(run, function, own)
        else:
            absent[who] = NO_BACKWARD
    return Case(f"{op} step", size, inputs[0].dtype, sum_of(costs), contenders, (*y, *truth), absent=absent, **options)


def _results(op: str, functions: dict[str, Callable], inputs: tuple, fixed: tuple) -> tuple[dict, dict[str, str]]:
    """({who: (function, inputs of its own, its result)} of `functions` and of peers, {who: why it is absent})."""
    others, absent = peers(op, *fixed)
    results = {}
    for who, function in (functions | others).items():
        own = leaves(inputs)  # Liger's backward overwrites its inputs
        try:
            results[who] = function, own, function(*own)
        except Exception as error:  # what a peer raises is its result, and must not cost the rows of all others
            if who not in others:
                raise
            absent[who] = said(error)
    return results, absent


def differentiated(reference: Callable, inputs: tuple) -> tuple[tuple, tuple, tuple]:
    """(y, dy, gradients of the inputs): the results of `reference` in fp32, rounded, for a random dy."""
    accurate = tuple(x.detach().float().requires_grad_() for x in inputs)
    dtype, y = inputs[0].dtype, as_tuple(reference(*accurate))
    dy = tuple(torch.randn_like(part) if part.dim() else torch.ones_like(part) for part in y)
    dy = tuple(part.to(dtype) if part.dim() else part for part in dy)  # a loss stays in fp32
    truth = torch.autograd.grad(y, accurate, tuple(part.float() for part in dy))
    y = tuple(part.detach().to(grad.dtype) for part, grad in zip(y, dy, strict=True))
    return y, dy, tuple(grad.to(dtype) for grad in truth)


def sum_of(costs: Sequence[Cost]) -> Cost:
    return Cost(sum(cost.bytes_moved for cost in costs), sum(cost.flops for cost in costs))


def leaves(inputs: tuple) -> tuple[torch.Tensor, ...]:
    """Copies of `inputs`, with their strides, that require gradients."""
    return tuple(x.detach().clone().requires_grad_() for x in inputs)


def as_tuple(result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def first(result) -> torch.Tensor:
    return as_tuple(result)[0]


def writing(launch: Callable, *tensors: torch.Tensor) -> Callable:
    """A function that launches and returns the last tensor, which the launch writes."""

    def run():
        launch(*tensors)
        return tensors[-1]

    return run


def compiled(function: Callable) -> Callable:
    """`function` under torch.compile, its backward to be run many times."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # else its backward runs once
    return torch.compile(function, dynamic=False)
