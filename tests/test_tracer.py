import linecache
import re
import textwrap

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkit.errors import FastkitError
from fastkit.kernels import rms_norm, swiglu
from fastkit.lab.tracer import trace, trace_launches


@triton.jit
def strided(x_ptr, y_ptr, n, offset, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset + i * STRIDE, mask=i < n, other=0)
    tl.store(y_ptr + i, x, mask=i < n)


@triton.jit
def tile(x_ptr, y_ptr, M, N, stride_m, stride_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_m + cols[None, :] * stride_n, mask=mask, other=0)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], x, mask=mask)


@triton.jit
def fetch(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0)


@triton.jit
def many(x_ptr, y_ptr, z_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x_ptr + i, mask=i < n), tl.load(y_ptr + 32 * i, mask=i < n)  # both on one line
    c = fetch(x_ptr + 2 * i, i < n) * fetch(y_ptr + 8 * i, i < n)  # one line, called twice
    d = tl.load(
        x_ptr + 4 * i,
        mask=i < n,
    )
    unused = tl.load(y_ptr + 16 * i, mask=i < n)
    unused += 1
    tl.store(z_ptr + i, a + b + c + d, mask=i < n)


@triton.jit
def again(x_ptr, y_ptr, turns, BLOCK: tl.constexpr):
    i, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    for turn in range(0, turns):
        x = tl.load(x_ptr + i)  # the same each time: taken out of the loop
        total += x * tl.load(y_ptr + turn * BLOCK + i)
    tl.store(y_ptr + turns * BLOCK + i, total)


@triton.jit
def packed(q_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(q_ptr + i)  # two 4-bit numbers a byte
    tl.store(y_ptr + 2 * i, (q & 15).to(tl.float16))
    tl.store(y_ptr + 2 * i + 1, (q >> 4).to(tl.float16))


@triton.jit
def described(x_desc, y_ptr, N, BLOCK: tl.constexpr):
    x = x_desc.load([tl.program_id(0) * BLOCK, 0])
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + rows[:, None] * N + tl.arange(0, BLOCK)[None, :], x)


@triton.jit
def product(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, ks = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    c = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * K + (k + ks)[None, :])
        b = tl.load(b_ptr + (k + ks)[:, None] * BLOCK + rows[None, :])
        c = tl.dot(a, b, c)
    tl.store(c_ptr + rows[:, None] * BLOCK + rows[None, :], c.to(tl.float16))


@triton.jit
def gathered(index_ptr, x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + tl.load(index_ptr + i)))


def lanes_by_hand(shape, per_thread, threads, warps, order):
    """For each (warp, lane): the elements it holds, in the order of its registers, by the definition of a layout."""
    block = [p * t * w for p, t, w in zip(per_thread, threads, warps, strict=True)]
    for warp in range(int(np.prod(warps))):
        for lane in range(32):
            place, number = [0] * len(shape), (lane, warp)
            for level, sizes in ((0, threads), (1, warps)):
                rest = number[level]
                for dim in order:
                    place[dim] += rest % sizes[dim] * per_thread[dim] * (threads[dim] if level else 1)
                    rest //= sizes[dim]
            held = []
            repeats = [max(1, s // b) for s, b in zip(shape, block, strict=True)]
            for repeat in np.ndindex(*[repeats[dim] for dim in reversed(order)]):
                for inner in np.ndindex(*[per_thread[dim] for dim in reversed(order)]):
                    at = [0] * len(shape)
                    for dim, outer, own in zip(reversed(order), repeat, inner, strict=True):
                        at[dim] = (place[dim] + outer * block[dim] + own) % shape[dim]
                    held.append(tuple(at))
            yield warp, lane, held


def by_hand(access, address, mask, shape, size):
    """(requests, sectors, bytes asked) of one execution, a lane at a time, from the layout's printed parameters."""
    numbers = {
        key: [int(n) for n in value.split(",")]
        for key, value in re.findall(r"(\w+)=\[([\d, ]+)\]", access.layout)
    }  # fmt: skip
    fields = numbers["size_per_thread"], numbers["threads_per_warp"], numbers["warps_per_cta"], numbers["order"]
    vector = access.vector_bits // (8 * size)
    touched, seen = {}, set()
    for warp, lane, held in lanes_by_hand(shape, *fields):
        for start in range(0, len(held), vector):
            elements = held[start : start + vector]
            first = elements[0]
            if (access.kind == "store" and first in seen) or (lane, warp, first) in seen:
                continue
            seen |= {first, (lane, warp, first)}
            for at in elements:
                if mask(*at):
                    begin = address(*at)
                    touched.setdefault((warp, start), set()).update(range(begin, begin + size))
    sectors = sum(len({byte // 32 for byte in bytes_}) for bytes_ in touched.values())
    return len(touched), sectors, sum(map(len, touched.values()))


def check(access, *expected):
    requests, sectors, asked = np.sum(expected, axis=0)
    assert (access.requests, access.sectors, access.bytes_asked) == (requests, sectors, asked), access


@settings(max_examples=12)
@given(
    stride=st.sampled_from([0, 1, 2, 3, 8, 33]),
    offset=st.integers(0, 40),
    n=st.integers(1, 600),
    block=st.sampled_from([32, 128, 256, 1024]),
    dtype=st.sampled_from([torch.int8, torch.float16, torch.float32, torch.int64]),
    num_warps=st.sampled_from([1, 2, 4]),
)
def test_one_dimension_is_as_counted_lane_by_lane(stride, offset, n, block, dtype, num_warps):
    x = torch.zeros(offset + 600 * max(1, stride) + 1, dtype=dtype)
    y = torch.zeros(600, dtype=dtype)
    grid = triton.cdiv(n, block)
    found = trace(strided, (grid,), (x, y, n, offset), STRIDE=stride, BLOCK=block, num_warps=num_warps, arch="sm_80")
    size = dtype.itemsize
    masks = [lambda i, p=p: p * block + i < n for p in range(grid)]
    loads = [lambda i, p=p: size * (offset + (p * block + i) * stride) for p in range(grid)]
    stores = [lambda i, p=p: size * (p * block + i) for p in range(grid)]
    (load,), (store,) = found.of("load"), found.of("store")
    check(load, *(by_hand(load, at, m, (block,), size) for at, m in zip(loads, masks, strict=True)))
    check(store, *(by_hand(store, at, m, (block,), size) for at, m in zip(stores, masks, strict=True)))
    assert load.argument == "x_ptr" and store.argument == "y_ptr"
    assert load.bytes_moved == 32 * load.sectors and 0 < load.efficiency <= 1


@settings(max_examples=12)
@given(
    M=st.integers(1, 70),
    N=st.integers(1, 70),
    turned=st.booleans(),
    slack=st.integers(0, 3),
    block_m=st.sampled_from([1, 16, 32]),
    block_n=st.sampled_from([4, 32, 64]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
def test_two_dimensions_are_as_counted_lane_by_lane(M, N, turned, slack, block_m, block_n, dtype):
    x = torch.zeros(N, M + slack, dtype=dtype).mT[:M] if turned else torch.zeros(M, N + slack, dtype=dtype)[:, :N]
    y = torch.zeros(M, N, dtype=dtype)
    grid = triton.cdiv(M, block_m), triton.cdiv(N, block_n)
    found = trace(tile, grid, (x, y, M, N, *x.stride()), BLOCK_M=block_m, BLOCK_N=block_n, arch="sm_90", programs=None)
    size = dtype.itemsize
    (load,), (store,) = found.of("load"), found.of("store")
    for access, (stride_m, stride_n) in ((load, x.stride()), (store, (N, 1))):
        expected = []
        for p, q in np.ndindex(*grid):
            at = lambda i, j, p=p, q=q: size * ((p * block_m + i) * stride_m + (q * block_n + j) * stride_n)  # noqa: B023, E731
            mask = lambda i, j, p=p, q=q: p * block_m + i < M and q * block_n + j < N  # noqa: E731
            expected.append(by_hand(access, at, mask, (block_m, block_n), size))
        check(access, *expected)
    assert found.programs == (grid[0] * grid[1],) * 2
    assert found.least_bytes["store"] == -(-M * N * size // 32) * 32


def test_known_strides():
    n = 4096
    x, y = torch.zeros(33 * n), torch.zeros(n)
    for stride, expected in ((1, 4), (2, 8), (8, 32), (32, 32)):  # a number a lane
        (load,) = trace(strided, (32,), (x, y, n, 0), STRIDE=stride, BLOCK=128, arch="sm_90").of("load")
        assert (load.sectors_per_request, load.vector_bits) == (expected, 32)
    for stride, vector, expected in ((1, 128, 16), (2, 32, 32)):  # four numbers a lane
        (load,) = trace(strided, (4,), (x, y, n, 0), STRIDE=stride, BLOCK=1024, arch="sm_90").of("load")
        assert (load.sectors_per_request, load.vector_bits) == (expected, vector)
    (load,) = trace(strided, (4,), (x, y, 4095, 0), STRIDE=1, BLOCK=1024, arch="sm_90").of("load")
    assert load.vector_bits == 32  # 4095 is no multiple of 16: no wide loads


def test_accesses_are_told_apart():
    n = 1024
    x, y, z = torch.zeros(4 * n), torch.zeros(32 * n), torch.zeros(n)
    found = trace(many, (8,), (x, y, z, n), BLOCK=128, arch="sm_80")
    known = [(a.argument, a.sectors_per_request) for a in found.of("load") if not a.unknown]
    assert sorted(known) == [("x_ptr", 4), ("x_ptr", 8), ("x_ptr", 16), ("y_ptr", 32), ("y_ptr", 32)]
    (unused,) = [a for a in found.of("load") if a.unknown]
    assert "unused" in unused.source and unused.sectors is None and unused.sectors_per_request is None
    assert found.sectors_per_request("load") is None and found.sectors_per_request("store") == 4
    assert "tl.store(z_ptr" in found.of("store")[0].source
    shown = {(row["access"], row["sectors a request"], row["efficiency"]) for row in found.rows()}
    assert {("load x_ptr", "4", "100%"), ("load x_ptr", "8", "50%"), ("load", "unknown", "unknown")} <= shown


def test_packed_numbers():
    found = trace(
        packed, (2,), (torch.zeros(2048, dtype=torch.uint8), torch.zeros(4096, dtype=torch.float16)), BLOCK=1024
    )
    (load,), stores = found.of("load"), found.of("store")
    assert load.bits == 8 and load.sectors * 32 == 2048 and load.efficiency == 1
    assert [store.efficiency for store in stores] == [0.5, 0.5]


def test_descriptors_are_copied_by_the_engine_or_by_lanes():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = torch.zeros(256, 64)
    args = TensorDescriptor.from_tensor(x, [64, 64]), torch.zeros(256, 64), 64
    (load,) = trace(described, (4,), args, BLOCK=64, arch="sm_90").of("load")
    assert load.instruction == "TMA load" and load.requests is None and load.sectors_per_request is None
    assert load.bytes_moved == x.numel() * 4 and load.shape == (64, 64)
    (load,) = trace(described, (4,), args, BLOCK=64, arch="sm_80").of("load")
    assert load.instruction == "ld.global" and load.bytes_asked == x.numel() * 4


def test_pipelined_loads_and_matrix_loads():
    a, b = torch.zeros(64, 256, dtype=torch.float16), torch.zeros(256, 64, dtype=torch.float16)
    c = torch.zeros(64, 64, dtype=torch.float16)
    found = trace(product, (1,), (a, b, c, 256), BLOCK=64, BLOCK_K=32, num_stages=3, arch="sm_80")
    assert {load.instruction for load in found.of("load")} == {"cp.async"}
    assert all(load.bytes_moved == a.numel() * 2 for load in found.of("load"))
    assert found.instructions["HMMA"] and found.instructions["ldmatrix"] and found.instructions["cp.async.128"]
    read = [s for s in found.shared if s.operation == "ttg.local_load"]
    assert len(read) == 2 and all(s.instruction == "ldmatrix" and s.conflicts == 0 for s in read)
    assert found.shared_bytes and found.spilled_bytes == 0 and 0 < found.occupancy <= 1


def test_addresses_that_hang_on_data():
    index = torch.randperm(512)
    found = trace(gathered, (1,), (index, torch.zeros(512), torch.zeros(512)), BLOCK=512, arch="sm_80")
    gather = next(a for a in found.of("load") if a.argument == "x_ptr")
    check(gather, by_hand(gather, lambda i: 4 * int(index[i]), lambda i: True, (512,), 4))


@triton.jit
def by_rows(x_ptr, label_ptr, y_ptr, N):
    row = tl.program_id(0)
    label = tl.load(label_ptr + row)
    if label >= 0:
        tl.store(y_ptr + row, tl.load(x_ptr + row * N + label))


def test_single_numbers():
    labels = torch.tensor([3, -1, 0, 7, 31, 2])
    found = trace(by_rows, (6,), (torch.zeros(6, 32), labels, torch.zeros(6), 32), arch="sm_80", num_warps=4)
    label, x = (next(a for a in found.of("load") if a.argument == name) for name in ("label_ptr", "x_ptr"))
    (store,) = found.of("store")
    assert (label.requests, label.sectors) == (24, 24)  # each of 4 warps asks for it
    assert (x.requests, x.sectors) == (20, 20) and x.shape == ()
    assert (store.requests, store.sectors, store.bytes_asked) == (5, 5, 20)  # one lane stores


def test_big_grids_are_sampled_and_say_so():
    n = 2**24
    x, y = torch.empty(n, device="meta"), torch.empty(n, device="meta")
    found = trace(strided, (n // 1024,), (x, y, n, 0), STRIDE=1, BLOCK=1024)
    assert found.programs == (32, n // 1024) and found.least_bytes is None
    assert found.bytes_moved("load") == found.bytes_moved("store") == 4 * n
    assert any("32 of 16384" in note for note in found.notes) and any(
        "zeros" in note and "x_ptr" in note for note in found.notes
    )
    again = trace(strided, (n // 1024,), (x, y, n, 0), STRIDE=1, BLOCK=1024)
    assert again.accesses[0].walk == found.accesses[0].walk


def test_printed_it_fits_a_terminal():
    from fastkit.kernels.ladders import transpose

    x, y = torch.empty(256, 256), torch.empty(256, 256)
    (found,) = trace_launches(lambda: transpose.launch_shared(x, y), arch="sm_89")
    lines = str(found).splitlines()
    assert lines[0] == "_tile_kernel for sm_89, 64 programs" and len(lines) < 10 and max(map(len, lines)) <= 120
    assert "4 sectors a request, 256 KiB moved for 256 asked (100%)" in lines[1]
    assert lines[4].endswith("992 bank conflicts") and "4,096 bytes of shared memory, occupancy 100%" in lines[5]
    assert "array(" not in repr(found)


def test_the_caller_s_tensors_are_left_alone():
    x, y = torch.ones(1024), torch.full((1024,), 7.0)
    trace(strided, (1,), (x, y, 1024, 0), STRIDE=1, BLOCK=1024)
    assert (y == 7).all() and (x == 1).all()


def test_the_library_s_own_launches():
    x, weight = torch.randn(8, 4096, requires_grad=True), torch.ones(4096)

    def both():
        rms_norm.rms_norm(x, weight).sum().backward()

    forward, backward = trace_launches(both, arch="sm_89")
    assert (forward.kernel, backward.kernel) == ("_forward_kernel", "_backward_kernel")
    for found in (forward, backward):
        assert {access.unknown for access in found.accesses} == {""}
    x_load = next(a for a in forward.of("load") if a.argument == "x_ptr")
    assert x_load.vector_bits == 128 and x_load.efficiency == 1 and x_load.source.startswith("x = tl.load(")
    gate = torch.randn(4, 1000)
    (found,) = trace_launches(lambda: swiglu.launch_forward(gate, gate, gate.clone()), arch="sm_75")
    assert [(a.vector_bits, a.efficiency) for a in found.accesses] == [(32, 1)] * 3  # rows of 1000: no wide access


def test_a_kernel_of_a_notebook():
    text = textwrap.dedent("""
        import triton
        import triton.language as tl

        SCALE = 3

        @triton.jit
        def inner(ptr, mask):
            return tl.load(ptr, mask=mask)

        @triton.jit
        def from_a_cell(x_ptr, n, BLOCK: tl.constexpr):
            i = tl.arange(0, BLOCK)
            tl.store(x_ptr + i, inner(x_ptr + i * SCALE_IN, i < n), mask=i < n)
    """).replace("SCALE_IN", "3")
    file = "<ipython-input-1-cell>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    names = {"__name__": "__main__"}
    exec(compile(text, file, "exec"), names)
    found = trace(names["from_a_cell"], (1,), (torch.zeros(384), 128), BLOCK=128, arch="sm_80")
    (load,), (store,) = found.of("load"), found.of("store")
    assert load.sectors_per_request == 12 and load.source == "return tl.load(ptr, mask=mask)"
    assert text.splitlines()[store.line - 1].strip() == store.source


def test_gluon_kernels_through_shared_memory():
    from fastkit.kernels.ladders import transpose

    x, y = torch.zeros(128, 128), torch.zeros(128, 128)
    conflicts = {}
    for kind in ("shared", "swizzled", "padded"):
        (found,) = trace_launches(lambda kind=kind: transpose._launch_gluon(kind, x, y), arch="sm_80")
        assert [a.sectors_per_request for a in found.accesses] == [4, 4]
        assert found.bytes_moved("load") == found.bytes_moved("store") == x.numel() * 4
        read = next(s for s in found.shared if s.kind == "load")
        conflicts[kind] = read.conflicts / read.requests
    assert conflicts == {"shared": 31, "swizzled": 0, "padded": 0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: trace(strided, (1,), (x, x, 64), STRIDE=1, BLOCK=64), "missing a required argument: 'offset'"),
        (lambda x: trace(strided, (0,), (x, x, 64, 0), STRIDE=1, BLOCK=64), r"the grid is \(0,\)"),
        (lambda x: trace(strided, (1,), (x, x, 64, 0), STRIDE=1, BLOCK=64, arch="gfx942"), "gfx942: sectors and banks"),
        (lambda x: trace(strided, (1,), (x, x, 64, 0), STRIDE=1, BLOCK=64, arch="hopper"), "hopper"),
        (lambda x: trace(strided, (1,), (x, x, 64, 0), STRIDE=1, BLOCK=48), "cannot be compiled for sm_90"),
        (lambda x: trace(print, (1,), (x,)), "expected a kernel made by triton.jit"),
        (lambda x: trace_launches(lambda: None), "no Triton kernel was launched"),
        (lambda x: trace(strided, (1,), (x, x, 65, 0), STRIDE=1, BLOCK=128), "beyond the end of an argument's memory"),
        (lambda x: trace(strided, (1,), (x, x, 64, -4), STRIDE=1, BLOCK=64), "before the start"),
        (
            lambda x: trace(
                triton.autotune([triton.Config({"BLOCK": 64})], key=[])(strided), (1,), (x, x, 64, 0), STRIDE=1
            ),
            "is autotuned",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(FastkitError, match=message) as caught:
        call(torch.zeros(64))
    assert "\n" not in str(caught.value)


def test_what_the_compiler_takes_out_of_a_loop_is_counted_once():
    found = trace(again, (1,), (torch.zeros(128), torch.zeros(11 * 128), 10), BLOCK=128, num_warps=1)
    expected = [("x_ptr", "load", 1), ("y_ptr", "load", 10), ("y_ptr", "store", 1)]
    assert [(a.argument, a.kind, a.requests) for a in found.accesses] == expected
