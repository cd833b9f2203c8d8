import pytest
import tolerance
import torch
from compiled import compile_all
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch

from fastkit.kernels import lora as module
from fastkit.kernels import lora_passes as passes
from fastkit.lab.portability import misfit
from fastkit.lab.tracer import trace_launches
from fastkit.ops import lora_gradients

pytestmark = pytest.mark.usefixtures("poisoned", "fresh_seed")


def inputs(M, K, Ns, ranks, dtype, device, adapter_dtype=None):
    """x, dys, As, Bs, scalings."""
    x, dys = torch.randn(M, K, device=device).to(dtype), [torch.randn(M, N, device=device).to(dtype) for N in Ns]
    As = [(0.1 * torch.randn(r, K, device=device)).to(adapter_dtype or dtype) for r in ranks]
    Bs = [(0.1 * torch.randn(N, r, device=device)).to(adapter_dtype or dtype) for N, r in zip(Ns, ranks, strict=True)]
    return x, dys, As, Bs, [0.5 + i for i in range(len(Ns))]


def normed(x, weight_dtype=None):
    """(x, its rows of different sizes, {rstd, weight} of a norm that reads it)"""
    x = x * torch.logspace(-2, 2, len(x), 2, dtype=x.dtype, device=x.device)[torch.randperm(len(x))][:, None]
    rstd = torch.rsqrt(x.float().square().mean(1) + 1e-6)
    weight = (1 + 0.3 * torch.randn(x.shape[1], device=x.device)).to(weight_dtype or x.dtype)
    return x, {"rstd": rstd, "weight": weight}


def by_autograd(x, dys, As, Bs, scalings, rstd=None, weight=None):
    if rstd is not None:
        x = (rstd[:, None] * x * weight).to(x.dtype)
    As, Bs = ([t.detach().requires_grad_() for t in ts] for ts in (As, Bs))
    for dy, A, B, scaling in zip(dys, As, Bs, scalings, strict=True):
        (scaling * (x @ A.to(x.dtype).T) @ B.to(x.dtype).T).backward(dy)
    return [A.grad for A in As], [B.grad for B in Bs]


def check(x, dys, As, Bs, scalings, gradients=lora_gradients, **norm):
    """Assert that `gradients` err no more than those of torch, whose products are rounded to x's dtype, and of `norm`,
    rstd and weight, its output."""
    wide = x.double(), *([t.double() for t in ts] for ts in (dys, As, Bs)), scalings
    sizes = wide[0].abs(), *([t.abs() for t in ts] for ts in wide[1:4]), scalings
    given = x, dys, As, Bs, scalings
    found = (*gradients(*given, **norm),), by_autograd(*given, **norm)
    truth = module.reference(*wide, **{name: t.double() for name, t in norm.items()})
    terms = module.reference(*sizes, **{name: t.double().abs() for name, t in norm.items()})
    for name, ours, theirs, true, scale in zip("AB", *found, truth, terms, strict=True):
        for i, results in enumerate(zip(ours, theirs, true, strict=True)):
            assert_as_close_as_torch(*results, f"d{name}[{i}]", scale[i])


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("M", "K", "Ns", "ranks"),
    [(1, 1, [1], [1]), (64, 128, [64], [16]), (77, 130, [33, 100, 5], [4, 16, 1]), (150, 300, [700, 64], [64, 8]),
     (130, 40, [50], [256]), (200, 36, [20], [40]), (90, 48, [70, 600, 9], [5, 5, 5]), (70, 40, [30] * 5, [8] * 5),
     (66, 24, [50, 20], [48, 48])],
)  # fmt: skip
def test_close_to_the_truth(M, K, Ns, ranks, adapter_dtype, dtype, device):
    check(*inputs(M, K, Ns, ranks, dtype, device, adapter_dtype))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, None], ids=["fp32 adapters", "adapters"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["fp32 weight", "weight"])
@pytest.mark.parametrize(
    ("M", "K", "Ns", "ranks"),
    [(64, 128, [64], [16]), (77, 130, [133, 100, 205], [4, 16, 4]), (150, 300, [700, 64], [64, 8]),
     (90, 48, [170, 600, 109], [5, 5, 5]), (200, 36, [20], [40]), (66, 240, [50, 20], [48, 48]),
     (70, 40, [60] * 5, [8] * 5)],
)  # fmt: skip
def test_of_a_norms_output(M, K, Ns, ranks, weight_dtype, adapter_dtype, dtype, device, monkeypatch):
    x, *others = inputs(M, K, Ns, ranks, dtype, device, adapter_dtype)
    x, norm = normed(x, weight_dtype)
    # A * weight is rounded here, and n by torch. So other numbers are, and the largest error takes more luck: up to
    # twice torch's, by less than 1e-3 (fp16) and 1e-2 (bf16) of the result. The mean may not exceed torch's.
    if dtype != torch.float32 and adapter_dtype is None:
        monkeypatch.setattr(tolerance, "LUCK", 2)
    check(x, *others, **norm)


@given(
    st.integers(1, 200), st.integers(1, 200), st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**31),
    st.booleans(),
)  # fmt: skip
def test_close_to_the_truth_at_any_shape(dtype, device, M, K, N, r, seed, of_norm):
    torch.manual_seed(seed)
    x, *others = inputs(M, K, [N], [r], dtype, device, torch.float32 if of_norm else None)
    x, norm = normed(x) if of_norm else (x, {})
    check(x, *others, **norm)


def test_parts_of_a_norms_output_far_apart(dtype, device):
    """rstd and weight are read as they lie, or copied; leading dimensions count as rows."""
    x, dys, *others = inputs(60, 64, [32, 40], [4, 4], dtype, device)
    x, norm = normed(x)
    plain = lora_gradients(x, dys, *others, **norm)
    far = {name: t.repeat_interleave(2)[::2] for name, t in norm.items()}
    viewed = lora_gradients(x.view(3, 20, 64), [dy.view(3, 20, -1) for dy in dys], *others, **far)
    assert all(torch.equal(a, b) for pair in zip(viewed, plain, strict=True) for a, b in zip(*pair, strict=True))


def test_gradients_of_autograd():
    x, dys, As, Bs, scalings = inputs(5, 7, [4, 3], [2, 1], torch.float64, "cpu")
    for ours, theirs in zip(
        module.reference(x, dys, As, Bs, scalings), by_autograd(x, dys, As, Bs, scalings), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_layouts_are_read_in_place_or_copied(dtype, device):
    x, dys, As, Bs, scalings = inputs(60, 64, [32, 32], [4, 4], dtype, device)
    plain = lora_gradients(x, dys, As, Bs, scalings)
    stacked = torch.cat(dys, 1)
    views = [*stacked.chunk(2, 1)], [A.T.contiguous().T for A in As], [B.repeat(1, 2)[:, :4] for B in Bs]
    viewed = lora_gradients(x.view(3, 20, 64), [dy.view(3, 20, 32) for dy in dys], *views[1:], scalings)
    sliced = lora_gradients(x.T.contiguous().T, *views, scalings)
    for ours in (viewed, sliced):
        assert all(torch.equal(a, b) for pair in zip(ours, plain, strict=True) for a, b in zip(*pair, strict=True))


def test_gradients_in_fp32_of_16_bit_copies(device):
    """Not rounded to what the copies have: they are those of the same numbers in fp32."""
    x, dys, As, Bs, scalings = inputs(70, 48, [40, 24], [8, 8], torch.float16, device)
    found = module.lora_gradients(x, dys, As, Bs, scalings, torch.float32)
    wide = module.lora_gradients(x, dys, [A.float() for A in As], [B.float() for B in Bs], scalings)
    for ours, theirs in zip(found[0] + found[1], wide[0] + wide[1], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_adapters_of_two_dtypes(device):
    x, dys, As, Bs, scalings = inputs(40, 64, [32, 16], [4, 2], torch.float16, device)
    As[1], Bs[0] = As[1].float(), Bs[0].float()
    dAs, dBs = lora_gradients(x, dys, As, Bs, scalings)
    assert [t.dtype for t in (*dAs, *dBs)] == [torch.float16, torch.float32, torch.float32, torch.float16]
    check(x, dys, As, Bs, scalings)
    x, norm = normed(x)
    norm["weight"] = torch.exp2(torch.randint(-2, 3, (64,), device=device))  # fp32, and A * weight is exact
    check(x, dys, As, Bs, scalings, **norm)


@pytest.mark.parametrize("M", [0, 3])
def test_no_rows_or_columns(M, device):
    x, dys, As, Bs, scalings = inputs(M, 8, [0] if M else [6], [2], torch.float32, device)
    dAs, dBs = lora_gradients(x, dys, As, Bs, scalings)
    assert dAs[0].eq(0).all() and dAs[0].shape == (2, 8) and dBs[0].eq(0).all()


def test_same_bits_every_time(dtype, device):
    given = inputs(700, 100, [300], [8], dtype, device)
    first, second = (lora_gradients(*given) for _ in range(2))
    assert all(torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True))


def test_offsets_past_2_to_the_31(device):
    stride, rows = 2**30, 3
    memory = torch.UntypedStorage((stride * (rows - 1) + 8) * 2, device=device)  # 4 GiB of addresses, few touched
    far = torch.empty(0, dtype=torch.float16, device=device).set_(memory, 0, (rows, 8), (stride, 1))
    x, _, As, Bs, scalings = inputs(rows, 8, [8], [2], torch.float16, device)
    far.copy_(x)
    for ours, theirs in zip(
        lora_gradients(far, [far], As, Bs, scalings), lora_gradients(x, [x], As, Bs, scalings), strict=True
    ):
        assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, d, A, B, s: lora_gradients(x, d, A, B, []), ValueError, "1 As, 1 Bs, 0 scalings"),
        (lambda x, d, A, B, s: lora_gradients(x, [], [], [], []), ValueError, "one of each for every adapter"),
        (lambda x, d, A, B, s: lora_gradients(x, [d[0].half()], A, B, s), TypeError, r"dys\[0\] has dtype"),
        (lambda x, d, A, B, s: lora_gradients(x, d, [A[0].double()], B, s), TypeError, r"As\[0\] has dtype"),
        (lambda x, d, A, B, s: lora_gradients(x, d, [A[0].to("meta")], B, s), ValueError, r"As\[0\] is on meta"),
        (lambda x, d, A, B, s: lora_gradients(x, d, [A[0][:, 1:]], B, s), ValueError, r"As\[0\] \(2, 7\)"),
        (lambda x, d, A, B, s: lora_gradients(x[1:], d, A, B, s), ValueError, r"dys\[0\] \(5, 6\)"),
        (lambda *given: lora_gradients(*given, rstd=given[0][:, 0]), ValueError, "of rstd and weight there is one"),
        (lambda *given: lora_gradients(*given, weight=given[0][0]), ValueError, "of rstd and weight there is one"),
        (lambda *given: lora_gradients(*given, rstd=given[0][0], weight=given[0][0]), ValueError, r"rstd is \(8,\)"),
        (lambda *given: lora_gradients(*given, rstd=given[0][:, 0], weight=given[0]), ValueError, r"weight \(5, 8\)"),
        (
            lambda *given: lora_gradients(*given, rstd=given[0][:, 0].half(), weight=given[0][0]),
            TypeError,
            "rstd has dtype torch.float16; give float32",
        ),
        (
            lambda *given: lora_gradients(*given, rstd=given[0][:, 0], weight=given[0][0].to("meta")),
            ValueError,
            "weight is on meta",
        ),
    ],
)
def test_clear_errors(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(*inputs(5, 8, [6], [2], torch.float32, "cpu"))
    assert str(caught.value).startswith("lora_gradients: ") and "\n" not in str(caught.value)


def _rounded(x, dys, As, Bs, scalings):
    (dy,), (A,), (B,), (scaling,) = dys, As, Bs, scalings
    xA, dyB = (x @ A.T).bfloat16().half(), (dy @ B).bfloat16().half()
    return [(scaling * dyB.float().T @ x.float()).half()], [(scaling * dy.float().T @ xA.float()).half()]


WRONG = {
    "intermediates in bfloat16": _rounded,
    "scaling forgotten": lambda x, d, A, B, s: module.reference(x, d, A, B, [1.0]),
    "the last row left out": lambda x, d, A, B, s: module.reference(x[:-1], [d[0][:-1]], A, B, s),
}


@pytest.mark.parametrize("forgotten", ["rstd", "weight"])
@pytest.mark.parametrize("side", [0, 1], ids=["dA", "dB"])
def test_a_factor_forgotten_in_one_gradient_is_caught(forgotten, side):
    x, *others = inputs(60, 64, [32], [4], torch.float16, "cpu")
    x, norm = normed(x)

    def wrong(*given, **norm):
        found = [*module.reference(*given, **norm)]
        found[side] = module.reference(*given, **norm | {forgotten: torch.ones_like(norm[forgotten])})[side]
        return found

    check(x, *others, module.reference, **norm)
    with pytest.raises(AssertionError):
        check(x, *others, wrong, **norm)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_caught(wrong):
    given = inputs(60, 64, [32], [4], torch.float16, "cpu")
    check(*given, module.reference)
    with pytest.raises(AssertionError):
        check(*given, WRONG[wrong])


def test_rows_of_one_tensor_are_taken_as_they_lie(device, monkeypatch):
    """As and Bs side by side in memory, as flat parameters are, cost no copy; the gradients are the same."""
    given = x, dys, As, Bs, scalings = inputs(40, 64, [32, 16], [4, 4], torch.float16, device)
    plain = lora_gradients(*given)
    flat = torch.cat([t.flatten() for t in (*As, *Bs)])
    parts = flat.split([t.numel() for t in (*As, *Bs)])
    views = [part.view(t.shape) for part, t in zip(parts, (*As, *Bs), strict=True)]
    monkeypatch.setattr(torch, "cat", None)
    ours = lora_gradients(x, dys, views[:2], views[2:], scalings)
    assert all(torch.equal(a, b) for pair in zip(ours, plain, strict=True) for a, b in zip(*pair, strict=True))


def launches(M, K, Ns, r, dtype, adapter_dtype=None, device="cpu", of_norm=False):
    x, *dys = (torch.empty(M, size, dtype=dtype, device=device) for size in (K, *Ns))
    A = torch.empty(len(Ns) * r, K, dtype=adapter_dtype or dtype, device=device)
    B = torch.empty(sum(Ns), r, dtype=adapter_dtype or dtype, device=device)
    norm = (torch.empty(M, device=device), torch.empty(K, dtype=dtype, device=device)) if of_norm else ()
    passes.launch(x, dys, A, B, [2.0] * len(Ns), torch.empty_like(A), torch.empty_like(B), *norm)


def compiled_for(arch, monkeypatch, *case, **options):
    """The code of the tiles that are chosen on a GPU of `arch`."""
    monkeypatch.setattr(passes, "architecture", lambda device: arch)
    return compile_all(lambda: launches(512, *case, device="meta", **options), arch)


@pytest.mark.parametrize("of_norm", [False, True], ids=["x", "norm of x"])
@pytest.mark.parametrize("r", [16, 256])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
def test_compiled_code(arch, r, of_norm, monkeypatch):
    made = compiled_for(arch, monkeypatch, 4096, [1024, 4096], r, torch.bfloat16, of_norm=of_norm)
    assert len(made) == (5 if r == 16 else 6)
    assert not [compiled.kernel for compiled in made if misfit(compiled) or compiled.spilled_bytes]
    for compiled in made:
        if "_add_" not in compiled.kernel:  # x and dy come by 128 bits a lane
            assert {"HMMA", "WGMMA"} & set(compiled.instructions)
            assert {"cp.async.128", "ld.global.128"} & set(compiled.instructions)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "r"),
    [(torch.bfloat16, torch.float32, 16), (torch.bfloat16, torch.float32, 32), (torch.float32, torch.float32, 32)],
    ids=str,
)
def test_what_fits_the_least(dtype, adapter_dtype, r, arch, monkeypatch):
    """Most registers and shared memory: adapters as the sums of two, or fp32, as the widest of all that is fused."""
    made = compiled_for(arch, monkeypatch, 4096, [14336, 14336], r, dtype, adapter_dtype)
    assert not [f"{compiled.kernel} {why}" for compiled in made if (why := misfit(compiled))]


def test_nothing_passes_through_registers_on_hopper(monkeypatch):
    """The loop over dy has no load of its own and no conversion: tiles go from memory to the tensor cores."""
    made = compiled_for("sm_90", monkeypatch, 4096, [14336, 14336], 16, torch.bfloat16)
    code = next(compiled.ttgir for compiled in made if compiled.kernel == "_reduce_kernel")
    loop = code[code.index("scf.for") : code.index("scf.yield")]
    assert loop.count("ttng.warp_group_dot ") == 3
    assert not {"tt.load", "ttg.local_load", "ttg.local_alloc", "arith.truncf"} & set(loop.split())


def test_x_twice_and_dy_once():
    M, K, N, r = 256, 512, 1024, 16
    traces = trace_launches(lambda: launches(M, K, [N], r, torch.bfloat16), arch="sm_90", programs=4096)
    moved = [a.bytes_moved for t in traces for a in t.accesses if a.argument in ("x_ptr", "y0_ptr")]
    assert sorted(moved) == [2 * M * K, 2 * M * K, 2 * M * N]


@pytest.mark.gpu
def test_under_torch_compile_and_in_a_graph(device):
    given = inputs(512, 576, [192, 576], [16, 8], torch.bfloat16, device)
    plain = lora_gradients(*given)
    compiled = torch.compile(lora_gradients, fullgraph=True)(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = lora_gradients(*given)
    graph.replay()
    for ours in (compiled, captured):
        assert all(torch.equal(a, b) for pair in zip(ours, plain, strict=True) for a, b in zip(*pair, strict=True))
