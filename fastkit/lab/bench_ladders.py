"""The cases of `fastkit bench ladders`: every rung beside torch."""

from collections.abc import Iterator

import torch

from fastkit.lab import bench_case
from fastkit.lab.bench_case import Case, compiled, half, writing

COPY_N = 2**26
TRANSPOSE_N = (4096, 8192)
SOFTMAX_MN = ((4096, 4096), (4096, 16384))
MATMUL_N = 8192


def copy_cases() -> Iterator[Case]:
    """Copies of 256 MiB."""
    from fastkit.kernels.ladders import copy

    x = torch.randn(COPY_N, device=bench_case.DEVICE)
    y = torch.empty_like(x)
    torch_way = {"x.clone()": x.clone, "y.copy_(x)": writing(lambda x, y: y.copy_(x), x, y)}
    yield _ladder("copy", f"{COPY_N}", copy, copy.cost(x.numel(), x.dtype), torch_way, (x,), y)


def transpose_cases() -> Iterator[Case]:
    """Square, in fp32."""
    from fastkit.kernels.ladders import transpose

    for N in TRANSPOSE_N:
        x = torch.randn(N, N, device=bench_case.DEVICE)
        torch_way = {"x.T.contiguous()": lambda x=x: x.T.contiguous()}
        cost = transpose.cost(N, N, x.dtype)
        yield _ladder("transpose", f"{N}x{N}", transpose, cost, torch_way, (x,), torch.empty_like(x))


def softmax_cases() -> Iterator[Case]:
    """Rows that fit into registers, and longer ones."""
    from fastkit.kernels.ladders import softmax

    fused = compiled(lambda x: x.softmax(-1))
    for M, N in SOFTMAX_MN:
        x = torch.randn(M, N, device=bench_case.DEVICE)
        torch_way = {"torch": lambda x=x: x.softmax(-1), "torch.compile": lambda x=x: fused(x)}
        cost = softmax.cost(M, N, x.dtype)
        yield _ladder("softmax", f"{M}x{N}", softmax, cost, torch_way, (x,), torch.empty_like(x))


def matmul_cases() -> Iterator[Case]:
    """Square, in the card's 16-bit type; smaller where the plain rungs would take minutes."""
    from fastkit.kernels.ladders import matmul

    dtype = half()
    N = MATMUL_N if dtype == torch.bfloat16 else MATMUL_N // 2
    a, b = (torch.randn(N, N, dtype=dtype, device=bench_case.DEVICE) for _ in range(2))
    c = torch.empty_like(a)
    torch_way = {"torch (cuBLAS)": writing(lambda a, b, c: torch.matmul(a, b, out=c), a, b, c)}
    cost = matmul.cost(N, N, N, dtype)
    yield _ladder("matmul", f"{N}x{N}x{N}", matmul, cost, torch_way, (a, b), c, tensor=True)


def _ladder(op, size, module, cost, torch_way, inputs, output, tensor=False) -> Case:
    """Every rung that these tensors and this card can take, and torch."""
    contenders, absent = {}, {}
    for rung in module.RUNGS:
        lacking = rung.lacking(output.device) or rung.refuses(*inputs, output)
        if lacking:
            absent[rung.name] = lacking
        else:
            contenders[rung.name] = writing(rung.launch, *inputs, output)
    expected = module.reference(*inputs)
    return Case(op, size, inputs[0].dtype, cost, contenders | torch_way, (expected,), output, tensor, absent)


LADDERS = {"copy": copy_cases, "transpose": transpose_cases, "softmax": softmax_cases, "matmul": matmul_cases}
