"""The block simulator computes what Triton's interpreter computes, and stops at what a GPU would let pass."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastkit.errors import FastkitError
from fastkit.kernels.ladders import add as adds
from fastkit.kernels.ladders import add_norm as norms
from fastkit.kernels.ladders import copy as copies
from fastkit.kernels.ladders import softmax as softmaxes
from fastkit.lab import blocks
from fastkit.lab import blocks as tl

INTERPRETED = adds.triton.knobs.runtime.interpret
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="is held against Triton's interpreter")


def simulated(kernel, grid, inputs, size, *numbers, **constants):
    """(what the kernel writes to its last pointer, the run) in the simulator."""
    memory = blocks.Memory()
    pointers = [memory.put(f"x{number}", x) for number, x in enumerate(inputs)]
    out = memory.room("out", size)
    run = blocks.launch(kernel, grid, *pointers, out, *numbers, **constants)
    return out.numbers(), run


def interpreted(kernel, grid, inputs, size, *numbers, **constants):
    out = torch.full((size,), torch.nan)
    kernel[(grid,)](*inputs, out, *numbers, **constants)
    return out.numpy()


ROWS = {
    softmaxes._three_pass_kernel: (1, lambda N: (N, N, N), {"BLOCK_N": 16}, 4),
    softmaxes._online_kernel: (1, lambda N: (N, N, N), {"BLOCK_N": 16}, 3),
    softmaxes._fused_kernel: (1, lambda N: (N, N, N), {"BLOCK_N": 64}, 2),
    softmaxes._persistent_kernel: (1, lambda N: (None, N, N, N), {"BLOCK_N": 64, "STAGES": 2}, 2),
    norms._fused_kernel: (2, lambda N: (N,), {"BLOCK_N": 64, "EPS": norms.EPS}, 3),
}


@pytest.mark.parametrize("kernel", ROWS, ids=lambda kernel: f"{kernel.fn.__module__.split('.')[-1]}{kernel.__name__}")
@given(M=st.integers(1, 5), N=st.integers(1, 64), seed=st.integers(0, 2**31))
def test_rows_are_the_interpreters_to_the_bit(kernel, M, N, seed):
    count, numbers, constants, transfers = ROWS[kernel]
    rng = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(M, N, generator=rng) for _ in range(count)]
    sizes = [M if number is None else number for number in numbers(N)]
    programs = min(M, 2) if None in numbers(N) else M
    ours, run = simulated(kernel, programs, inputs, M * N, *sizes, **constants)
    theirs = interpreted(kernel, programs, inputs, M * N, *sizes, **constants)
    assert np.array_equal(ours, theirs) and not np.isnan(ours).any()
    assert run.bytes_moved() == 4 * transfers * M * N


@given(n=st.integers(1, 200), BLOCK=st.sampled_from([1, 4, 32, 256]))
def test_elementwise_kernels_are_the_interpreters_to_the_bit(n, BLOCK):
    x, y = torch.randn(2, n)
    for kernel, inputs, grid, constants in (
        (adds._grid_kernel, [x, y], -(-n // BLOCK), {"BLOCK": BLOCK}),
        (adds._alone_kernel, [x, y], 1, {"BLOCK": BLOCK}),
        (copies._strided_kernel, [x], -(-n // (2 * BLOCK)), {"LANES": BLOCK, "STEPS": 2}),
    ):
        ours, run = simulated(kernel, grid, inputs, n, n, **constants)
        assert np.array_equal(ours, interpreted(kernel, grid, inputs, n, n, **constants))
        assert run.bytes_moved("load") == 4 * n * len(inputs) and run.bytes_moved("store") == 4 * n


# What goes wrong. Kernels as a learner would write them: plain functions


def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK, masked=True, step=1, shift=0):
    offsets = tl.program_id(0) * BLOCK * step + tl.arange(0, BLOCK) + shift
    mask = offsets < n if masked else True
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask) + tl.load(y_ptr + offsets, mask), mask)


def run_add(n=10, grid=3, BLOCK=4, **how):
    memory = blocks.Memory()
    x, y = memory.put("x", range(n)), memory.put("y", range(100, 100 + n))
    out = memory.room("out", n)
    run = blocks.launch(add_kernel, grid, x, y, out, n, BLOCK, **how)
    return out.numbers(), run


def test_a_plain_function_runs():
    out, run = run_add()
    assert out.tolist() == [100 + 2 * i for i in range(10)] and run.grid == (3,)
    assert [access.kind for access in run.accesses] == ["load", "load", "store"] * 3
    last = run.accesses[-1]
    assert last.tensor.name == "out" and last.program == (2,) and last.mask.tolist() == [True, True, False, False]
    assert last.offsets.tolist() == [8, 9, 10, 11] and last.bytes == 8


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"masked": False}, r"program 2 loads x\[10\], but x has 10 numbers: what lies there is y\[0\] = 100"),
        ({"shift": -1}, r"program 0 loads x\[-1\], but x has 10 numbers: what lies there is memory of others"),
        ({"step": 0}, r"program 1 stores out\[0\], which program 0 stored in the same launch: .* is chance"),
    ],
)
def test_what_a_gpu_would_let_pass(how, message):
    with pytest.raises(FastkitError, match=message):
        run_add(**how)


def test_reading_what_another_program_writes_is_a_race():
    def shift_kernel(x_ptr, n, BLOCK):  # x[i] = x[i + 1], in place
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x_ptr + offsets, tl.load(x_ptr + offsets + 1, mask=offsets + 1 < n, other=0), mask=offsets < n)

    x = blocks.Memory().put("x", range(8))
    blocks.launch(shift_kernel, 1, x, 8, BLOCK=8)
    assert x.numbers().tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    with pytest.raises(FastkitError, match=r"program 1 stores x\[4\], which program 0 loaded in the same launch"):
        blocks.launch(shift_kernel, 2, x, 8, BLOCK=4)


def test_lanes_that_store_to_one_place_are_a_race():
    def kernel(out_ptr):
        tl.store(out_ptr + tl.arange(0, 4) // 2, 1.0)

    with pytest.raises(FastkitError, match=r"two lanes of program 0 store out\[0\]"):
        blocks.launch(kernel, 1, blocks.Memory().room("out", 4))


def test_unwritten_and_masked_are_nan():
    def kernel(x_ptr, out_ptr):
        lanes = tl.arange(0, 4)
        tl.store(out_ptr + lanes, tl.load(x_ptr + lanes, mask=lanes < 2))

    memory = blocks.Memory()
    x, out = memory.put("x", [1, 2, 3, 4]), memory.room("out", 4)
    assert np.isnan(out.numbers()).all()
    blocks.launch(kernel, 1, x, out)
    assert np.array_equal(out.numbers(), [1, 2, np.nan, np.nan], equal_nan=True)


def test_grids_of_two_dimensions():
    def kernel(out_ptr):
        place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(out_ptr + place, place)

    out = blocks.Memory().room("out", 6)
    run = blocks.launch(kernel, (2, 3), out)
    assert out.numbers().tolist() == [0, 1, 2, 3, 4, 5] and run.accesses[-1].program == (1, 2)
    with pytest.raises(FastkitError, match=r"program \(0, 1\) stores out\[0\]"):
        blocks.launch(lambda out_ptr: tl.store(out_ptr, 0), (1, 2), out)


def test_what_is_no_launch():
    with pytest.raises(FastkitError, match="a block of 5 lanes: take a power of two"):
        tl.arange(0, 5)
    with pytest.raises(FastkitError, match="no program runs here"):
        tl.program_id(0)
