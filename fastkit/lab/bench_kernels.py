"""The cases of `fastkit bench kernels`: each operation of a QLoRA step, at the shapes of Mistral-7B and 8,192 rows."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastkit import ops
from fastkit.kernels import (
    adamw,
    add_rms_norm,
    attention,
    cross_entropy,
    fp8_scale,
    geglu,
    linear_cross_entropy,
    lora,
    merged_dequantize,
    nf4,
    nf4_matvec,
    rms_norm,
    rope,
    swiglu,
)
from fastkit.kernels.adamw_state import State
from fastkit.kernels.attention_choice import attend_by, candidates
from fastkit.lab import bench_case
from fastkit.lab.bench_case import Case, both_ways, compiled, half, rows, sum_of, together
from fastkit.lab.bench_peers import peers

EPS = 1e-6
HIDDEN, INTERMEDIATE, VOCABULARIES = 4096, 14336, (32000, 128256)
HEADS, KEY_HEADS, HEAD, TOKENS = 32, 8, 128, 2048
RANK = 16
TRAINED = 41_943_040  # numbers of adapters of rank 16 on all seven projections
BATCHES = (1, 4, 16)  # rows in generation


def random(*shape, dtype=None, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype or half(), device=bench_case.DEVICE) * scale


def rms_norm_cases() -> Iterator[Case]:
    """Its weight frozen, as in a LoRA fine-tune."""
    x, weight = random(rows(), HIDDEN), random(HIDDEN)
    functions = {
        "fastkit": lambda x: rms_norm.rms_norm(x, weight, EPS),
        "F.rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], weight, EPS),
        "eager": lambda x: _eager_rms_norm(x, weight),
        "torch.compile": compiled(lambda x: _eager_rms_norm(x, weight)),
    }
    costs = rms_norm.cost(*x.shape, x.dtype)
    yield from both_ways(
        "rms_norm",
        _size(x),
        costs,
        lambda x: rms_norm.reference(x, weight.float(), EPS),
        functions,
        (x,),
        (weight, EPS),
    )


def add_rms_norm_cases() -> Iterator[Case]:
    """The residual's addition and the norm of the sum, forward and backward."""
    x, residual, weight = random(rows(), HIDDEN), random(rows(), HIDDEN), random(HIDDEN)

    def eager(x, residual):
        h = x + residual
        return _eager_rms_norm(h, weight), h

    functions = {
        "fastkit": lambda x, residual: add_rms_norm.add_rms_norm(x, residual, weight, EPS),
        "eager": eager,
        "torch.compile": compiled(eager),
    }
    costs = add_rms_norm.cost(*x.shape, x.dtype)

    def reference(x, residual):
        return add_rms_norm.reference(x, residual, weight.float(), EPS)

    yield together("add_rms_norm", _size(x), costs, reference, functions, (x, residual), (weight, EPS))


def swiglu_cases() -> Iterator[Case]:
    """Its inputs two tensors."""
    inputs = random(rows(), INTERMEDIATE), random(rows(), INTERMEDIATE)
    functions = {"fastkit": swiglu.swiglu, "eager": _eager_swiglu, "torch.compile": compiled(_eager_swiglu)}
    costs = swiglu.cost(*inputs[0].shape, half())
    yield from both_ways("swiglu", _size(inputs[0]), costs, swiglu.reference, functions, inputs)
    yield together("swiglu", _size(inputs[0]), costs, swiglu.reference, functions, inputs)


def geglu_cases() -> Iterator[Case]:
    """With the exact GELU; Liger has the tanh approximation alone."""
    inputs = random(rows(), INTERMEDIATE), random(rows(), INTERMEDIATE)
    functions = {"fastkit": geglu.geglu, "eager": _eager_geglu, "torch.compile": compiled(_eager_geglu)}
    costs = geglu.cost(*inputs[0].shape, half())
    yield from both_ways("geglu", _size(inputs[0]), costs, geglu.reference, functions, inputs)


def rope_cases() -> Iterator[Case]:
    """Queries and keys as projections leave them, [B, T, heads, D]; then in place, as others do it."""
    B, T = max(1, rows() // TOKENS), min(TOKENS, rows())
    q, k = (random(B, T, heads, HEAD).transpose(1, 2) for heads in (HEADS, KEY_HEADS))
    angles = torch.arange(T, device=q.device)[:, None] / 1e4 ** (torch.arange(0, HEAD, 2, device=q.device) / HEAD)
    cos, sin = (f(torch.cat([angles, angles], -1))[None] for f in (torch.cos, torch.sin))
    costs, size = rope.cost(B, T, HEADS, KEY_HEADS, HEAD, half()), f"{HEADS}+{KEY_HEADS} heads of {HEAD}, {B}x{T}"
    low = cos.to(half()), sin.to(half())

    def eager(q, k):  # transformers' apply_rotary_pos_emb
        return tuple(x * low[0][:, None] + _rotate_half(x) * low[1][:, None] for x in (q, k))

    functions = {"fastkit": lambda q, k: ops.rope(q, k, cos, sin), "eager": eager, "torch.compile": compiled(eager)}
    yield from both_ways("rope", size, costs, lambda q, k: rope.reference(q, k, cos, sin, None), functions, (q, k))
    others, absent = peers("rope in place", *low)
    expected = tuple(rope.reference(q, k, cos, sin, None))
    functions = {"fastkit": lambda q, k: ops.rope_(q, k, cos, sin)} | others
    contenders = {who: functools.partial(f, q.clone(), k.clone()) for who, f in functions.items()}
    yield Case("rope in place", size, half(), costs[0], contenders, expected, absent=absent)


def cross_entropy_cases() -> Iterator[Case]:
    """Logits that are there already, and may be overwritten by their gradient."""
    M, V = rows(), VOCABULARIES[0]
    logits, labels = random(M, V), torch.randint(V, (M,), device=bench_case.DEVICE)
    functions = {
        "fastkit": lambda x: ops.cross_entropy(x, labels),
        "fastkit, overwriting": lambda x: ops.cross_entropy(x, labels, overwrite_logits=True),
        "torch, in fp32": lambda x: F.cross_entropy(x.float(), labels),
        "torch.compile": compiled(lambda x: F.cross_entropy(x.float(), labels)),
    }
    yield together(
        "cross_entropy", _size(logits), cross_entropy.cost(M, V, half()), lambda x: F.cross_entropy(x, labels),
        functions, (logits,), (labels,),
    )  # fmt: skip


def linear_cross_entropy_cases() -> Iterator[Case]:
    """The head frozen; what a run allocates is counted beside its time."""
    M, K = rows(), HIDDEN
    for V in VOCABULARIES:
        hidden, weight = random(M, K), random(V, K, scale=K**-0.5)
        labels = torch.randint(V, (M,), device=bench_case.DEVICE)
        functions = {
            "fastkit": lambda x, weight=weight, labels=labels: ops.linear_cross_entropy(x, weight, labels, kept="all"),
            "torch, fp32 logits": lambda x, weight=weight, labels=labels: F.cross_entropy(
                (x @ weight.T).float(), labels
            ),
        }

        def part(x, labels, weight=weight):
            return F.cross_entropy(x @ weight.T.float(), labels, reduction="sum")

        def reference(x, part=part, labels=labels):
            parts = zip(x.split(1024), labels.split(1024), strict=True)
            return sum(checkpoint(part, *one, use_reentrant=False) for one in parts) / len(x)

        costs = linear_cross_entropy.cost(M, K, V, half())
        yield together(
            "linear_cross_entropy", f"{M}x{K}x{V}", costs, reference, functions, (hidden,), (weight, labels),
            tensor=True, memory=True,
        )  # fmt: skip


def nf4_cases() -> Iterator[Case]:
    """Weights to 16 bits, alone and with an adapter merged, and to FP8."""
    N, K, r, dtype = INTERMEDIATE, HIDDEN, RANK, half()
    dense, A, B = random(N, K, scale=K**-0.5), random(r, K, scale=0.02), random(N, r, scale=0.02)
    weight = ops.quantize_nf4(dense)
    others, absent = peers("nf4", dense)
    functions = {"fastkit": lambda: ops.dequantize_nf4(weight)} | others
    expected = nf4.reference(weight)
    yield Case("nf4 dequantize", f"{N}x{K}", dtype, nf4.cost(N * K, dtype), functions, (expected,), absent=absent)
    size, merged = f"{N}x{K}, rank {r}", merged_dequantize.reference(weight, A, B, 2.0, torch.float32)
    for transposed in (False, True):
        name, expected = "merged dequantize" + ", transposed" * transposed, merged.T if transposed else merged

        def one_by_one(t=transposed):
            w = torch.addmm(ops.dequantize_nf4(weight), B, A, alpha=2.0)
            return w.T.contiguous() if t else w

        functions = {
            "fastkit": lambda t=transposed: ops.merged_dequantize(weight, A, B, 2.0, transposed=t),
            "one by one": one_by_one,
        }
        yield Case(name, size, dtype, merged_dequantize.cost(N, K, r, dtype), functions, (expected,))
        if torch.cuda.get_device_capability() >= (8, 9):
            bound = ops.weight_bounds(weight)[transposed]
            adapter = (B.T, A.T) if transposed else (A, B)
            functions = {
                "fastkit": lambda t=transposed, b=bound: ops.merged_dequantize_fp8(weight, b, A, B, 2.0, transposed=t)
            }
            scale = fp8_scale.reference_scale(bound, *adapter, 2.0)
            yield Case(
                f"{name}, to FP8", size, dtype, merged_dequantize.cost(N, K, r, fp8_scale.FP8), functions,
                (fp8_scale.reference_fp8(expected, scale), scale), tolerance=2**-4,
            )  # fmt: skip


def nf4_matvec_cases() -> Iterator[Case]:
    """Products straight from 4 bits, for generation."""
    N, K = INTERMEDIATE, HIDDEN
    dense = random(N, K, scale=K**-0.5)
    weight = ops.quantize_nf4(dense)
    others, absent = peers("nf4_matvec", dense)
    values = nf4.reference(weight)
    for M in BATCHES:
        x = random(M, K)
        functions = {"fastkit": lambda x: ops.nf4_matvec(x, weight), "cuBLAS, dense": lambda x: x @ values.T} | others
        contenders = {who: lambda x=x, f=f: f(x) for who, f in functions.items()}
        expected = (x.float() @ values.float().T,)
        cost = nf4_matvec.cost(M, N, K, half())
        yield Case("nf4 matvec", f"{M} x {N}x{K}", half(), cost, contenders, expected, absent=absent)


def lora_cases() -> Iterator[Case]:
    """dA and dB of a decoder layer's seven projections."""
    M, r, scaling = rows(), RANK, 2.0
    groups = []  # (x, dys, As, Bs) of those that share an input
    for K, Ns in (
        (HIDDEN, (HEADS * HEAD, KEY_HEADS * HEAD, KEY_HEADS * HEAD)),
        (HEADS * HEAD, (HIDDEN,)),
        (HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
        (INTERMEDIATE, (HIDDEN,)),
    ):
        groups.append((
            random(M, K), [random(M, N) for N in Ns], [random(r, K, scale=0.02) for _ in Ns],
            [random(N, r, scale=0.02) for N in Ns],
        ))  # fmt: skip

    def all_groups(function):
        parts = [function(x, dys, As, Bs, [scaling] * len(As)) for x, dys, As, Bs in groups]
        return [grad for dAs, dBs in parts for grad in (*dAs, *dBs)]

    costs = [lora.cost(M, x.shape[1], [len(B) for B in Bs], r, half(), half()) for x, _, _, Bs in groups]
    contenders = {
        "fastkit": lambda: all_groups(ops.lora_gradients),
        "cuBLAS": lambda: all_groups(lora._with_torch),
    }
    expected = tuple(all_groups(lora.reference))
    yield Case("lora gradients", f"a layer, {M} rows, rank {r}", half(), sum_of(costs), contenders, expected)


def attention_cases() -> Iterator[Case]:
    """Causal, beside torch's backends."""
    B, T = max(1, rows() // TOKENS), min(TOKENS, rows())
    q = random(B, T, HEADS, HEAD).transpose(1, 2)
    k, v = (random(B, T, KEY_HEADS, HEAD).transpose(1, 2) for _ in range(2))
    names = [name for name in candidates(q, k) if name not in ("ours", "math")]
    functions = {"fastkit": ops.attention} | {
        f"torch, {name}": lambda q, k, v, name=name: attend_by(name, q, k, v) for name in names
    }
    costs = attention.cost(B, HEADS, KEY_HEADS, T, T, HEAD, half())
    yield from both_ways(
        "attention", f"{HEADS}/{KEY_HEADS} heads of {HEAD}, {B}x{T}, causal", costs,
        lambda q, k, v: attention.by_torch(q, k, v, True, None, HEAD**-0.5), functions, (q, k, v), tensor=True,
    )  # fmt: skip


def adamw_cases() -> Iterator[Case]:
    """A step on all adapters' numbers, in fp32, clipped to a norm of 1."""
    param, grad = (random(TRAINED, dtype=torch.float32, scale=0.02) for _ in range(2))
    expected = param.clone()
    adamw.reference(expected, grad, State.zeros(param), 1e-4, max_norm=1.0)

    def ours(bits):
        own, state = param.clone(), State.zeros(param, bits)

        def step():
            ops.adamw(own, grad, state, 1e-4, max_norm=1.0)
            return own

        return step

    def theirs(make):
        own = torch.nn.Parameter(param.clone())
        own.grad, optimizer = grad.clone(), make([own], lr=1e-4, weight_decay=0.0)

        def step():
            torch.nn.utils.clip_grad_norm_([own], 1.0)
            optimizer.step()
            return own.detach()

        return step

    optimizers = {32: {"torch, fused": functools.partial(torch.optim.AdamW, fused=True)}}
    optimizers[8], absent = peers("adamw")
    for bits, makes in optimizers.items():
        costs = adamw.cost(TRAINED, param.dtype, grad.dtype, bits)
        contenders = {"fastkit": ours(bits)} | {who: theirs(make) for who, make in makes.items()}
        yield Case(
            f"adamw, {bits}-bit state", f"{TRAINED}", param.dtype, sum_of(costs), contenders, (expected,),
            absent=absent if bits == 8 else {},
        )  # fmt: skip


KERNELS = {
    "rms_norm": rms_norm_cases,
    "add_rms_norm": add_rms_norm_cases,
    "swiglu": swiglu_cases,
    "geglu": geglu_cases,
    "rope": rope_cases,
    "cross_entropy": cross_entropy_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "nf4": nf4_cases,
    "nf4_matvec": nf4_matvec_cases,
    "lora": lora_cases,
    "attention": attention_cases,
    "adamw": adamw_cases,
}


def _size(x: torch.Tensor) -> str:
    return "x".join(map(str, x.shape))


def _eager_rms_norm(x, weight):
    """Hugging Face's LlamaRMSNorm."""
    accurate = x.float()
    accurate = accurate * torch.rsqrt(accurate.square().mean(-1, keepdim=True) + EPS)
    return weight * accurate.to(x.dtype)


def _eager_swiglu(gate, up):
    return F.silu(gate) * up


def _eager_geglu(gate, up):
    return F.gelu(gate) * up


def _rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)
