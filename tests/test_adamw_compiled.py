"""What the compiler makes of AdamW's kernels, and what only a GPU shows."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adamw_case import BETAS, BITS, EPS, LR, assert_same, bitsandbytes_step, inputs
from compiled import compile_all, faults

from fastkit.kernels import adamw as module
from fastkit.kernels.adamw_state import State
from fastkit.lab.compiling import ARCHITECTURES
from fastkit.lab.portability import misfit
from fastkit.lab.tracer import trace_launches
from fastkit.ops import adamw

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("fresh_seed")


def launches(n, dtype=torch.float16, bits=32):
    """The norm, and the update of an fp32 param with a 16-bit copy."""
    grad, copy, param = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype), torch.empty(n)
    state, scalars = State.zeros(param, bits), torch.zeros(module.SCALARS)
    module.launch_norm(grad, state, LR, scalars, BETAS, 1.0)
    module.launch_update(param, grad, state, scalars, BETAS, EPS, 0.1, copy)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_code(arch):
    """Nothing spilled, little shared memory, and 128-bit accesses to fp32 numbers."""
    dtype = torch.float16 if arch == "sm_75" else torch.bfloat16
    norm, update = compile_all(lambda: launches(2**14, dtype), arch)
    _, eight_bit = compile_all(lambda: launches(2**14, dtype, 8), arch)
    for made in (norm, update, eight_bit):
        assert made.spilled_bytes == 0 and not misfit(made) and made.shared_bytes <= 4096
    assert update.shared_bytes == update.instructions["bar.sync"] == 0, "numbers change lanes"
    if arch.startswith("sm_"):
        scalars = {"ld.global.32": 5}
        wide = {"ld.global.128": 6, "st.global.128": 6, "ld.global.64": 2, "st.global.64": 2}  # of fp32; of 16 bits
        assert {k: v for k, v in update.instructions.items() if "global" in k} == wide | scalars
        narrow = {k: v for k, v in eight_bit.instructions.items() if "global" in k and "128" not in k}
        # 8 numbers a lane: of m and v each 1 load and 1 store of bytes, 8 values of the map, 8 times 8 nodes of the
        # tree; 5 scalars and 2 absmax, and these stored
        assert narrow == {"ld.global.64": 2, "st.global.64": 2, "ld.global.32": 2 * 72 + 7, "st.global.32": 2}
        # five shuffles for each absmax; on sm_100 one instruction does it, and newer versions of Triton know it
        in_one = arch == "sm_100" and eight_bit.code.count("redux.sync") == 2
        assert in_one or eight_bit.instructions["shfl"] == 10, "absmax is found by other means than in its own warp"
        assert norm.instructions["ld.global.128"] == 2 and norm.instructions["atomic"] == 1


def test_narrow_accesses_are_seen():
    made = compile_all(lambda: launches(9999), "sm_90")
    assert all(any("narrower than 128 bits" in fault for fault in faults(compiled, narrow=20)) for compiled in made[1:])


def test_one_number_compiles():
    """Triton makes constants of arguments that are 1."""
    assert len(compile_all(lambda: launches(1, bits=8), "sm_90")) == 2


@BITS
def test_bytes_moved_are_the_cost(bits):
    n, dtype = 2**14, torch.float16
    norm, update = trace_launches(lambda: launches(n, dtype, bits), arch="sm_90")
    expected = module.cost(n, torch.float32, dtype, bits, copy_dtype=dtype)
    (grad,) = (a for a in norm.accesses if a.argument == "grad_ptr")
    assert grad.sectors * 32 == expected[0].bytes_moved
    known = ("param_ptr", "grad_ptr", "state1_ptr", "state2_ptr", "copy_ptr", "absmax1_ptr", "absmax2_ptr")
    moved = [a for a in update.accesses if a.argument in known and a.lines is not None]
    assert len(moved) == (8 if bits == 32 else 12)
    # 8 fp32 numbers a lane are two requests for the same sectors, the second of which the L1 cache answers
    asked = sum(update.least_bytes.values()) if bits == 8 else sum(32 * a.sectors for a in moved)
    assert asked == pytest.approx(expected[1].bytes_moved, rel=0.02)


DYNAMO = """
import torch, torch.utils._triton
torch.utils._triton.has_triton = lambda *a: True  # no GPU, but what would be traced with one
from fastkit.kernels import adamw as module
from fastkit.kernels.adamw_state import State
module.on_triton = lambda *a: True

class Traced(Exception):
    pass

def backend(graph, inputs):
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    print(sum(getattr(call, "__name__", "") == "triton_kernel_wrapper_mutation" for call in calls))
    def run(*inputs):
        raise Traced
    return run

param = torch.zeros(5000)
for bits in (32, 8):
    try:
        torch.compile(module.adamw, backend=backend, fullgraph=True)(param, param, State.zeros(param, bits), 0.1)
    except Traced:
        pass
"""


def test_torch_compile_takes_it_in_one_graph():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    child = subprocess.run([sys.executable, "-c", DYNAMO], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert child.stdout == "2\n2\n", child.stderr


# On a GPU


@pytest.mark.gpu
@BITS
def test_torch_compile(bits, device):
    param, (grad,) = inputs(5000, device=device)
    ours, compiled = param.clone(), param.clone()
    adamw(ours, grad, State.zeros(param, bits), LR, max_norm=1.0)
    torch.compile(adamw, fullgraph=True)(compiled, grad, State.zeros(param, bits), LR, max_norm=1.0)
    assert torch.equal(ours, compiled)


@pytest.mark.gpu
@BITS
def test_cuda_graph(bits, device):
    """Replays count steps, read lr anew and skip what must be skipped, with the bits of eager steps."""
    param, grads = inputs(100_000, torch.float16, device, steps=4)
    grads[2][5] = math.inf
    eager, state = param.clone(), State.zeros(param, bits)
    adamw(eager.clone(), grads[0], State.zeros(param, bits), LR)  # compiles
    lrs = [torch.tensor(LR / (i + 1), device=device) for i in range(4)]
    for grad, lr in zip(grads, lrs, strict=True):
        adamw(eager, grad, state, lr, weight_decay=0.1, max_norm=1.0)
    replayed, grad, lr, graph_state = param.clone(), grads[0].clone(), lrs[0].clone(), State.zeros(param, bits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, found_inf = adamw(replayed, grad, graph_state, lr, weight_decay=0.1, max_norm=1.0)
    found = []
    for next_grad, next_lr in zip(grads, lrs, strict=True):
        grad.copy_(next_grad)
        lr.copy_(next_lr)
        graph.replay()
        found.append(found_inf.item())
    assert found == [0, 0, 1, 0] and torch.equal(replayed, eager)
    assert_same(graph_state, state)


@pytest.mark.gpu
def test_many_programs_give_the_same_bits(device):
    """More tiles than programs, and programs that finish in any order."""
    param, (grad,) = inputs(30_000_001, torch.bfloat16, device)
    runs = [(param.clone(), State.zeros(param, 8)) for _ in range(4)]
    norms = [adamw(p, grad, state, LR, max_norm=1.0)[0] for p, state in runs]
    assert len({norm.item() for norm in norms}) == 1
    torch.testing.assert_close(norms[0].double(), torch.linalg.vector_norm(grad.double()), rtol=1e-6, atol=0)
    for p, state in runs[1:]:
        assert torch.equal(p, runs[0][0])
        assert_same(state, runs[0][1])


@pytest.mark.gpu
def test_more_than_2_to_the_31_numbers(device):
    n = 2**31 + 4000
    if torch.cuda.mem_get_info()[0] < 9 * n:
        pytest.skip("needs 18 GiB of free GPU memory")
    param, grad = (torch.zeros(n, dtype=torch.float16, device=device) for _ in range(2))
    state = State.zeros(param, 8)
    end = slice(2**31 - 256, None)
    param[end], (grad[end],) = inputs(4256, torch.float16, device)
    alone, alone_state = param[end].clone(), State.zeros(param[end], 8)
    adamw(param, grad, state, LR)
    adamw(alone, grad[end].clone(), alone_state, LR)
    assert torch.equal(param[end], alone) and param[: end.start].count_nonzero() == 0
    assert torch.equal(state.state1[end], alone_state.state1)


@pytest.mark.gpu
def test_steps_of_bitsandbytes_on_its_blocks_of_many_sizes(device):
    param, grads = inputs(1_000_000, torch.bfloat16, device, steps=3)
    state, saved = State.zeros(param, 8), None
    for grad in grads:
        theirs, saved = bitsandbytes_step(param, grad, before=saved)
        ours = param.clone()
        adamw(ours, grad, state, LR, BETAS, EPS)
        assert (ours != theirs).float().mean() < 0.01  # roundings to bf16 that fell the other way
        torch.testing.assert_close(state.absmax1, saved["absmax1"], rtol=1e-5, atol=0)
        state.load_bitsandbytes(saved)
        param = theirs
