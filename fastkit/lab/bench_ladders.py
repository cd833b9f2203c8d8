"""What `fastkit bench` times: for each operation its sizes, and contenders that do the same on the same inputs."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from fastkit.kernels import rms_norm, swiglu
from fastkit.kernels.common import Cost

DEVICE = "cuda"
EPS = 1e-6
# Mistral-7B, and 4 sequences of 2,048 tokens
ROWS, HIDDEN, INTERMEDIATE = 8192, 4096, 14336
COPY_N = 2**26
TRANSPOSE_N = (4096, 8192)
SOFTMAX_MN = ((4096, 4096), (4096, 16384))
MATMUL_N = 8192


@dataclass
class Case:
    """One operation at one size. Contenders return their result, one tensor or several.

    expected  the result in accurate arithmetic; a contender that is far from it is not timed
    output    what contenders without a result of their own write
    tensor    whether the card's way to do it fast is its tensor cores
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
    absent: dict[str, str] = field(default_factory=dict)


def half() -> torch.dtype:
    """The 16-bit type that the card computes in."""
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def rows() -> int:
    """ROWS, or fewer on a card with little free memory."""
    return ROWS if torch.cuda.mem_get_info()[0] > 14 * 2**30 else ROWS // 4


def rms_norm_cases() -> Iterator[Case]:
    """RMSNorm, its weight frozen as in a LoRA fine-tune."""
    M, N, dtype = rows(), HIDDEN, half()
    x = torch.randn(M, N, dtype=dtype, device=DEVICE)
    weight = torch.randn(N, dtype=dtype, device=DEVICE)
    functions = {
        "fastkit": lambda x: rms_norm.rms_norm(x, weight, EPS),
        "F.rms_norm": lambda x: F.rms_norm(x, (N,), weight, EPS),
        "eager": lambda x: _eager_rms_norm(x, weight),
        "torch.compile": _compiled(lambda x: _eager_rms_norm(x, weight)),
    }
    peers, absent = _peers("rms_norm", weight)
    yield from _both_ways(
        "rms_norm",
        f"{M}x{N}",
        rms_norm.cost(M, N, dtype),
        lambda x: rms_norm.reference(x, weight.float(), EPS),
        functions | peers,
        (x,),
        absent,
    )


def swiglu_cases() -> Iterator[Case]:
    """SwiGLU, its inputs two tensors."""
    M, N, dtype = rows(), INTERMEDIATE, half()
    inputs = tuple(torch.randn(M, N, dtype=dtype, device=DEVICE) for _ in range(2))
    functions = {
        "fastkit": swiglu.swiglu,
        "eager": lambda gate, up: F.silu(gate) * up,
        "torch.compile": _compiled(lambda gate, up: F.silu(gate) * up),
    }
    peers, absent = _peers("swiglu")
    yield from _both_ways(
        "swiglu", f"{M}x{N}", swiglu.cost(M, N, dtype), swiglu.reference, functions | peers, inputs, absent
    )


def copy_cases() -> Iterator[Case]:
    """Copies of 256 MiB."""
    from fastkit.kernels.ladders import copy

    x = torch.randn(COPY_N, device=DEVICE)
    y = torch.empty_like(x)
    torch_way = {"x.clone()": x.clone, "y.copy_(x)": _writing(lambda x, y: y.copy_(x), x, y)}
    yield _ladder("copy", f"{COPY_N}", copy, copy.cost(x.numel(), x.dtype), torch_way, (x,), y)


def transpose_cases() -> Iterator[Case]:
    """Square, in fp32."""
    from fastkit.kernels.ladders import transpose

    for N in TRANSPOSE_N:
        x = torch.randn(N, N, device=DEVICE)
        torch_way = {"x.T.contiguous()": lambda x=x: x.T.contiguous()}
        cost = transpose.cost(N, N, x.dtype)
        yield _ladder("transpose", f"{N}x{N}", transpose, cost, torch_way, (x,), torch.empty_like(x))


def softmax_cases() -> Iterator[Case]:
    """Rows that fit into registers, and longer ones."""
    from fastkit.kernels.ladders import softmax

    compiled = _compiled(lambda x: x.softmax(-1))
    for M, N in SOFTMAX_MN:
        x = torch.randn(M, N, device=DEVICE)
        torch_way = {"torch": lambda x=x: x.softmax(-1), "torch.compile": lambda x=x: compiled(x)}
        cost = softmax.cost(M, N, x.dtype)
        yield _ladder("softmax", f"{M}x{N}", softmax, cost, torch_way, (x,), torch.empty_like(x))


def matmul_cases() -> Iterator[Case]:
    """Square, in the card's 16-bit type; smaller where the plain rungs would take minutes."""
    from fastkit.kernels.ladders import matmul

    dtype = half()
    N = MATMUL_N if dtype == torch.bfloat16 else MATMUL_N // 2
    a, b = (torch.randn(N, N, dtype=dtype, device=DEVICE) for _ in range(2))
    c = torch.empty_like(a)
    torch_way = {"torch (cuBLAS)": _writing(lambda a, b, c: torch.matmul(a, b, out=c), a, b, c)}
    cost = matmul.cost(N, N, N, dtype)
    yield _ladder("matmul", f"{N}x{N}x{N}", matmul, cost, torch_way, (a, b), c, tensor=True)


CASES = {
    "rms_norm": rms_norm_cases,
    "swiglu": swiglu_cases,
    "copy": copy_cases,
    "transpose": transpose_cases,
    "softmax": softmax_cases,
    "matmul": matmul_cases,
}


def _both_ways(op, size, costs, reference, functions, inputs, absent) -> Iterator[Case]:
    """The forward of `functions`, then their backward with the graph kept, for as many as autograd knows."""
    dtype, forward, backward, no_backward = inputs[0].dtype, {}, {}, dict(absent)
    accurate = tuple(x.detach().float().requires_grad_() for x in inputs)
    y = reference(*accurate)
    dy = torch.randn(y.shape, dtype=dtype, device=DEVICE)
    truth = (y.detach(), *torch.autograd.grad(y, accurate, dy.float()))
    truth = tuple(part.to(dtype) for part in truth)
    del accurate, y
    for who, function in functions.items():
        own = tuple(x.detach().clone().requires_grad_() for x in inputs)  # Liger's backward overwrites its inputs
        forward[who] = lambda function=function, own=own: function(*own)
        y = function(*own)
        if y.requires_grad:
            backward[who] = lambda y=y, own=own: torch.autograd.grad(y, own, dy, retain_graph=True)
        else:
            no_backward[who] = "has no backward of its own"
    yield Case(f"{op} forward", size, dtype, costs[0], forward, truth[:1], absent=absent)
    yield Case(f"{op} backward", size, dtype, costs[1], backward, truth[1:], absent=no_backward)


def _ladder(op, size, module, cost, torch_way, inputs, output, tensor=False) -> Case:
    """Every rung that these tensors and this card can take, and torch."""
    contenders, absent = {}, {}
    for rung in module.RUNGS:
        lacking = rung.lacking(output.device) or rung.refuses(*inputs, output)
        if lacking:
            absent[rung.name] = lacking
        else:
            contenders[rung.name] = _writing(rung.launch, *inputs, output)
    expected = module.reference(*inputs)
    return Case(op, size, inputs[0].dtype, cost, contenders | torch_way, (expected,), output, tensor, absent)


def _writing(launch: Callable, *tensors: torch.Tensor) -> Callable:
    """A function that launches and returns the last tensor, which the launch writes."""

    def run():
        launch(*tensors)
        return tensors[-1]

    return run


def _eager_rms_norm(x, weight):
    """Hugging Face's LlamaRMSNorm."""
    accurate = x.float()
    accurate = accurate * torch.rsqrt(accurate.square().mean(-1, keepdim=True) + EPS)
    return weight * accurate.to(x.dtype)


def _compiled(function: Callable) -> Callable:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # else its backward runs once, and here it runs many times
    return torch.compile(function, dynamic=False)


def _peers(op: str, *fixed: torch.Tensor) -> tuple[dict[str, Callable], dict[str, str]]:
    """Others' kernels that are installed, and why the rest is absent. `fixed`: what an operation has beside inputs."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it reports to its makers otherwise
    found, absent = {}, {}
    for who, package, make in _PEERS[op]:
        if importlib.util.find_spec(package) is None:
            absent[who] = "not installed"
            continue
        try:
            importlib.import_module(package)
            found[who] = make(*fixed)
        except Exception as error:  # a peer that this torch or Triton breaks must not end the benchmark
            absent[who] = f"does not import: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found, absent


def _liger_rms_norm(weight):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    weight = torch.nn.Parameter(weight.clone())  # its backward computes the weight's gradient in any case
    return lambda x: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def _liger_swiglu():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def _unsloth_rms_norm(weight):
    from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm

    return lambda x: Fast_RMS_Layernorm.apply(x, weight, EPS, False)


def _unsloth_swiglu():
    from unsloth.kernels.swiglu import swiglu_fg_kernel

    return lambda gate, up: swiglu_fg_kernel(gate.detach()[None], up.detach()[None])[0]


_PEERS = {
    "rms_norm": [("Liger", "liger_kernel", _liger_rms_norm), ("Unsloth", "unsloth", _unsloth_rms_norm)],
    "swiglu": [("Liger", "liger_kernel", _liger_swiglu), ("Unsloth", "unsloth", _unsloth_swiglu)],
}
