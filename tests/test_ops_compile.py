"""What all public ops share: torch.compile takes each in one graph, a CUDA graph replays it, it is differentiable once.

torch.library.opcheck does not apply: it takes registered operators, and ours are autograd Functions around launches of
Triton kernels, which torch.compile looks into. Its checks, in their place:

    schema                 inputs are left as they were (ops that write in place get copies: their own tests have them)
    autograd registration  gradients come once, a second derivative raises; what has no gradient never requires one
    fake tensors           each op, and its backward, is traced in one graph, without a GPU; no node is an operator
                           that somebody registered, or opcheck would apply
    AOT dispatch, dynamic  compiled code gives what eager code gives, also when compiled anew for sizes that change
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_case import cases

from fastkit import ops

pytest.importorskip("triton")

NAMES = sorted(name for name in ops.__all__ if name != "NF4Weight")
NOT_TRACED = {"quantize_nf4": "NF4Weight asks where its bytes lie, which dynamo cannot; it runs once a weight"}
TRACED = [name for name in NAMES if name not in NOT_TRACED]
TRAINED = [name for name, case in cases("cpu", torch.bfloat16).items() if case.trained]
CHILD = """
import sys, torch, torch.utils._triton
torch.utils._triton.has_triton = lambda *a: True  # no GPU, but what would be traced with one
from ops_case import cases

made = cases("cpu", torch.bfloat16)
yes, sm_90 = lambda *a: True, torch.compiler.assume_constant_result(lambda device: "sm_90")
for name, module in list(sys.modules.items()):
    if name.startswith("fastkit.kernels."):
        for answer, value in (("on_triton", yes), ("on_fp8_kernels", yes), ("architecture", sm_90)):
            if hasattr(module, answer):
                setattr(module, answer, value)

class Traced(BaseException):
    pass

def backend(graph, inputs):
    inner = [module.graph for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = [node.target for each in inner for node in each.nodes]
    kernels = sum("triton_kernel_wrapper" in str(target) for target in targets)
    operators = {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)} - {"aten", "prims"}
    print("resized" if sizes_change else "traced", name, kernels, sorted(operators))
    raise Traced

for name, case, sizes_change in ((*item, change) for item in made.items() for change in (False, True)):
    torch._dynamo.reset()
    inputs = [x.detach().requires_grad_(i < case.trained) for i, x in enumerate(case.inputs)]
    for x, dim in ((x, dim) for x in inputs for dim in range(x.dim()) if sizes_change and x.shape[dim] == 48):
        torch._dynamo.maybe_mark_dynamic(x, dim)  # 48: the tokens
    try:
        torch.compile(case.function, backend=backend, fullgraph=True)(*inputs)
    except Traced:
        pass
    except torch._dynamo.exc.Unsupported as error:
        print("refused", name, file=sys.stderr)
        print(error, file=sys.stderr)
"""


def results(function, inputs, trained: int) -> list[torch.Tensor]:
    """What `function` returns, and the gradients, its outputs taken for theirs."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, inputs[:trained], [y.detach() for y in outputs]) if trained else ()
    return [*(y.detach() for y in outputs), *gradients]


def leaves(case) -> list[torch.Tensor]:
    return [x.detach().requires_grad_(i < case.trained) for i, x in enumerate(case.inputs)]


def test_every_op_has_a_case():
    assert sorted(cases("cpu", torch.bfloat16)) == NAMES


def test_each_is_traced_in_one_graph_of_kernels():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    tests = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent), environment.get("PYTHONPATH", "")])
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, env=environment)
    lines = [line.split(maxsplit=3) for line in child.stdout.splitlines()]
    traced, resized = ([rest for first, *rest in lines if first == kind] for kind in ("traced", "resized"))
    assert sorted(name for name, *_ in traced) == TRACED, child.stdout + child.stderr
    assert sorted(name for name, *_ in resized) == TRACED, child.stdout + child.stderr
    assert all(operators == "[]" for *_, operators in traced), child.stdout
    without = {name for name, kernels, _ in traced if kernels == "0"}
    assert without == {"weight_bounds"}, child.stdout  # it is plain torch


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_as_they_were(name, device, fresh_seed):
    case = cases(device, torch.float16)[name]
    before = [x.clone() for x in case.inputs]
    results(case.function, leaves(case), case.trained)
    assert all(torch.equal(x, was) for x, was in zip(case.inputs, before, strict=True))


@pytest.mark.parametrize("name", TRAINED)
def test_a_second_derivative_raises(name, device, fresh_seed):
    case = cases(device, torch.float16)[name]
    inputs = leaves(case)
    outputs = case.function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(y.float().square().sum() for y in outputs)
    gradients = torch.autograd.grad(loss, inputs[: case.trained], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(gradient.float().sum() for gradient in gradients).backward()


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(TRAINED)))
def test_what_has_no_gradient_requires_none(name, device, fresh_seed):
    case = cases(device, torch.float16)[name]
    outputs = case.function(*(x.detach().requires_grad_(x.dtype == torch.float16) for x in case.inputs))
    assert not any(y.requires_grad for y in (outputs if isinstance(outputs, tuple) else (outputs,)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRACED)
def test_compiled_equals_eager(name, device, fresh_seed):
    """First for one size, then for another, for which sizes become arguments of the graph."""
    torch._dynamo.reset()
    for rows in (48, 80):
        case = cases(device, torch.float16, rows)[name]
        eager = results(case.function, leaves(case), case.trained)
        compiled = results(torch.compile(case.function, fullgraph=True), leaves(case), case.trained)
        for ours, theirs in zip(compiled, eager, strict=True):
            size = theirs.double().abs().max().item()  # Inductor adds partial sums in its own order
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * size)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_replays_it(name, device, fresh_seed):
    """On inputs that were not there at the capture; forward and backward."""
    case, other = (cases(device, torch.float16)[name] for _ in range(2))
    inputs = leaves(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(case.function, inputs, case.trained)  # compiles, and fills caches
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(case.function, inputs, case.trained)
    for mine, new in zip(case.inputs, other.inputs, strict=True):
        mine.copy_(new)
    graph.replay()
    eager = results(case.function, inputs, case.trained)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, eager, strict=True))
