"""The head's product and its cross-entropy in one, without ever holding the logits.

Forward, for rows x of hidden states, labels y, and D, the number that the sum is divided by:

    logits = x @ weightᵀ + bias
    loss   = sum(cross_entropy(logits, y)) / D

Backward. With dlogits = ∂loss/∂logits of `kernels/cross_entropy.py`, and g = ∂L/∂loss, one number:

    dx      = g * dlogits @ weight
    dweight = g * dlogitsᵀ @ x
    dbias   = g * sum over rows of dlogits

M rows of V logits are the largest tensor of a fine-tune: 8192 x 128256 in bf16 take 2.0 GiB, and their gradient as much
again. But the rows do not need each other, so a part of them goes all the way at once: the product, one kernel that
writes dlogits over the logits, the products with it; and the next part takes the same buffer. So the gradients are made
in the forward (Hsu et al. 2024, arXiv:2410.10989), up to the factor g, which the backward multiplies in. As g is 1 at
the end of most losses, the kernel that does so looks first, on the GPU: nobody waits to learn it. A part has a thousand
rows or more, which keep the matrix units as busy as all would. Rows to be ignored never enter a product.

Saved for the backward: dx, dweight and dbias, as far as they are wanted. Without gradients to make, nothing is.

Casts: products accumulate in fp32. Logits, dlogits and dx are rounded to the dtype of hidden, as in a model that calls
the head and then the loss; the loss stays fp32; dweight and dbias are summed over the parts in fp32 and rounded once.
dlogits carries 1 / D, so that one rounding of dx does. In fp16, where that would be too small a number to hold and the
factor that saves it, a loss scale, comes with g alone, it carries 2^e / D, between 1 and 2, and the backward multiplies
by g / 2^e: exactly, for g a power of two.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fastkit.kernels import cross_entropy
from fastkit.kernels.common import Cost, as_rows, check_floats, device_of, on_triton, sm_count, tl, triton
from fastkit.kernels.loss_terms import Terms, check_loss, divisor

PART_ROWS = 1024  # the least; a multiple of the matrix products' tiles
PART_BYTES = 2**26  # of logits, where that is more rows


def cost(M: int, K: int, V: int, dtype=torch.bfloat16, weight_grad: bool = False) -> tuple[Cost, Cost]:
    """The least work for M rows of K numbers and V columns, none ignored: (the loss alone, what gradients add)."""
    hidden_bytes, weight_bytes = M * K * dtype.itemsize, V * K * dtype.itemsize
    forward = Cost(
        bytes_moved=hidden_bytes + weight_bytes + M * 8,  # read hidden, weight, labels
        flops=2 * M * K * V + 4 * M * V,  # logits; see cross_entropy.cost
    )
    backward = Cost(
        bytes_moved=hidden_bytes + (weight_bytes if weight_grad else 0),  # write dhidden, dweight
        flops=(4 if weight_grad else 2) * M * K * V + 4 * M * V,
    )
    return forward, backward


def reference(hidden, weight, labels, bias, terms: Terms) -> torch.Tensor:
    """Each row's loss in plain torch, with the same casts, differentiated by autograd. fp64 stays fp64: the truth."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(hidden, weight, bias)
    return cross_entropy.reference(logits, labels, terms)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, count, BLOCK_N: tl.constexpr):
    """x *= factor, over blocks i, i + programs, ...; nothing is read or written if the factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(count, BLOCK_N), tl.num_programs(0)):
            offsets = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]; can pass 2**31
            x = tl.load(x_ptr + offsets, mask=offsets < count, other=0.0).to(tl.float32)
            tl.store(x_ptr + offsets, (x * factor).to(x_ptr.dtype.element_ty), mask=offsets < count)


def launch_scale(x, factor, BLOCK_N: int = 2048, num_warps: int = 4) -> None:
    """Multiply x, contiguous, in place by factor: float32, one number, on its device."""
    if x.numel() == 0:
        return
    programs = min(triton.cdiv(x.numel(), BLOCK_N), 8 * sm_count(x.device))
    with device_of(x):
        _scale_kernel[(programs,)](x, factor, x.numel(), BLOCK_N=BLOCK_N, num_warps=num_warps)


def part_rows(M: int, V: int, itemsize: int) -> int:
    """Rows of a part: PART_ROWS, or a multiple of it that has up to PART_BYTES of logits."""
    return max(1, min(M, max(PART_BYTES // (V * itemsize * PART_ROWS), 1) * PART_ROWS))


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launch that is this file's own, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    x, factor = torch.empty(8192, 4096, dtype=dtype, device="meta"), torch.empty((), device="meta")
    return {"scale 8192x4096": functools.partial(launch_scale, x, factor)}


class Made(NamedTuple):
    """What `make` makes: the loss, and the gradients that were asked for, None in the place of others.

    dhidden    [M, K], in hidden's dtype
    dweight    [V, K], float32
    dbias      [V], float32
    remaining  float32, one number: what gradients still have to be multiplied by
    """

    loss: torch.Tensor
    dhidden: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None
    remaining: torch.Tensor


def make(hidden, weight, labels, bias, kept, terms, items, wanted, rows_a_part: int | None = None) -> Made:
    """The loss and its gradients, a part of the rows at a time.

    hidden, weight  [M, K] and [V, K]; rows of hidden may be any stride apart
    labels          of the rows kept, [n], or of all, [M]
    bias, kept      [V] and [n], or None; kept: the rows of hidden to take
    items           float32, one number, to divide the sum by
    wanted          whether the gradients of hidden, weight and bias are
    """
    n, V = labels.shape[0], weight.shape[0]
    dloss, remaining = _split(1.0 / items, hidden.dtype)
    options = {"device": hidden.device}
    losses = torch.empty(n, dtype=torch.float32, **options)
    step = rows_a_part or part_rows(n, V, hidden.element_size())
    buffer = logits_buffer(min(step, n), V, hidden)
    scattered = wanted[0] and kept is not None
    new = torch.zeros_like if scattered else torch.empty_like  # rows that are left out have no gradient
    dhidden = new(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
    dweight = torch.zeros(weight.shape, dtype=torch.float32, **options) if wanted[1] else None
    dbias = torch.zeros(V, dtype=torch.float32, **options) if wanted[2] else None
    dx_buffer = torch.empty(buffer.shape[0], hidden.shape[1], dtype=hidden.dtype, **options) if scattered else None

    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        x = hidden[part] if kept is None else hidden.index_select(0, kept[part])
        logits = logits_of(x, weight, bias, buffer)
        dlogits = logits if any(wanted) else None  # over the logits, which nothing else needs
        cross_entropy.launch_forward(logits, labels[part], terms, losses[part], dlogits=dlogits, dloss=dloss)
        if wanted[0]:
            dx = dx_buffer[: x.shape[0]] if scattered else dhidden[part]
            torch.mm(dlogits, weight, out=dx)
        if scattered:
            dhidden.index_copy_(0, kept[part], dx)
        if wanted[1]:
            _add_product(dweight, dlogits.T, x)
        if wanted[2]:
            dbias += dlogits.sum(0, dtype=torch.float32)
    return Made(losses.sum() / items, dhidden, dweight, dbias, remaining)


def logits_buffer(rows: int, V: int, like: torch.Tensor) -> torch.Tensor:
    """[rows, V] in the dtype and on the device of `like`. Rows start at multiples of 128 bits, or the products and the
    kernel would be slow; but for a compiled graph, which writes into no such view."""
    width = V if torch.compiler.is_compiling() else -(-V // 8) * 8
    return torch.empty(rows, width, dtype=like.dtype, device=like.device)[:, :V]


def logits_of(x, weight, bias, buffer) -> torch.Tensor:
    """x @ weightᵀ + bias, in the first rows of `buffer`."""
    logits = buffer[: x.shape[0]]
    return torch.mm(x, weight.T, out=logits) if bias is None else torch.addmm(bias, x, weight.T, out=logits)


def _split(scale: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale`, one number, as (what dlogits of `dtype` carries, what remains for the backward)."""
    if dtype != torch.float16:
        return scale, torch.ones_like(scale)
    mantissa, exponent = torch.frexp(scale)  # 0.5 <= mantissa < 1
    return 2 * mantissa, torch.ldexp(torch.ones_like(scale), exponent - 1)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, in total's dtype, fp32, and not rounded in between."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif torch.compiler.is_compiling():  # torch 2.11 cannot trace the next
        total += torch.mm(a, b, out_dtype=total.dtype)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # the interpreter: torch has no such product on a CPU
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, kept, terms, items, wanted):
        made = make(as_rows(hidden), weight, labels, bias, kept, terms, items, wanted)
        if any(wanted):
            dhidden = None if made.dhidden is None else made.dhidden.view(hidden.shape)
            ctx.save_for_backward(dhidden, *made[2:])
            ctx.weight_dtype = weight.dtype
        return made.loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dhidden, dweight, dbias, remaining = ctx.saved_tensors
        factor = g * remaining
        for gradient in (dhidden, dweight, dbias):
            if gradient is not None:
                launch_scale(gradient, factor)
                torch.autograd.graph.increment_version(gradient)  # a second backward raises, and does not scale again
        dweight, dbias = (None if d is None else d.to(ctx.weight_dtype) for d in (dweight, dbias))
        return dhidden, dweight, None, dbias, None, None, None, None


def _find_kept(labels: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    """The rows that count; None for all, if they do, or if nobody may wait for the GPU to say which."""
    if torch.compiler.is_compiling() or (labels.device.type != "cpu" and torch.cuda.is_current_stream_capturing()):
        return None
    kept = (labels != ignore_index).nonzero()[:, 0]
    return None if kept.shape[0] == labels.shape[0] else kept


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kept: torch.Tensor | str | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """cross_entropy(hidden @ weightᵀ + bias, labels), which see for the keywords, without holding the logits.

    hidden   [..., K], float32, float16 or bfloat16
    weight   [V, K], hidden's dtype. No work is done for its gradient unless it requires one; that takes 4 V K bytes,
             under torch.compile twice as many.
    labels   [...], int64 or int32, shifted by the caller to be the tokens that hidden predicts
    bias     [V], hidden's dtype, or None
    kept     the rows of hidden, counted over all its leading dimensions, that go through the products: [n], int64, each
             at most once, as a collator knows them; others are ignored. None: those whose label is not ignore_index,
             for whose number the CPU waits once for the GPU. "all": every row, without waiting, for when most of them
             count; so for None too under torch.compile and in the capture of a CUDA graph.
    reduction            "mean" over the rows kept and not ignored, or "sum"
    num_items_in_batch   as in `cross_entropy`
    returns  float32, one number; 0 if nothing is kept

    Beside its results it holds the logits of a part of the rows: 63 MiB for V = 32000, 251 MiB for 128256, in a 16-bit
    dtype. The gradients are made in the forward and given away by the backward, which can therefore run once; a second
    one raises. Differentiable once. Raises as `cross_entropy` does. CPU tensors take `reference` (see `on_triton`).
    """
    op = "linear_cross_entropy"
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_floats(op, **tensors)
    _check_shapes(op, tensors, kept)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{op}: reduction is {reduction!r}; give 'mean' or 'sum', or use cross_entropy for 'none'")
    terms = Terms(ignore_index, label_smoothing, z_loss, softcap)
    check_loss(op, hidden, weight.shape[0], labels, terms, reduction, num_items_in_batch)
    labels = labels.reshape(-1)
    if kept is None:
        kept = _find_kept(labels, ignore_index)
    elif isinstance(kept, str):
        kept = None
    if kept is not None:
        labels = labels.index_select(0, kept)
    items = divisor(labels, ignore_index, num_items_in_batch if reduction == "mean" else 1)
    if on_triton(op, "hidden", hidden):
        wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias))
        return _LinearCrossEntropy.apply(hidden, weight, labels, bias, kept, terms, items, wanted)
    rows = hidden.reshape(-1, hidden.shape[-1])
    rows = rows if kept is None else rows.index_select(0, kept)
    return reference(rows, weight, labels, bias, terms).sum() / items


def _check_shapes(op: str, tensors: dict[str, torch.Tensor], kept) -> None:
    hidden, weight = tensors["hidden"], tensors["weight"]
    for name, tensor in tensors.items():
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype} but hidden has {hidden.dtype}; convert one")
    if hidden.dim() == 0 or weight.dim() != 2 or 0 in weight.shape or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; give [..., K] and [V, K]"
        )
    if "bias" in tensors and tensors["bias"].shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(tensors['bias'].shape)}; weight needs ({weight.shape[0]},)")
    if kept is None or (isinstance(kept, str) and kept == "all"):
        return
    if not isinstance(kept, torch.Tensor) or kept.dtype != torch.int64 or kept.dim() != 1:
        what = f"{kept.dtype} {tuple(kept.shape)}" if isinstance(kept, torch.Tensor) else repr(kept)
        raise TypeError(f"{op}: kept is {what}; give a tensor of int64 with one dimension, 'all' or None")
    if kept.device != hidden.device:
        raise ValueError(f"{op}: kept is on {kept.device} but hidden is on {hidden.device}; move it")
