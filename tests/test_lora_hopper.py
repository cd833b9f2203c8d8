"""sm_90's own gradients of LoRA adapters: whom it takes, its plans, its kernels in Python and their machine code
anywhere, its numbers on a GPU."""

import functools

import pytest
import torch
from compiled import compile_all, needs_hopper, pretended
from test_lora_gradients import check, inputs, normed
from tolerance import assert_as_close_as_torch

from fastkit.kernels import lora, lora_hopper, lora_hopper_parts, lora_passes
from fastkit.kernels.common import INTERPRETED
from fastkit.lab.launches import catch
from fastkit.lab.portability import misfit
from fastkit.ops import lora_gradients

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")

OLD = ["_project_kernel", "_reduce_kernel", "_add_columns_kernel", "_reduce_kernel", "_add_rows_kernel"]
NEW = ["_columns_kernel", "_terms_kernel", "_rows_kernel", "_terms_kernel", "_rows_kernel", "_add_rows_kernel"]


@pytest.fixture
def on_hopper(monkeypatch):
    """As if there were such a GPU; few rows are taken, too."""
    monkeypatch.setattr(lora_hopper, "LEAST_ROWS", 1)
    monkeypatch.setattr(lora_hopper, "LEAST_COLUMNS", 1)
    pretended(monkeypatch, lora_hopper, lora_passes)("sm_90")


def launcher(
    M=300, K=256, Ns=(512,), r=16, dtype=torch.bfloat16, adapter=None, x=None, A=None, device="meta", weight=None
):  # fmt: skip
    x = torch.empty(M, K, dtype=dtype, device=device) if x is None else x
    dys = [torch.empty(M, size, dtype=dtype, device=device) for size in Ns]
    A = torch.empty(len(Ns) * r, K, dtype=adapter or dtype, device=device) if A is None else A
    B = torch.empty(sum(Ns), r, dtype=adapter or dtype, device=device)
    given = x, dys, A, B, [2.0] * len(Ns), torch.empty_like(A), torch.empty_like(B)
    if weight is not None:
        given += torch.empty(M, device=device), torch.empty(K, dtype=weight, device=device)
    return functools.partial(lora_passes.launch, *given)


def launches(*args, **options):
    """(the names of the kernels that compute this, their launches)."""
    caught = catch(launcher(*args, **options))
    return [launch.name for launch in caught], caught


def named(case: dict) -> str:
    """Of tensors the sizes, not the numbers: those of an empty one are not the same in every process."""
    shown = ((name, tuple(value.shape) if isinstance(value, torch.Tensor) else value) for name, value in case.items())
    return ", ".join(f"{name} {value}" for name, value in shown) or "as it is"


@pytest.mark.parametrize(
    "case",
    [
        {}, {"r": 8}, {"r": 24}, {"r": 32, "Ns": (512, 64, 72)}, {"M": 1}, {"M": 333, "K": 136, "Ns": (200,)},
        {"weight": torch.bfloat16}, {"weight": torch.float32, "Ns": (512, 64)},
        {"dtype": torch.float16}, {"x": torch.empty(300, 264, dtype=torch.bfloat16, device="meta")[:, :256]},
        {"x": torch.empty(300, 264, dtype=torch.bfloat16)[:, :256], "device": "cpu"},
        {"x": torch.empty(300, 264, dtype=torch.bfloat16, device="meta")[:, :253], "K": 253,
         "A": torch.empty(16, 256, dtype=torch.bfloat16, device="meta")[:, :253]},
    ],
    ids=named,
)  # fmt: skip
def test_whom_it_takes(case, on_hopper):
    assert launches(**case)[0] == NEW


@pytest.mark.parametrize(
    "case",
    [
        {"r": 4}, {"r": 12}, {"r": 40}, {"dtype": torch.float32}, {"adapter": torch.float32}, {"K": 255},
        {"Ns": (512, 63)}, {"x": torch.empty(300, 260, dtype=torch.bfloat16, device="meta")[:, :256]},
        {"x": torch.empty(300, 264, dtype=torch.bfloat16)[:, 4:260], "device": "cpu"},
    ],
    ids=named,
)  # fmt: skip
def test_whom_it_leaves(case, on_hopper):
    assert set(launches(**case)[0]) <= {*OLD, "_project_kernel"}


def test_few_rows_and_other_cards_go_the_other_way(on_hopper, monkeypatch):
    monkeypatch.setattr(lora_hopper, "LEAST_ROWS", 301)
    assert launches()[0] == OLD
    monkeypatch.setattr(lora_hopper, "LEAST_ROWS", 300)
    assert launches()[0] == NEW
    monkeypatch.setattr(lora_hopper, "LEAST_COLUMNS", 10**6)
    assert launches()[0] == OLD
    monkeypatch.setattr(lora_hopper, "LEAST_COLUMNS", 1)
    assert launches()[0] == NEW
    monkeypatch.setattr(lora_passes, "architecture", lambda device: "sm_100")
    assert launches()[0] == OLD


@pytest.mark.parametrize("arch", ["sm_80", "sm_120", "gfx942"])
def test_examples_say_what_runs_instead(arch, on_hopper, monkeypatch):
    monkeypatch.setattr(lora_hopper, "architecture", lambda device: arch)
    for example in lora_hopper.examples(torch.float16).values():
        with pytest.raises(NotImplementedError, match=f"this is {arch}: use "):
            example()


@pytest.mark.parametrize(
    ("K", "Ns", "read"),
    [(4096, (4096, 1024, 1024), [4096, 6144, 4096]), (4096, (14336, 14336), [4096, 28672, 4096]),
     (14336, (4096,), [4096, 14336, 4096]), (4096, (4096,), [4096, 4096, 4096])],
)  # fmt: skip
def test_the_narrower_tensor_is_read_twice(K, Ns, read, on_hopper):
    _, caught = launches(8192, K, Ns)
    found = []
    for launch in caught:
        tensors = [launch.arguments[name] for name in ("t_desc", "t0", "t1", "t2") if launch.arguments.get(name)]
        found += [sum(tensor.base.shape[1] for tensor in tensors)] if tensors else []
    assert found == read


def test_programs_are_as_many_as_sms_and_have_as_much_to_do(on_hopper):
    for K, Ns in ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))):
        for launch in launches(8192, K, Ns)[1]:
            if launch.name in ("_rows_kernel", "_columns_kernel"):
                assert 128 <= launch.grid[0] <= 132
    assert lora_hopper_parts.shares(64, 8, 132) == 2 and lora_hopper_parts.shares(132, 8, 132) == 1
    assert lora_hopper_parts.shares(1, 4, 132) == 4


def test_the_binary_does_not_hang_on_the_number_of_rows(on_hopper):
    plans = [[launch.arguments.get("PLAN") for launch in launches(M, 4096, (4096,))[1]] for M in (1, 500, 8192, 65536)]
    assert all(each == plans[0] for each in plans)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter for _terms_kernel")
@pytest.mark.parametrize(
    ("M", "K", "Ns", "r", "sms"),
    [(300, 256, [512], 16, 5), (260, 304, [136], 16, 8), (333, 456, [296, 80, 1000], 8, 7), (1, 136, [128], 32, 9),
     (700, 200, [152, 304], 24, 6), (200, 136, [3000], 16, 2), (1300, 72, [64], 8, 2)],
)  # fmt: skip
@pytest.mark.parametrize("of_norm", [False, True], ids=["x", "norm of x"])
def test_kernels_in_python(M, K, Ns, r, sms, of_norm, on_hopper, monkeypatch):
    """Simulated, each number is written once, nothing is read before it came, no one waits for ever."""
    from simulated import Descriptor, Simulated

    modules = lora_hopper_parts, lora_hopper
    for name in ("_rows_kernel", "_columns_kernel"):
        monkeypatch.setattr(lora_hopper, name, Simulated(getattr(lora_hopper, name), *modules))
    monkeypatch.setattr(lora_hopper, "descriptor", Descriptor)
    monkeypatch.setattr(lora_hopper, "sm_count", lambda device: sms)
    x, dys, As, Bs, ones = *inputs(M, K, Ns, [r] * len(Ns), torch.float16, "cpu")[:4], [1.0] * len(Ns)
    stacked = torch.randn(M, sum(Ns) + 8).half()
    dys = [*stacked[:, : sum(Ns)].split(Ns, 1)]  # far apart, and neighbours beyond their ends
    A, B = torch.cat(As), torch.cat(Bs)
    assert lora_hopper.takes("sm_90", x, dys, A, B)
    x, norm = normed(x) if of_norm else (x, {"rstd": None})
    norm["weight"] = torch.ones(K) if of_norm else None  # A and dA are multiplied by it elsewhere
    found = [parts.double().sum(0) for parts in lora_hopper.launch(x, dys, A, B, norm["rstd"])]
    wide = x.double(), *([t.double() for t in ts] for ts in (dys, As, Bs)), ones
    truth = lora.reference(*wide, **norm)
    for ours, true in zip(found, truth, strict=True):
        true = torch.cat(true)
        assert (ours - true).abs().max() <= 2e-6 * true.abs().max()  # two terms have 22 bits, fp32 sums 24


CASES = [(4096, (4096, 1024, 1024), 16), (4096, (14336, 14336), 8), (14336, (4096,), 16), (4096, (4096, 64), 24),
         (4096, (4096, 1024, 1024), 32), (576, (576,), 8), (4096, (4096, 1024), 32)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("of_norm", [False, True], ids=["x", "norm of x"])
def test_compiled_code(case, dtype, of_norm, on_hopper):
    """Tiles come by TMA and nothing by the lanes; both terms are multiplied at once, as columns; nothing spills."""
    K, Ns, r = case
    made = compile_all(launcher(8192, K, Ns, r, dtype, weight=dtype if of_norm else None), "sm_90")
    for compiled in made:
        assert not misfit(compiled) and compiled.spilled_bytes == 0
        if compiled.kernel in ("_rows_kernel", "_columns_kernel"):
            found = compiled.instructions
            assert found["WGMMA"] and found["TMA load"]
            assert not [name for name in found if name.startswith(("cp.async", "ld.global"))]
    padded = 1 << (r - 1).bit_length()
    rows = [compiled.code for compiled in made if compiled.kernel == "_rows_kernel"]
    adapters = 1 if len(Ns) == 1 else 2 if len(Ns) == 2 else 4
    assert f"m64n{2 * padded}k16" in rows[0] and f"m64n{2 * padded * adapters}k16" in rows[1]


def test_deep_rings():
    for r in (8, 16, 24, 32):
        for adapters in (1, 2, 3):
            plans = [lora_hopper_parts.columns_plan(r, adapters, False)]
            plans += [lora_hopper_parts.rows_plan(r, adapters, (4096,), False, False, True, 132)]
            plans += [lora_hopper_parts.rows_plan(r, 1, (4096,) * adapters, True, True, False, 132)]
            assert all(plan.STAGES * lora_hopper_parts.STRIP_BYTES >= 96 * 1024 for plan in plans)


# Its numbers, on a GPU


@pytest.fixture
def few_rows_too(monkeypatch):
    needs_hopper()
    monkeypatch.setattr(lora_hopper, "LEAST_ROWS", 1)
    monkeypatch.setattr(lora_hopper, "LEAST_COLUMNS", 1)


SHAPES = [
    # M, K, Ns, rank
    (300, 512, [256], 16),  # dy twice
    (333, 136, [1000], 16),
    (77, 456, [296, 80, 1000], 8),
    (1, 136, [128], 32),
    (700, 200, [152, 304], 24),
    (1300, 72, [64, 72, 2000], 32),
]


def assert_taken(x, dys, As, Bs):
    A, B = lora._stacked(As), lora._stacked(Bs)
    assert lora_hopper.takes("sm_90", x, dys, A, B)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("programs", [3, 132])
@pytest.mark.parametrize("of_norm", [False, True], ids=["x", "norm of x"])
def test_on_a_gpu(shape, dtype, programs, of_norm, device, few_rows_too, monkeypatch):
    monkeypatch.setattr(lora_hopper, "sm_count", lambda device: programs)
    M, K, Ns, r = shape
    x, _, As, Bs, scalings = inputs(M, K, Ns, [r] * len(Ns), dtype, device)
    dys = [*torch.randn(M, sum(Ns) + 24, device=device).to(dtype)[:, 16:-8].split(Ns, 1)]
    assert_taken(x, dys, As, Bs)
    x, norm = normed(x) if of_norm else (x, {})
    if of_norm:  # by powers of two A is multiplied exactly, and no luck is needed
        norm["weight"] = torch.exp2(torch.randint(-2, 3, (K,), device=device)).to(dtype)
    check(x, dys, As, Bs, scalings, **norm)


@pytest.mark.gpu
def test_gradients_in_fp32_on_a_gpu(device, few_rows_too):
    """As exact as of adapters in fp32: what xA and dyB lose to 16 bits would show."""
    x, dys, As, Bs, scalings = inputs(700, 512, [256, 520], [16, 16], torch.bfloat16, device)
    assert_taken(x, dys, As, Bs)
    found = lora.lora_gradients(x, dys, As, Bs, scalings, torch.float32)
    truth = lora.reference(x.double(), *([t.double() for t in ts] for ts in (dys, As, Bs)), scalings)
    for ours, true in zip(found[0] + found[1], truth[0] + truth[1], strict=True):
        assert (ours - true).abs().max() <= 1e-4 * true.abs().max()


@pytest.mark.gpu
def test_odd_columns_on_a_gpu(device, few_rows_too):
    """Rows as far apart as TMA wants, of a length that it need not be."""
    M, K, N, r = 333, 251, 389, 16
    x, dy = (torch.randn(M, 400, device=device).bfloat16()[:, :size] for size in (K, N))
    A = (0.1 * torch.randn(r, 256, device=device)).bfloat16()[:, :K]
    B = (0.1 * torch.randn(N, r, device=device)).bfloat16()
    assert_taken(x, [dy], [A], [B])
    dA, dB = (torch.full(t.shape, float("nan"), device=device) for t in (A, B))
    lora_passes.launch(x, [dy], A, B, [2.0], dA, dB)
    truth = lora.reference(x.double(), [dy.double()], [A.double()], [B.double()], [2.0])
    theirs = (2.0 * (dy @ B).T @ x).float(), (2.0 * dy.T @ (x @ A.T)).float()
    for name, ours, their, (true,) in zip(("dA", "dB"), (dA, dB), theirs, truth, strict=True):
        assert_as_close_as_torch(ours, their, true, name)


@pytest.mark.gpu
def test_same_bits_every_time(device, few_rows_too):
    for K, Ns in ((4096, [4096, 1024, 1024]), (14336, [4096])):
        given = inputs(8192, K, Ns, [16] * len(Ns), torch.bfloat16, device)
        assert_taken(*given[:4])
        first = lora_gradients(*given)
        for _ in range(20):
            again = lora_gradients(*given)
            assert all(torch.equal(a, b) for pair in zip(first, again, strict=True) for a, b in zip(*pair, strict=True))
