"""The code that the cross-entropies compile to, the bytes that it moves, and what their costs say of both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled import compile_all, faults

from fastkit.kernels import cross_entropy, linear_cross_entropy
from fastkit.kernels.loss_terms import Terms
from fastkit.lab.portability import misfit
from fastkit.lab.tracer import trace_launches


def launches(M, V, dtype, **kind):
    """The forward, alone and with dlogits over the logits, and the backward."""
    logits, labels, terms = torch.empty(M, V, dtype=dtype), torch.empty(M, dtype=torch.int64), Terms(**kind)
    (loss, largest, total), dloss = torch.empty(3, M), torch.empty(())
    cross_entropy.launch_forward(logits, labels, terms, loss, largest, total)
    cross_entropy.launch_forward(logits, labels, terms, loss, dlogits=logits, dloss=dloss)
    cross_entropy.launch_backward(logits, labels, terms, largest, total, dloss.expand(M), torch.empty_like(logits))


def check_code(made, strict):
    """Assert that nothing is spilled (not strict: but what the assembler puts on a stack), and that access is wide.

    Narrow are label, its logit, dloss, loss, largest and total, one instruction each.
    """
    for compiled in made:
        found = [fault for fault in faults(compiled, narrow=5) if "128-bit store" not in fault]
        assert not [fault for fault in found if strict or "spills" not in fault] and not misfit(compiled)
        assert compiled.instructions["st.global.128"] or compiled is made[0]  # which writes no logits


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"])
@pytest.mark.parametrize("V", [32000, 128256])
def test_compiled_code(V, arch, monkeypatch):
    """At the vocabularies of real models."""
    monkeypatch.setattr(cross_entropy, "architecture", lambda device: arch)
    made = compile_all(lambda: launches(4, V, torch.float16), arch)
    assert len(made) == 3
    check_code(made, strict=arch in ("sm_80", "sm_86", "sm_89", "sm_90"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_code_of_other_dtypes_and_all_terms(dtype):
    terms = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}
    check_code(compile_all(lambda: launches(4, 32000, dtype, **terms), "sm_90"), strict=False)


def test_one_number_compiles():
    """Triton makes constants of arguments that are 1."""
    assert len(compile_all(lambda: launches(1, 1, torch.bfloat16, ignore_index=1), "sm_90")) == 3


def test_no_thread_waits_for_another_within_a_row():
    """The loop over a row's columns has neither shuffles nor barriers: those after it are as many for longer rows."""
    short, long = (compile_all(lambda V=V: launches(4, V, torch.float16), "sm_90")[0] for V in (8192, 128256))
    assert all(short.instructions[name] == long.instructions[name] for name in ("shfl", "bar.sync"))
    loop = long.code[long.code.index("ld.global.v4") : long.code.rindex("ld.global.v4")]
    assert "shfl" not in loop and "bar.sync" not in loop


def test_bytes_moved():
    """Each logit is read once, and once more with the gradient, which is written once: as the cost says.

    Numbers of a row, which all its warps read, are left out: all but the first read is the cache's.
    """
    M, V = 8, 32000
    once = M * V * 2
    for trace, times in zip(
        trace_launches(lambda: launches(M, V, torch.float16), arch="sm_90"), (1, 3, 2), strict=True
    ):
        tiles = [access for access in trace.accesses if access.argument in ("logits_ptr", "dlogits_ptr")]
        assert sum(access.bytes_moved for access in tiles) == pytest.approx(times * once, rel=0.02)
    forward, backward = cross_entropy.cost(M, V, torch.float16)
    assert forward.bytes_moved == pytest.approx(once, rel=0.02)
    assert backward.bytes_moved == pytest.approx(2 * once, rel=0.02)


def test_cost():
    forward, backward = cross_entropy.cost(8, 1024, torch.bfloat16)
    assert forward.bytes_moved == 8 * 1024 * 2 + 8 * (8 + 3 * 4)
    assert backward.bytes_moved == 2 * 8 * 1024 * 2 + 8 * (8 + 3 * 4)
    assert forward.flops > 0 and backward.flops > 0


def test_cost_of_the_product():
    forward, backward = linear_cross_entropy.cost(8, 16, 100, torch.bfloat16)
    assert forward.bytes_moved == (8 * 16 + 100 * 16) * 2 + 8 * 8 and backward.bytes_moved == 8 * 16 * 2
    trained = linear_cross_entropy.cost(8, 16, 100, torch.bfloat16, weight_grad=True)[1]
    assert trained.bytes_moved - backward.bytes_moved == 100 * 16 * 2
    assert trained.flops - backward.flops == 2 * 8 * 16 * 100 and forward.flops == backward.flops


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"])
def test_compiled_scale(arch):
    """Nothing spilled beyond what the assembler puts on a stack, and 128-bit accesses to all but the factor."""
    x, factor = torch.empty(8, 4096, dtype=torch.float16), torch.empty(())
    for compiled in compile_all(lambda: linear_cross_entropy.launch_scale(x, factor), arch):
        found = [fault for fault in faults(compiled, narrow=1) if "spills" not in fault]
        assert not found and not misfit(compiled) and compiled.shared_bytes == 0


CHILD = """
import torch, torch.utils._triton
from torch._subclasses.fake_tensor import FakeTensorMode
torch.utils._triton.has_triton = lambda *a: True  # no GPU, but what would be traced with one
from fastkit.kernels import cross_entropy, linear_cross_entropy
for module in (cross_entropy, linear_cross_entropy):
    module.on_triton, module.sm_count = lambda *a: True, lambda device: 132

def backend(graph, inputs):
    print("traced")
    return graph.forward

def trace(function, *arguments):
    try:
        torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    except BaseException as error:  # it cannot run
        print(type(error).__module__)

with FakeTensorMode():
    options = {"device": "cuda", "dtype": torch.float16, "requires_grad": True}
    logits, hidden, weight = (torch.empty(shape, **options) for shape in ((64, 1000), (64, 128), (1000, 128)))
    labels = torch.empty(64, device="cuda", dtype=torch.int64)
    trace(cross_entropy.cross_entropy, logits, labels)
    trace(linear_cross_entropy.linear_cross_entropy, hidden, weight, labels)
"""


def test_torch_compile_takes_them_in_one_graph_each():
    """Forward and backward, the head trained too: torch 2.11 cannot trace every product that it can run."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    child = subprocess.run([sys.executable, "-c", CHILD], cwd=root, capture_output=True, text=True, env=environment)
    assert child.stdout.split().count("traced") == 2, child.stdout + child.stderr
