import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled import compile_all
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch

from fastkit.kernels import warp as module
from fastkit.lab.compiling import ARCHITECTURES
from fastkit.lab.portability import rows
from fastkit.lab.tracer import trace_launches

ROOT = Path(__file__).resolve().parents[1]
REDUCTIONS = {module.row_sum: "sum", module.shuffle_sum: "sum", module.shuffle_max: "max"}
by_reduction = pytest.mark.parametrize("reduce", REDUCTIONS, ids=lambda reduce: reduce.__name__)

pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")


def check(reduce, x):
    """Assert that `reduce` errs no more than torch does when it accumulates in fp32."""
    kind = REDUCTIONS[reduce]
    scale = x.double().abs().sum(-1) if kind == "sum" else None
    theirs = x.sum(-1, dtype=torch.float32) if kind == "sum" else x.float().amax(-1)
    assert_as_close_as_torch(reduce(x), theirs, module.reference(x.double(), kind), scale=scale)


@by_reduction
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (5, 129), (2, 1000)], ids=str)
def test_close_to_the_truth(reduce, shape, dtype, device):
    check(reduce, torch.randn(shape, device=device).to(dtype))


@by_reduction
@given(M=st.integers(1, 5), N=st.integers(1, 600), seed=st.integers(0, 2**31), shift=st.sampled_from([0, 3, -3]))
def test_close_to_the_truth_at_any_shape(reduce, dtype, device, M, N, seed, shift):
    torch.manual_seed(seed)
    check(reduce, (torch.randn(M, N, device=device) + shift).to(dtype))


LAYOUTS = {
    "column slice": lambda x: torch.cat([x, x], -1)[:, : x.shape[1]],
    "unaligned": lambda x: torch.cat([x, x], -1)[:, 1 : 1 + x.shape[1]],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "every other row": lambda x: torch.cat([x, x])[::2],
}


@by_reduction
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(reduce, layout, dtype, device):
    check(reduce, LAYOUTS[layout](torch.randn(4, 200, device=device).to(dtype)))


@pytest.mark.parametrize("kind", ["sum", "min", "max"])
@pytest.mark.parametrize("N", [1, 32, 500])
def test_integers_are_exact(kind, N, device):
    most = 2**31 if kind != "sum" or device == "cuda" else 2**31 // N  # numpy refuses what wraps around
    x = torch.randint(-most, most, (6, N), dtype=torch.int32, device=device)
    expected = getattr(x.long(), f"a{kind}")(-1) if kind != "sum" else x.long().sum(-1)
    assert torch.equal(module.redux(x, kind), expected.int())  # sums wrap around
    if kind == "sum":
        assert torch.equal(module.row_sum(x), expected.int()) and torch.equal(module.shuffle_sum(x), expected.int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("N", [1, 20, 32])
def test_broadcast_and_match(dtype, N, device):
    x = torch.randn(7, N, device=device).view(torch.int32).view(dtype)
    assert torch.equal(module.broadcast_first(x), x[:, :1].expand(7, N))
    assert module.all_equal(x).tolist() == [N == 1] * 7
    same = x[:, :1].repeat(1, N)
    assert module.all_equal(same).all()
    if N > 1:
        same[3, N - 1] += 1
        assert module.all_equal(same).tolist() == [row != 3 for row in range(7)]
    transposed = same.mT.contiguous().mT
    assert torch.equal(module.broadcast_first(transposed), same[:, :1].expand(7, N))


def test_match_is_of_bits(device):
    x = torch.tensor([[0.0, -0.0], [torch.nan, torch.nan]], device=device)
    assert module.all_equal(x).tolist() == [False, True]


@by_reduction
def test_nothing(reduce, dtype, device):
    assert reduce(torch.empty(0, 8, dtype=dtype, device=device)).shape == (0,)


@by_reduction
def test_infinities(reduce, device):
    x = torch.zeros(2, 40, device=device)
    x[0, 7] = torch.inf
    assert reduce(x).tolist() == [torch.inf, 0]


def test_same_bits_every_time(device):
    x = torch.randn(8, 999, device=device)
    assert torch.equal(module.shuffle_sum(x), module.shuffle_sum(x))


def test_offsets_past_2_to_the_31(device):
    stride, N = 2**30 + 5, 8
    memory = torch.UntypedStorage((2 * stride + N) * 2, device=device)  # 4 GiB of addresses, few touched
    x = torch.empty(0, dtype=torch.float16, device=device).set_(memory, 0, (3, N), (stride, 1))
    x.copy_(torch.randn(3, N))
    check(module.row_sum, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: module.row_sum(x.double()),
            "row_sum: x has dtype torch.float64; convert it to one of float32, float16",
        ),
        (lambda x: module.row_sum(x[0]), r"row_sum: x has shape \(40,\)"),
        (lambda x: module.row_sum(x[:, :0]), r"row_sum: x has shape \(2, 0\)"),
        (lambda x: module.row_sum([1.0]), "row_sum: x is a list"),
        (lambda x: module.redux(x), "redux: x has dtype torch.float32; convert it to one of int32"),
        (lambda x: module.redux(x.int(), "product"), "redux: kind is 'product'; give one of sum, min, max"),
        (lambda x: module.all_equal(x), "all_equal: x has shape .* rows .* of 1 to 32"),
        (lambda x: module.broadcast_first(x.half()), "broadcast_first: x has dtype torch.float16"),
        (lambda x: module.shuffle_sum(x.to("meta")), "shuffle_sum: x is on device meta"),
        (lambda x: module.shuffle_sum(x.requires_grad_()), r"shuffle_sum: x requires a gradient .* use x.detach\(\)"),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as caught:
        call(torch.zeros(2, 40))
    assert "\n" not in str(caught.value)


def test_cost():
    assert module.cost(8, 1024, torch.float16).bytes_moved == 8 * 1024 * 2 + 8 * 4


# What is compiled


def compiled(arch, launcher, *arguments, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "architecture", lambda device: arch)
        (made,) = compile_all(lambda: launcher(*arguments, **options), arch)
    return made


def tensors(dtype=torch.float16, N=4096):
    return torch.empty(8, N, dtype=dtype), torch.empty(8, dtype=torch.int32 if dtype == torch.int32 else torch.float32)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("launcher", [module.launch_rows, module.launch_shuffles], ids=lambda f: f.__name__)
def test_a_row_is_summed_by_five_shuffles(launcher, arch):
    made = compiled(arch, launcher, *tensors(), "sum")
    assert made.code.count("shfl.sync.bfly.b32") == made.instructions["shfl"] == 5
    assert made.shared_bytes == 0 and made.instructions["bar.sync"] == 0 and made.spilled_bytes == 0
    wide = launcher is module.launch_rows  # by hand a lane loads number by number, eight under way
    assert made.instructions["ld.global.128" if wide else "ld.global.16"] == (1 if wide else 8)
    assert made.instructions["st.global.32"] == 1


@pytest.mark.parametrize("num_warps", [2, 8])
def test_warps_meet_in_shared_memory(num_warps):
    """Five shuffles in each warp, then what each left is stored, read and shuffled again: 2 warps 1 step, 8 three.

    Before 3.8 Triton writes the result to shared memory too, for all warps to read.
    """
    made = compiled("sm_90", module.launch_rows, *tensors(), "sum", num_warps=num_warps)
    assert made.instructions["shfl"] == 5 + num_warps.bit_length() - 1
    assert made.instructions["st.shared.32"] == made.instructions["ld.shared.32"] in (1, 2)
    assert made.instructions["bar.sync"] >= 1
    assert made.shared_bytes == 4 * num_warps


BY_HAND = {  # launcher: (arguments, assembly, how often it stands there)
    "launch_shuffles": ((*tensors(), "max"), "shfl.sync.bfly.b32", 5),
    "launch_shuffles of odd rows": ((*tensors(N=1001), "sum"), "shfl.sync.bfly.b32", 5),
    "launch_redux": ((*tensors(torch.int32), "sum"), "redux.sync.add.s32", 1),
    "launch_redux of odd rows": ((*tensors(torch.int32, 33), "min"), "redux.sync.min.s32", 1),
    "launch_broadcast": ((torch.empty(8, 32), torch.empty(8, 32)), "shfl.sync.idx.b32", 1),
    "launch_match": ((torch.empty(8, 32), torch.empty(8, dtype=torch.bool)), "match.all.sync.b32", 1),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", BY_HAND)
def test_each_lane_holds_one_element(name, arch):
    """The assembly's tile is [32], one register a lane, lane i element i: so it runs once, in all lanes together."""
    arguments, assembly, count = BY_HAND[name]
    made = compiled(arch, getattr(module, name.split()[0]), *arguments)
    uses = [line for line in made.ttgir.splitlines() if "elementwise_inline_asm" in line and assembly in line]
    assert len(uses) == made.code.count(assembly) == count and made.num_warps == 1
    for line in uses:
        layout = re.search(r"-> tensor<32x\w+, (.*)> loc", line)[1]
        definition = re.search(rf"^{re.search('#blocked[0-9]*', layout)[0]} = (.*)$", made.ttgir, re.MULTILINE)[1]
        spread = [list(map(int, numbers.split(","))) for numbers in re.findall(r"= \[([\d, ]+)\]", definition)[:3]]
        assert [numbers[0] for numbers in spread] == [1, 32, 1], f"elements a lane, lanes, warps: {definition}"
        assert "slice" not in layout
        assert "pure = false" in line


def test_bytes_moved_are_the_cost():
    x = torch.zeros(8, 1024)
    (trace,) = trace_launches(lambda: module.launch_rows(x, torch.empty(8), "sum"), arch="sm_90")
    assert trace.bytes_moved("load") == x.nbytes and trace.sectors_per_request("load") == 16
    assert sum(trace.least_bytes.values()) == module.cost(8, 1024).bytes_moved


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_fits_and_what_runs_instead(arch):
    for row in rows(["warp"], [arch]):
        by_hand = row["case"].split()[0] in ("shuffles", "redux", "broadcast", "match")
        lacks = by_hand and (not arch.startswith("sm_") or (arch == "sm_75" and "redux" in row["case"]))
        assert row["fits"] != lacks and bool(row["fallback"]) == lacks, row
        assert not row["spilled_bytes"]


@pytest.mark.parametrize(
    ("arch", "least", "words"),
    [("sm_75", 80, "needs sm_80 and this is sm_75"), ("sm_75", 70, ""), ("gfx942", 70, "is PTX and this is gfx942")],
)
def test_lacking(arch, least, words, monkeypatch):
    monkeypatch.setattr(module, "architecture", lambda device: arch)
    assert module.lacking(torch.device("cpu"), least) == words


def test_by_hand_nothing_runs_in_the_interpreter():
    if torch.cuda.is_available():
        pytest.skip("here is a GPU")
    for name, (arguments, _, _) in BY_HAND.items():
        with pytest.raises(NotImplementedError, match=r"is PTX and this is interpreter: use "):
            getattr(module, name.split()[0])(*arguments)


DYNAMO = """
import torch, torch.utils._triton
torch.utils._triton.has_triton = lambda *a: True  # no GPU, but what would be traced with one
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from fastkit.kernels import warp
warp.on_triton, warp.architecture = (lambda *a: True), (lambda device: "sm_90")

class Traced(Exception):
    pass

def backend(graph, inputs):
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    launches = [call for call in calls if getattr(call.target, "__name__", "") == "triton_kernel_wrapper_mutation"]
    print(len(launches))
    for launch in launches:  # inductor writes them into code
        eval(repr(kernel_side_table.get_constant_args(launch.kwargs["constant_args_idx"])))
    def run(*inputs):
        raise Traced
    return run

for function in (warp.row_sum, warp.shuffle_max, warp.redux, warp.broadcast_first, warp.all_equal):
    x = torch.zeros(8, 32, dtype=torch.int32 if function is warp.redux else torch.float32)
    try:
        torch.compile(function, backend=backend, fullgraph=True)(x)
    except Traced:
        pass
"""


def test_torch_compile_takes_each_in_one_graph():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    child = subprocess.run([sys.executable, "-c", DYNAMO], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert child.stdout == "1\n" * 5, child.stderr


@pytest.mark.gpu
def test_by_hand_is_what_runs_on_a_gpu(device):
    """Else the tests above would compare torch with torch."""
    x = torch.randn(9, 700, device=device)
    y = torch.empty(9, device=device)
    if module.lacking(x.device):
        pytest.skip("no PTX here")
    module.launch_shuffles(x, y, "max")
    assert torch.equal(y, x.amax(-1))
    whole = torch.randint(-9, 9, (9, 700), dtype=torch.int32, device=device)
    found = torch.empty(9, dtype=torch.int32, device=device)
    if not module.lacking(x.device, 80):
        for kind in module.REDUX:
            module.launch_redux(whole, found, kind)
            assert torch.equal(found, module.reference(whole, kind))


@pytest.mark.gpu
def test_cuda_graph(device):
    x = torch.randn(9, 700, device=device)
    expected = module.shuffle_sum(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module.shuffle_sum(x)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_torch_compile(device):
    x = torch.randn(9, 32, device=device)
    for function in (module.row_sum, module.shuffle_sum, module.shuffle_max, module.broadcast_first, module.all_equal):
        assert torch.equal(torch.compile(function, fullgraph=True)(x), function(x))
