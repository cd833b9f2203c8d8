"""The gradients of LoRA adapters (Hu et al. 2021, arXiv:2106.09685): dA and dB of all that share an input.

Forward, for each adapter, with x [M, K], A [r, K], B [N, r] (`kernels/merged_dequantize.py` folds it into the weight):

    y = ... + scaling * (x @ A.T) @ B.T

Backward, given dy = ∂L/∂y [M, N]. y is linear in A and in B, so by the product rule

    xA  = x @ A.T       [M, r]          dB = scaling * dy.T @ xA    [N, r]
    dyB = dy @ B        [M, r]          dA = scaling * dyB.T @ x    [r, K]

Four skinny products: r is 16 where M, N, K are thousands, so each is bound by the reading of x or dy. Hence as few
readings as there can be, whatever the number of adapters: dA needs dyB, thus all of dy, and dB needs xA, thus all of x.
And as few launches, since small ones cost more than what they do, five for up to three adapters of one rank:

    1. x  gives xA of all adapters, their A stacked
    2. dy gives dB and dyB at once, of all adapters
    3.    the sum of dyB's parts
    4. x  gives dA of all adapters
    5.    the sums of dA's and dB's parts, times scaling

Where the input is a norm's output n = rstd * x * weight (see rms_norm.py; rstd [M] a number a row, weight [K] one a
column) the passes read x itself, and the two factors fall to what is small:

    xA = rstd * (x @ (A * weight).T)    dA = scaling * (rstd * dyB).T @ x * weight

Passes 2 and 4 sum over the rows, which programs share out, and pass 2 over the columns too: a program writes its part
of a sum in fp32. To write and read dyB's parts costs 8 r / BLOCK_N bytes for each number of dy, which has 2 itself;
above rank 32 a second reading is cheaper and is what we do. The kernels are those of `kernels/lora_passes.py`.

Casts: x and dy go to the tensor cores as they are. A and B, where they are of another dtype, and xA and dyB, which are
fp32, go there as a sum of two numbers of x's dtype, the rounded one and what rounding lost: two products for one, in
kernels that wait for memory, and errors of 2**-17 (bf16) where cuBLAS' bf16 intermediates have 2**-9. fp32 inputs are
multiplied as three TF32 products. Sums are fp32. dA and dB are rounded once. A * weight is rounded to A's dtype (fp32
where x's is), where n would have been to x's; rstd and dA's weight multiply fp32 numbers. rstd * dyB goes on in x's
dtype: in fp16 it has to be in range, as dy has.
"""

from collections.abc import Sequence

import torch

from fastkit.kernels.common import KERNEL_DTYPES, Cost, architecture, as_rows, check_floats, on_triton
from fastkit.kernels.lora_passes import GROUP, launch

MAX_RANK = 256


def cost(M: int, K: int, Ns: Sequence[int], r: int, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16) -> Cost:
    """The least work for x [M, K] of `dtype` and adapters of rank r with outputs of `Ns` columns."""
    adapters = r * (K * len(Ns) + sum(Ns)) * adapter_dtype.itemsize
    return Cost(
        bytes_moved=M * (2 * K + sum(Ns)) * dtype.itemsize + 2 * adapters,  # read x twice, dy, A, B; write dA, dB
        flops=4 * M * r * (K * len(Ns) + sum(Ns)),
    )


def reference(
    x, dys, As, Bs, scalings, dtype=None, *, rstd=None, weight=None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same in plain torch, in fp32. fp64 stays fp64: the tests' truth."""
    accurate = torch.promote_types(x.dtype, torch.float32)
    M = x.shape[:-1].numel()
    rows, dAs, dBs = x.reshape(M, x.shape[-1]).to(accurate), [], []
    if rstd is not None:
        rows = rows * rstd.to(accurate)[:, None] * weight.to(accurate)
    for dy, A, B, scaling in zip(dys, As, Bs, scalings, strict=True):
        dy = dy.reshape(M, dy.shape[-1]).to(accurate)
        dAs.append((scaling * ((dy @ B.to(accurate)).T @ rows)).to(dtype or A.dtype))
        dBs.append((scaling * (dy.T @ (rows @ A.to(accurate).T))).to(dtype or B.dtype))
    return dAs, dBs


def _with_torch(x, dys, As, Bs, scalings, dtype=None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For GPUs without tensor cores that Triton can use: cuBLAS, in the dtype of x."""
    dAs, dBs = [], []
    for dy, A, B, scaling in zip(dys, As, Bs, scalings, strict=True):
        dAs.append((scaling * ((dy @ B.to(x.dtype)).T @ x)).to(dtype or A.dtype))
        dBs.append((scaling * (dy.T @ (x @ A.to(x.dtype).T))).to(dtype or B.dtype))
    return dAs, dBs


def _check(x, dys, As, Bs, scalings, rstd, weight) -> None:
    if not len(dys) == len(As) == len(Bs) == len(scalings) >= 1:
        counts = f"{len(dys)} dys, {len(As)} As, {len(Bs)} Bs, {len(scalings)} scalings"
        raise ValueError(f"lora_gradients: there are {counts}; give one of each for every adapter")
    named = {f"{name}[{i}]": t for name, ts in (("dys", dys), ("As", As), ("Bs", Bs)) for i, t in enumerate(ts)}
    check_floats("lora_gradients", x=x, **named)
    if (rstd is None) != (weight is None):
        raise ValueError("lora_gradients: of rstd and weight there is one; give both, or neither")
    if rstd is not None:
        check_floats("lora_gradients", x=x, rstd=rstd, weight=weight)
        if rstd.dtype != torch.float32:
            raise TypeError(f"lora_gradients: rstd has dtype {rstd.dtype}; give float32")
        M, K = x.shape[:-1].numel(), x.shape[-1]
        if rstd.shape != (M,) or weight.shape != (K,):
            shapes = f"rstd is {tuple(rstd.shape)}, weight {tuple(weight.shape)}"
            raise ValueError(f"lora_gradients: {shapes}; for x {tuple(x.shape)} they must be ({M},) and ({K},)")
    for i, (dy, A, B) in enumerate(zip(dys, As, Bs, strict=True)):
        if dy.dtype != x.dtype:
            raise TypeError(f"lora_gradients: dys[{i}] has dtype {dy.dtype} but x has {x.dtype}; convert one")
        K, N, r = x.shape[-1], dy.shape[-1], A.shape[0]
        if dy.shape[:-1] != x.shape[:-1] or A.shape != (r, K) or B.shape != (N, r) or not 1 <= r <= MAX_RANK:
            raise ValueError(
                f"lora_gradients: x is {tuple(x.shape)}, dys[{i}] {tuple(dy.shape)}, As[{i}] {tuple(A.shape)}, Bs[{i}] "
                f"{tuple(B.shape)}; they must be [..., K], [..., N], [r, K], [N, r], r from 1 to {MAX_RANK}"
            )


def lora_gradients(
    x: torch.Tensor, dys: Sequence[torch.Tensor], As: Sequence[torch.Tensor], Bs: Sequence[torch.Tensor],
    scalings: Sequence[float], dtype: torch.dtype | None = None, *,
    rstd: torch.Tensor | None = None, weight: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """(dAs, dBs): the gradients of LoRA adapters that share the input x, such as q, k and v (arXiv:2106.09685).

    x         [..., K], float32, float16 or bfloat16
    dys       for each adapter ∂L/∂y [..., N_i], of x's dtype
    As, Bs    [r_i, K] and [N_i, r_i], float32, float16 or bfloat16, r_i from 1 to 256
    scalings  numbers, alpha / r
    dtype     of the gradients; None: those of A and B, which may be the 16-bit copies of parameters in fp32
    rstd      [M] for the M rows of x, float32, as of an RMSNorm, whose output rstd * x * weight is the adapters' input
              then, but is not computed
    weight    [K], float32, float16 or bfloat16, with rstd
    returns   lists of tensors shaped as As and Bs, contiguous; they may share memory with one another, side by side

    x is read twice and each dy once (twice above rank 32), in place if its rows are contiguous, however far apart;
    other layouts are copied first. Up to three adapters in a row that have one rank share the readings of x; their As,
    and Bs, are taken as they lie if they are rows of one tensor, one after the other, and copied else. Zero rows are
    fine. No gradient of the gradients: the inputs are taken as constants.

    Raises TypeError for another dtype or dys of another than x's, ValueError for shapes or devices that do not match or
    one of rstd and weight alone, NotImplementedError for a device without kernels. CPU tensors take `reference` (see
    `on_triton`), GPUs before sm_80 torch's products in the dtype of x.
    """
    _check(x, dys, As, Bs, scalings, rstd, weight)
    if dtype is not None and dtype not in KERNEL_DTYPES:
        raise TypeError(f"lora_gradients: dtype is {dtype}; give float32, float16 or bfloat16, or None")
    with torch.no_grad():
        floats = (x, *As, *Bs) if weight is None else (x, weight, *As, *Bs)
        kernels = all(on_triton("lora_gradients", "x", t) for t in floats)  # bf16 on a CPU: none
        if not kernels or 0 in (x.numel(), *(dy.numel() for dy in dys)):
            return reference(x, dys, As, Bs, scalings, dtype, rstd=rstd, weight=weight)
        x, dys = as_rows(x), [as_rows(dy) for dy in dys]
        rstd, weight = (None if t is None else t.contiguous() for t in (rstd, weight))
        if architecture(x.device) == "sm_75":
            if rstd is not None:
                x = torch.mul(x, rstd[:, None], out=torch.empty_like(x)).mul_(weight)
            return _with_torch(x, dys, As, Bs, scalings, dtype)
        As, Bs, scalings = list(As), list(Bs), list(scalings)
        dAs, dBs = [], []
        for group in _groups([len(A) for A in As]):
            A, B = _stacked(As[group]), _stacked(Bs[group])
            dA, dB = (torch.empty(t.shape, dtype=dtype or t.dtype, device=x.device) for t in (A, B))
            launch(x, dys[group], A, B, scalings[group], dA, dB, rstd, weight)
            for found, d, likes in ((dAs, dA, As[group]), (dBs, dB, Bs[group])):
                parts = d.split([*map(len, likes)])
                found += [part.to(dtype or like.dtype) for part, like in zip(parts, likes, strict=True)]
        return dAs, dBs


def _groups(ranks: list[int]) -> list[slice]:
    """Adapters for one `launch`: neighbours of one rank, up to GROUP."""
    starts = [0]
    for i, rank in enumerate(ranks):
        if rank != ranks[starts[-1]] or i - starts[-1] == GROUP:
            starts.append(i)
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(ranks)], strict=True)]


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Their rows as one tensor, neighbours in a row being neighbours in memory: a view if they lie so, else a copy."""
    first, rows = tensors[0], sum(map(len, tensors))
    if len(tensors) == 1:
        return first if first.stride(1) == 1 else first.contiguous()
    if not torch.compiler.is_compiling() and all(map(_follows, tensors[1:], tensors)):
        return first.as_strided((rows, first.shape[1]), first.stride())
    return torch.cat(tensors)


def _follows(t: torch.Tensor, last: torch.Tensor) -> bool:
    same = t.dtype == last.dtype and t.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    dense = t.is_contiguous() and last.is_contiguous()
    return same and dense and t.data_ptr() == last.data_ptr() + last.nbytes
