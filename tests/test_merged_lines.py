"""The merged dequantization in whole lines: its arithmetic on a GPU, its addresses and its machine code anywhere."""

import functools
import itertools

import numpy as np
import pytest
import torch
from compiled import compile_all, interpret, pretended
from late_copies import Copies
from tolerance import assert_as_close_as_torch

from fastkit.kernels import merged_dequantize, nf4
from fastkit.kernels import merged_lines as module
from fastkit.kernels import merged_lines_parts as parts
from fastkit.kernels import merged_lines_ring as ring
from fastkit.kernels.common import INTERPRETED, tl
from fastkit.kernels.fp8_scale import FP8, lacks_fp8, reference_fp8
from fastkit.lab.bank_conflicts import shared_accesses
from fastkit.lab.gluon_interpreter import _language
from fastkit.lab.launches import catch
from fastkit.lab.occupancy import resident_blocks
from fastkit.lab.portability import misfit
from fastkit.ops import dequantize_nf4
from fastkit.ops import merged_dequantize as merge

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")

SCALING = 1.7
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SHAPES = [  # N, K, r, blocksize, double_quant
    (64, 256, 16, 64, True),
    (1, 256, 1, 64, False),
    (33, 512, 5, 128, True),
    (100, 768, 16, 256, False),
    (96, 512, 32, 64, True),
    (31, 1024, 32, 512, True),
    (161, 256, 16, 64, True),
    (150, 512, 8, 64, False),
    (160, 512, 32, 64, False),
]


def random_weight(N, K, blocksize, double_quant, dtype, device):
    """Random bits: any are a weight."""
    weight = nf4.empty_nf4((N, K), dtype, blocksize, double_quant, device)
    weight.packed.random_(256)
    if not double_quant:
        weight.absmax.uniform_(0.5, 2)
        return weight
    weight.absmax.random_(256)
    weight.offset.fill_(1.3)
    weight.nested_absmax.uniform_(0.1, 1)
    weight.nested_code.copy_(torch.linspace(-1, 1, 256))
    return weight


def inputs(N, K, r, blocksize=64, double_quant=True, dtype=torch.bfloat16, device="cuda"):
    A, B = (0.3 * torch.randn(shape, device=device) for shape in ((r, K), (N, r)))
    return random_weight(N, K, blocksize, double_quant, dtype, device), A.to(dtype), B.to(dtype)


def within(N, K, dtype, device, before=8, after=16):
    """(w [N, K], the buffer of NaN that it lies in, a row and some columns larger)."""
    buffer = torch.full((N + 1, before + K + after), torch.nan, dtype=torch.float32, device=device).to(dtype)
    return buffer[:N, before : before + K], buffer


def turned(shape, transposed):
    return shape[::-1] if transposed else shape


def untouched(w, buffer):
    """Whether of `buffer` only `w` was written."""
    return int(buffer.float().isnan().sum()) == buffer.numel() - w.numel()


# Whom it takes


@pytest.fixture
def on_gpu(monkeypatch):
    """As if there were a GPU of the architecture that it is called with, and SMs."""
    return pretended(monkeypatch, module, merged_dequantize)


def launched(N=64, K=512, r=16, blocksize=64, dtype=torch.bfloat16, adapter=None, out=None, device="meta", **options):
    """The names of the kernels that merged_dequantize.launch takes."""
    weight = nf4.empty_nf4((N, K), dtype, blocksize, device=device)
    empty = functools.partial(torch.empty, device=device)
    A, B, w = (
        (None, None) if r == 0 else (empty(r, K, dtype=adapter or dtype), empty(N, r, dtype=adapter or dtype))
    ) + (empty(*((K, N) if options.get("transposed") else (N, K)), dtype=out or dtype),)
    inverse = empty(N) if out == FP8 else None
    caught = catch(lambda: merged_dequantize.launch(weight, A, B, SCALING, w, inverse=inverse, **options))
    return [launch.name for launch in caught]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_it_takes(arch, on_gpu):
    on_gpu(arch)
    for options in (
        dict(), dict(r=1), dict(r=5), dict(r=32), dict(N=77), dict(K=256), dict(dtype=torch.float16),
        dict(blocksize=4096),
    ):  # fmt: skip
        assert launched(**options) == ["_lines_kernel"], options
    if arch not in ("sm_80", "sm_86"):
        assert launched(out=FP8) == launched(out=FP8, transposed=True) == ["_lines_kernel"]


def test_what_it_leaves(on_gpu, monkeypatch):
    on_gpu("sm_90")
    for options in (
        dict(r=0), dict(r=17), dict(r=33), dict(r=64), dict(K=512 + 64), dict(K=8), dict(blocksize=32),
        dict(dtype=torch.float32), dict(adapter=torch.float32), dict(adapter=torch.float16),
        dict(dtype=torch.float16, out=FP8), dict(transposed=True), dict(num_warps=4), dict(BLOCK_N=32),
        dict(device="cpu"),
    ):  # fmt: skip
        assert launched(**options) == ["_merge_kernel"], options
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert launched() == ["_merge_kernel"]
    for arch in ("gfx942", "gfx1100", "interpreter", "no GPU"):
        on_gpu(arch)
        assert launched() == ["_merge_kernel"]
    on_gpu("sm_90")
    monkeypatch.setattr(module, "GLUON_MISSING", "as in Triton's interpreter")
    assert launched() == ["_merge_kernel"]
    assert not module.takes(*inputs(1, 256, 1, device="cpu"), torch.empty(1, 256, device="meta"), False, "sm_75")


def test_all_programs_run_at_once_and_none_is_idle(on_gpu):
    for arch, sms, N, K in (("sm_90", 132, 14336, 4096), ("sm_80", 108, 1000, 4096), ("sm_90", 1, 40, 8192)):
        on_gpu(arch, sms)
        weight = nf4.empty_nf4((N, K), torch.bfloat16, device="meta")
        A, B, w = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((16, K), (N, 16), (N, K)))
        (launch,) = catch(lambda: module.launch(weight, A, B, 1.0, w))  # noqa: B023
        rows, wide = 32 * launch.arguments["turns"], K // 256
        down = launch.grid[0] // wide
        programs, _ = resident_blocks(arch, launch.options["maxnreg"], ring.ring_bytes(launch.arguments["RING"]), 4)
        assert launch.grid[0] <= max(wide, programs * sms) and (down - 1) * rows < N <= down * rows


# Its addresses, in Triton's interpreter


def lane_of(x, lane, half):
    """x of another lane, as the shuffles give it, where axes 2 and 3 are t and g of lane t + 4 g."""
    from triton.runtime.interpreter import TensorHandle

    x, lane = np.broadcast_arrays(x.handle.data, lane.handle.data.astype(np.int64))
    index = np.indices(lane.shape, sparse=True)
    source = index[2] + 4 * index[3] & 16 | lane & 15 if half else lane & 31
    data = x[(*index[:2], source & 3, source >> 2, *index[4:])]
    return tl.tensor(TensorHandle(data, tl.float32), tl.block_type(tl.float32, list(data.shape)))


@pytest.fixture
def interpreted(monkeypatch, on_gpu):
    """The kernel in Triton's interpreter, which ignores layouts: mma_v2 is a dot, a shuffle is told how lanes stand."""
    if not INTERPRETED:
        pytest.skip("on a GPU it runs")
    on_gpu("sm_90", 1)
    monkeypatch.setattr(module, "_resident", lambda *_: 2)  # some turns
    language = _language(tl, module.gl)
    language.static_range = range
    for kernels in (parts, ring, module):
        interpret(monkeypatch, kernels)
    for BLOCK_R, transposed in itertools.product((16, 32), (False, True)):  # made by the true gl, and kept
        parts.tile(BLOCK_R, transposed)
        for stages, double_quant in itertools.product((1, 2, 3, 4), (False, True)):
            for scaled_rows in (False, True):
                ring.ring(stages, BLOCK_R, double_quant, scaled_rows)
    for kernels in (parts, ring, module):
        monkeypatch.setattr(kernels, "gl", language)
    copies = Copies()
    language.allocate_shared_memory = copies.allocate
    monkeypatch.setattr(ring, "async_copy", copies)
    monkeypatch.setattr(ring, "barrier", copies.barrier)
    monkeypatch.setattr(ring, "_nought", lambda: 0)
    monkeypatch.setattr(parts, "mma_v2", lambda a, b, delta: tl.dot(a, b, delta))
    monkeypatch.setattr(parts, "shown", lambda x, lane: lane_of(x, lane, half=False))
    monkeypatch.setattr(parts, "looked_up", lambda code, index: lane_of(code, index, half=True))
    return copies


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize(("N", "K", "r", "blocksize", "double_quant"), SHAPES)
def test_every_number_comes_from_its_place(N, K, r, blocksize, double_quant, transposed, interpreted):
    weight, A, B = inputs(N, K, r, blocksize, double_quant, torch.float16, "cpu")
    w, buffer = within(*turned((N, K), transposed), torch.float16, "cpu")
    module.launch(weight, A, B, SCALING, w, transposed)
    truth = merged_dequantize.reference(weight, A, B, SCALING, torch.float64)
    torch.testing.assert_close(w.double(), truth.T if transposed else truth, rtol=2e-3, atol=2e-3)
    assert untouched(w, buffer)
    module.launch(weight, A, torch.zeros_like(B), SCALING, w, transposed)
    assert torch.equal(w, nf4.reference(weight).T if transposed else nf4.reference(weight))
    assert interpreted.words == (2 * N * K // 8 if blocksize == 64 and r % 8 == 0 else 0)  # each once a launch
    assert interpreted.nothing_is_left()


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_turn_comes_in_its_place(stages, interpreted, monkeypatch):
    """However far ahead the turns are asked for, of which there are fewer than stages or more."""
    monkeypatch.setattr(module, "STAGES", stages)
    for N in (31, 192):
        weight, A, B = inputs(N, 512, 16, dtype=torch.float16, device="cpu")
        w = torch.empty(N, 512, dtype=torch.float16)
        module.launch(weight, A, B, SCALING, w)
        truth = merged_dequantize.reference(weight, A, B, SCALING, torch.float64)
        torch.testing.assert_close(w.double(), truth, rtol=2e-3, atol=2e-3)
    assert interpreted.words == ((31 + 192) * 512 // 8 if stages > 1 else 0) and interpreted.nothing_is_left()


def test_what_does_not_lie_as_copies_want_it_is_loaded(interpreted):
    weight, A, B = inputs(64, 256, 16, dtype=torch.float16, device="cpu")
    shifted = torch.empty(B.numel() + 1, dtype=B.dtype)[1:].view(B.shape).copy_(B)
    spread = torch.empty(64, 20, dtype=B.dtype)[:, :16].copy_(B)
    expected = torch.empty(64, 256, dtype=torch.float16)
    module.launch(weight, A, B, SCALING, expected)
    words = interpreted.words
    for other in (shifted, spread):
        w = torch.empty_like(expected)
        module.launch(weight, A, other, SCALING, w)
        assert torch.equal(w, expected) and interpreted.words == words > 0


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_every_row_has_its_scale(transposed, interpreted):
    """Interpreted, a number that is rounded up to a power of two ends at half of it."""
    for N, r in ((70, 16), (70, 5)):
        weight, A, B = inputs(N, 512, r, dtype=torch.float16, device="cpu")
        w = torch.empty(turned((N, 512), transposed), dtype=FP8)
        inverse = 0.5 + torch.rand(len(w))
        module.launch(weight, A, B, SCALING, w, transposed, inverse)
        truth = merged_dequantize.reference(weight, A, B, SCALING, torch.float32)
        truth = truth.T if transposed else truth
        torch.testing.assert_close(w.float(), reference_fp8(truth, 1 / inverse).float(), rtol=0.51, atol=2**-8)


def test_lanes_stand_where_the_shuffles_look_for_them():
    """Lane t + 4 g, by the layouts' own numbers: along the axes in their order, the first one fastest."""
    for layout, axes in (
        (module.tile(16, False).numbers, (2, 3)),
        (module.tile(16, True).numbers, (2, 3)),
        (module.tile(16, True).lanes, (1, 2)),
    ):
        split = [axis for axis in layout.order if layout.threads_per_warp[axis] > 1]
        assert tuple(split) == axes and [layout.threads_per_warp[axis] for axis in split] == [4, 8]


# Its machine code


def programs_of(made) -> int:
    """Programs of a launch as it is compiled that an SM holds."""
    return resident_blocks(made.arch, made.registers, made.shared_bytes, made.num_warps)[0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_code(arch, on_gpu):
    """Words, B and absmax come through shared memory, without bank conflicts; W goes nowhere but to its place.

    Copies are 16 bytes a lane, but for codes of absmax, nested_absmax and scales of rows: 4. Stores are 16 (8 of FP8).
    Of shuffles a turn has one for each of a lane's 64 numbers and 8 rows, and their scales; before it, A takes one a
    register. A turn has two barriers; the third is the last.
    """
    on_gpu(arch)
    for name, example in module.examples().items():
        fp8, transposed, r = "FP8" in name, "transposed" in name, int(name.rpartition(" ")[2])
        if fp8 and arch in ("sm_80", "sm_86"):
            continue
        (made,) = compile_all(example, arch)
        assert made.kernel == "_lines_kernel" and not misfit(made) and made.spilled_bytes == 0
        scaled_rows, made_of = fp8 and not transposed, made.instructions
        assert {k for k in made_of if k.startswith("st.")} == {f"st.global.{64 if fp8 else 128}"}
        assert made_of["cp.async.128"] == 2 * 3 and made_of["cp.async.32"] == 2 * (2 + scaled_rows)
        assert made_of["HMMA"] == r and made_of["bar.sync"] == 3
        assert made_of["shfl"] == 64 + 8 + 8 * scaled_rows + r
        form = ring.ring(2, r, True, scaled_rows)
        assert made.shared_bytes == ring.ring_bytes(form)
        registers, _ = module._registers(form, transposed, fp8, arch)
        assert made.registers <= registers and module._resident(form, registers, arch) <= programs_of(made)
        reads = [access for access in shared_accesses(made, lambda place: (0, "")) if access.kind == "load"]
        assert len(reads) == 4 and {access.conflicts for access in reads} == {0}  # both of rows count as one


OTHERS = [  # N, r, blocksize, double_quant
    (77, 16, 64, True), (77, 32, 64, True), (64, 8, 64, True), (64, 16, 64, False), (77, 32, 64, False),
    (77, 5, 64, True), (64, 32, 128, True),
]  # fmt: skip


@pytest.mark.parametrize(("N", "r", "blocksize", "double_quant"), OTHERS)
def test_compiled_code_of_other_cases(N, r, blocksize, double_quant, on_gpu):
    for arch in ("sm_80", "sm_90"):
        on_gpu(arch)
        weight = nf4.empty_nf4((N, 4096), torch.float16, blocksize, double_quant, "meta")
        shapes = (r, 4096), (N, r), (N, 4096)
        A, B, w = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in shapes)
        (made,) = compile_all(lambda: module.launch(weight, A, B, 1.0, w), arch)  # noqa: B023
        form = ring.ring(module._stages(weight, B), 16 if r <= 16 else 32, double_quant, False)
        assert made.spilled_bytes == 0 and made.shared_bytes == ring.ring_bytes(form)
        assert (made.shared_bytes > 0) == (blocksize == 64 and r % 8 == 0)
        registers, _ = module._registers(form, False, N == 77 or r == 5, arch)
        assert module._resident(form, registers, arch) <= programs_of(made)


@pytest.mark.parametrize("arch", ["sm_75", "gfx942"])
def test_examples_say_what_runs_instead(arch, on_gpu):
    on_gpu(arch)
    for example in module.examples(torch.float16).values():
        with pytest.raises(NotImplementedError, match=f"this is {arch}: use "):
            example()


# Its numbers, on a GPU


def assert_same_bits(ours, theirs):
    """At most one unit in the last place apart, in at most 1e-4 of the numbers: sums may be rounded otherwise."""
    bits = torch.int8 if ours.dtype == FP8 else torch.int16
    least = torch.iinfo(bits).min
    places = [torch.where(x.view(bits) < 0, least - x.view(bits).int(), x.view(bits).int()) for x in (ours, theirs)]
    apart = (places[0] - places[1]).abs()
    assert apart.max() <= 1 and (apart > 0).sum() <= 1e-4 * apart.numel()


def both(weight, A, B, w, transposed=False, inverse=None):
    """w by this kernel, and by _merge_kernel anew."""
    assert module.takes(weight, A, B, w, transposed, merged_dequantize.architecture(w.device))
    merged_dequantize.launch(weight, A, B, SCALING, w, transposed, inverse)
    theirs = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    merged_dequantize.launch(weight, A, B, SCALING, theirs, transposed, inverse, num_warps=4)
    return w, theirs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("N", "K", "r", "blocksize", "double_quant"), [*SHAPES, (2000, 4096, 16, 64, True)])
def test_on_a_gpu(N, K, r, blocksize, double_quant, dtype, monkeypatch, device):
    weight, A, B = inputs(N, K, r, blocksize, double_quant, dtype, device)
    delta = (SCALING * (B @ A)).to(dtype)
    truth = merged_dequantize.reference(weight, A, B, SCALING, torch.float64)
    terms = nf4.reference(weight, torch.float64).abs() + SCALING * (B.double().abs() @ A.double().abs())
    for sms, (before, after) in itertools.product((1, 132), ((8, 16), (3, 4))):  # many turns and one; aligned and not
        monkeypatch.setattr(module, "sm_count", lambda device, sms=sms: sms)
        w, buffer = within(N, K, dtype, device, before, after)
        assert_same_bits(*both(weight, A, B, w))
        assert_as_close_as_torch(w, nf4.reference(weight) + delta, truth, scale=terms)
        assert untouched(w, buffer)
        module.launch(weight, A, torch.zeros_like(B), SCALING, w)
        assert torch.equal(w, dequantize_nf4(weight))


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("r", [5, 16, 32])
def test_fp8_on_a_gpu(r, transposed, monkeypatch, device):
    if lacks_fp8(module.architecture(torch.device(device))):
        pytest.skip("no e4m3 here")
    for sms, N in itertools.product((1, 132), (70, 128, 2000)):
        monkeypatch.setattr(module, "sm_count", lambda device, sms=sms: sms)
        buffer = torch.full(turned((N, 512 + 32), transposed), torch.nan, device=device).to(FP8)
        w = buffer[:512] if transposed else buffer[:, :512]
        inverse = 0.5 + torch.rand(len(w), device=device)
        assert_same_bits(*both(*inputs(N, 512, r), w, transposed, inverse))
        assert untouched(w, buffer)


@pytest.mark.gpu
def test_strided_adapters(device):
    weight, A, B = inputs(70, 512, 16)
    expected = merge(weight, A, B, SCALING)
    A, B = torch.cat([A, A], 1)[:, :512], B.repeat(1, 2)[:, :16]
    assert torch.equal(merge(weight, A, B, SCALING), expected)


@pytest.mark.gpu
def test_under_torch_compile_and_in_a_graph(device):
    """torch.compile's graphs have _merge_kernel."""
    adapted = inputs(512, 512, 16)
    plain = merge(*adapted, SCALING)
    assert_same_bits(torch.compile(lambda: merge(*adapted, SCALING), fullgraph=True)(), plain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = merge(*adapted, SCALING)
    graph.replay()
    assert torch.equal(captured, plain)
