"""The code that rope compiles to, the bytes that it moves, and what its cost says of them."""

import pytest
import torch
from compiled import compile_all, faults
from test_rope import inputs, table

from fastkit.kernels import rope as module
from fastkit.lab.portability import misfit
from fastkit.lab.tracer import trace_launches


def test_cost():
    forward, backward = module.cost(2, 16, 4, 2, 64)
    assert forward == backward
    assert forward.bytes_moved == 2 * 2 * 6 * 16 * 64 * 2 + 16 * 64 * 4 and forward.flops == 3 * 2 * 6 * 16 * 64


def launches(dtype, q_heads=32, k_heads=8, D=128, device="meta"):
    q, k = inputs(1, q_heads, k_heads, 8, D, dtype, device)
    cos, sin = (torch.empty(8, D, device=device) for _ in range(2))
    module.launch(q, k, cos, sin, torch.empty_like(q), torch.empty_like(k))


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "gfx942"])
def test_compiled_code(arch):
    """Nothing spilled, and q and k by 128-bit accesses; the table's one row a program may come by narrower ones."""
    (compiled,) = compile_all(lambda: launches(torch.float16), arch)
    assert not misfit(compiled) and not compiled.spilled_bytes
    if arch.startswith("sm"):
        assert not faults(compiled, narrow=2)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((40, 40, 128), torch.bfloat16), ((32, 8, 128), torch.float32), ((16, 16, 256), torch.bfloat16)],
    ids=str,
)
def test_compiled_code_of_other_models(sizes, dtype):
    (compiled,) = compile_all(lambda: launches(dtype, *sizes), "sm_90")
    assert not faults(compiled, narrow=2)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_compiled_code_that_multiplies(arch):
    (compiled,) = compile_all(module.examples()["with v, yet to be scaled"], arch)
    assert not faults(compiled, narrow=3)


def test_one_number_compiles():
    """Triton makes constants of arguments that are 1."""
    assert len(compile_all(lambda: launches(torch.bfloat16, 1, 1, 2), "sm_90")) == 1


@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
def test_moves_what_it_declares(layout):
    """One launch, every sector asked for once and whole; each row of the table once for every eight heads."""
    B, T, D = 2, 16, 128
    q, k = inputs(B, 32, 8, T, D, torch.float16, "cpu")
    if layout == "heads first":
        q, k = q.contiguous(), k.contiguous()
    cos, sin = table(T, D, "cpu")
    outputs = torch.empty_like(q), torch.empty_like(k)
    (trace,) = trace_launches(lambda: module.launch(q, k, cos, sin, *outputs), arch="sm_90", programs=4096)
    assert all(access.efficiency == 1 for access in trace.accesses if not access.unknown)
    tables = [a.bytes_moved for a in trace.accesses if a.argument in ("cos_ptr", "sin_ptr")]
    others = [a.bytes_moved for a in trace.accesses if a.argument not in ("cos_ptr", "sin_ptr")]
    assert sum(others) == 2 * (q.nbytes + k.nbytes)
    assert len(tables) == 2 and sum(tables) <= 5 * B * T * D * 4 * 2  # twice: by each of the warps that need it
