"""Cross-entropy of logits: online softmax in one pass (Milakov & Gimelshein 2018, arXiv:1805.02867).

Forward, for a row of V logits and its label y. A soft-cap c squeezes logits into (-c, c) first (Gemma 2,
arXiv:2408.00118); smoothing mixes the target with a uniform one (Szegedy et al. 2015, arXiv:1512.00567); the z-loss
keeps lse near 0 (PaLM, arXiv:2204.02311):

    z     = c * tanh(logits / c)                     or z = logits
    total = sum(exp(z - max(z)))                     exp(89) would overflow fp32
    lse   = max(z) + log(total)                      the logarithm of sum(exp(z))
    loss  = lse - (1 - smoothing) * z_y - smoothing * mean(z) + z_loss * lse²

One pass finds maximum and total: where the running maximum grows, the total so far is scaled down to the new one. Each
thread keeps those of its own columns, and all are joined once, at the row's end: none waits for another in between.

Backward. ∂lse/∂z_j = exp(z_j - max) / total = p_j, the probability, and tanh' = 1 - tanh²:

    dz_j      = p_j * (1 + 2 z_loss * lse)  -  (1 - smoothing) * [j = y]  -  smoothing / V
    dlogits_j = dloss * dz_j * (1 - (z_j / c)²)

Saved for the backward: logits (the caller's own tensor), labels, max(z) and total, 8 bytes a row; p is recomputed. lse
alone would do, but at 70 fp32 has steps of 8e-6, and p would err by as much. A row whose label is ignore_index has loss
0 and gradient 0, and its logits are not read.

Casts: loads are converted to fp32 at once, arithmetic and losses are fp32; dlogits is rounded once, to logits' dtype.
"""

import functools
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from fastkit.kernels.common import Cost, architecture, as_rows, check_floats, device_of, fp32, on_triton, tl, triton
from fastkit.kernels.loss_terms import Terms, check_loss, divisor


def cost(M: int, V: int, dtype=torch.bfloat16) -> tuple[Cost, Cost]:
    """The least work for M rows of V logits of `dtype`, none ignored: (forward, backward)."""
    logits_bytes, row_bytes = M * V * dtype.itemsize, M * 4
    forward = Cost(
        bytes_moved=logits_bytes + 5 * row_bytes,  # read logits, labels (8 bytes); write loss, largest, total
        flops=4 * M * V,  # maximum, difference, exp, sum
    )
    backward = Cost(
        bytes_moved=2 * logits_bytes + 5 * row_bytes,  # read logits, labels, largest, total, dloss; write dlogits
        flops=4 * M * V,  # difference, exp, / total, - [j = y]
    )
    return forward, backward


def reference(logits: torch.Tensor, labels: torch.Tensor, terms: Terms) -> torch.Tensor:
    """Each row's loss in plain torch, with the same casts, differentiated by autograd. fp64 stays fp64: the truth."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if terms.softcap is not None:
        z = terms.softcap * torch.tanh(z / terms.softcap)
    counts = labels != terms.ignore_index
    target = z.gather(-1, labels.where(counts, 0).long()[..., None])[..., 0]
    lse = z.logsumexp(-1)
    loss = lse - (1 - terms.label_smoothing) * target + terms.z_loss * lse.square()
    if terms.label_smoothing:
        loss = loss - terms.label_smoothing * z.mean(-1)
    return loss.where(counts, 0)


@triton.jit
def _capped(logits, softcap, SOFTCAP: tl.constexpr):
    """z, in fp32. tanh(x) = 2 sigmoid(2x) - 1 errs by an fp32 unit in the last place of 1, and z by c times that."""
    z = logits.to(tl.float32)
    if SOFTCAP:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def _row_sums(
    row_ptr, V, end, softcap,
    AGAIN: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, LANE_V: tl.constexpr,
):  # fmt: skip
    """(maximum, total, sum of z) of the V logits at row_ptr; end is V, or 0 to read nothing.

    A thread holds whole rows of a tile [BLOCK_V / LANE_V, LANE_V], one 128-bit load each. AGAIN: they will be read once
    more, so caches are to keep them.
    """
    lanes: tl.constexpr = BLOCK_V // LANE_V
    policy: tl.constexpr = "evict_last" if AGAIN else ""
    cols = tl.arange(0, lanes)[:, None] * LANE_V + tl.arange(0, LANE_V)[None, :]  # [lanes, LANE_V]
    largest = tl.full([lanes], float("-inf"), tl.float32)
    totals = tl.zeros([lanes], tl.float32)  # of exp(z - largest)
    z_sums = tl.zeros([lanes], tl.float32)
    for start in range(0, end, BLOCK_V):
        mask = start + cols < V
        logits = tl.load(row_ptr + start + cols, mask=mask, other=float("-inf"), eviction_policy=policy)
        z = tl.where(mask, _capped(logits, softcap, SOFTCAP), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(z, axis=1))
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing but -inf yet: exp(-inf - 0) = 0
        totals = totals * tl.exp(largest - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
        largest = new_largest
        if SMOOTH:
            z_sums += tl.sum(tl.where(mask, z, 0.0), axis=1)
    row_largest = tl.max(largest, axis=0)
    row_largest = tl.where(row_largest == float("-inf"), 0.0, row_largest)
    return row_largest, tl.sum(totals * tl.exp(largest - row_largest), axis=0), tl.sum(z_sums, axis=0)


@triton.jit
def _gradient(
    logits, is_label, largest, total, dloss, V, label_smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dlogits, in fp32, of some columns of a row with this maximum, total and dloss."""
    z = _capped(logits, softcap, SOFTCAP)
    p_weight = (1.0 + 2.0 * z_loss * (largest + tl.log(total))) * dloss / total
    dlogits = tl.exp(z - largest) * p_weight - tl.where(is_label, (1.0 - label_smoothing) * dloss, 0.0)
    if SMOOTH:
        dlogits -= label_smoothing / V * dloss
    if SOFTCAP:
        dlogits *= 1.0 - (z / softcap) * (z / softcap)
    return dlogits


@triton.jit
def _forward_kernel(
    logits_ptr, labels_ptr, loss_ptr, largest_ptr, total_ptr, dlogits_ptr, dloss_ptr,
    V, stride_logitsm, stride_dlogitsm,
    ignore_index, label_smoothing, z_loss, softcap, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr, LANE_V: tl.constexpr,
):  # fmt: skip
    """One program does a row: loss, maximum and total; or loss and, with dloss known, dlogits.

    dlogits may be logits itself. The second reading of a row is from the caches, as far as the rows under way fit.
    """
    label_smoothing, z_loss, softcap = fp32(label_smoothing), fp32(z_loss), fp32(softcap)
    row = tl.program_id(0).to(tl.int64)  # row * stride can pass 2**31
    row_ptr = logits_ptr + row * stride_logitsm
    label = tl.load(labels_ptr + row)
    counts = label != ignore_index
    # a label that is no column: nan, as there is no way to raise here
    target = tl.load(row_ptr + label, mask=(label >= 0) & (label < V), other=float("nan"))
    end = tl.where(counts, V, 0)
    largest, total, z_sum = _row_sums(row_ptr, V, end, softcap, GRADIENT, SMOOTH, SOFTCAP, BLOCK_V, LANE_V)
    total = tl.where(counts, total, 1.0)
    log_total = tl.log(total)
    aim = (1.0 - label_smoothing) * _capped(target, softcap, SOFTCAP)
    if SMOOTH:
        aim += label_smoothing / V * z_sum
    loss = largest - aim + log_total + z_loss * (largest + log_total) * (largest + log_total)
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))

    if GRADIENT:
        dloss = tl.where(counts, tl.load(dloss_ptr), 0.0)
        dlogits_row_ptr = dlogits_ptr + row * stride_dlogitsm
        last = (tl.cdiv(V, BLOCK_V) - 1) * BLOCK_V
        for back in range(0, V, BLOCK_V):  # from the end: what was read last is the likeliest to be cached still
            cols = last - back + tl.arange(0, BLOCK_V)  # [BLOCK_V]
            logits = tl.load(
                row_ptr + cols, mask=(cols < V) & counts, other=float("-inf"), eviction_policy="evict_first"
            )
            is_label = cols == label.to(tl.int32)
            dlogits = _gradient(
                logits, is_label, largest, total, dloss, V, label_smoothing, z_loss, softcap, SMOOTH, SOFTCAP
            )
            tl.store(dlogits_row_ptr + cols, dlogits.to(dlogits_ptr.dtype.element_ty), mask=cols < V)
    elif largest_ptr is not None:
        tl.store(largest_ptr + row, largest)
        tl.store(total_ptr + row, total)


@triton.jit
def _backward_kernel(
    logits_ptr, labels_ptr, largest_ptr, total_ptr, dloss_ptr, dlogits_ptr,
    V, stride_logitsm, stride_dlossm, stride_dlogitsm,
    ignore_index, label_smoothing, z_loss, softcap, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_V columns of one row. The grid is 1-D: its other axes end at 65,535."""
    label_smoothing, z_loss, softcap = fp32(label_smoothing), fp32(z_loss), fp32(softcap)
    blocks_v = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // blocks_v).to(tl.int64)
    cols = tl.program_id(0) % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    mask = cols < V
    label = tl.load(labels_ptr + row)
    counts = label != ignore_index
    largest, total = tl.load(largest_ptr + row), tl.load(total_ptr + row)
    dloss = tl.load(dloss_ptr + row * stride_dlossm, mask=counts, other=0.0).to(tl.float32)
    logits = tl.load(logits_ptr + row * stride_logitsm + cols, mask=mask & counts, other=float("-inf"))
    is_label = cols == label.to(tl.int32)
    dlogits = _gradient(
        logits, is_label, largest, total, dloss, V, label_smoothing, z_loss, softcap, SMOOTH, SOFTCAP
    )  # fmt: skip
    tl.store(dlogits_ptr + row * stride_dlogitsm + cols, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


def _forward_tiling(V: int, itemsize: int, gradient: bool, device: torch.device) -> dict[str, int]:
    """Blocks and warps: 16 numbers a thread at a time, two 128-bit loads in a 16-bit dtype.

    With the gradient a row is read twice, the second time from the end on, where the caches still have it, and 8
    numbers a thread let an SM hold four rows. H100, bf16: 0.052 ms for 1024x32000, 0.227 for 1024x128256; tiles of
    64 KiB, of which an SM holds two, take 0.061 and 0.257.
    """
    BLOCK_V = min(4096, max(128, triton.next_power_of_2(V)))
    lanes = 64 if architecture(device).startswith("gfx9") else 32
    num_warps = max(BLOCK_V // (lanes * (8 if gradient else 16)), 1)
    return {"BLOCK_V": BLOCK_V, "LANE_V": 16 // itemsize, "num_warps": num_warps}


def launch_forward(logits, labels, terms, loss, largest=None, total=None, dlogits=None, dloss=None, **tiling) -> None:
    """Write loss [M], given logits [M, V] and labels [M]; and largest and total [M], or dlogits [M, V], if given.

    logits, dlogits  rows may be any stride apart; dlogits may be logits itself
    loss, largest, total   float32
    dloss            float32, one number: ∂L/∂loss of every row, for callers who know it before the backward
    tiling           overrides `_forward_tiling`
    """
    M, V = logits.shape
    if M == 0:
        return
    gradient = dlogits is not None
    stride_dlogitsm = dlogits.stride(0) if gradient else 0
    tiling = _forward_tiling(V, logits.element_size(), gradient, logits.device) | tiling
    with device_of(logits):
        _forward_kernel[(M,)](
            logits, labels, loss, largest, total, dlogits, dloss,
            V, logits.stride(0), stride_dlogitsm, **terms.arguments(), GRADIENT=gradient, **tiling,
        )  # fmt: skip


def launch_backward(logits, labels, terms, largest, total, dloss, dlogits, **tiling) -> None:
    """Write dlogits [M, V], given dloss [M] of any stride, 0 too. dlogits may be logits itself."""
    M, V = logits.shape
    if M == 0:
        return
    BLOCK_V = min(4096, max(128, triton.next_power_of_2(V)))
    tiling = {"BLOCK_V": BLOCK_V, "num_warps": max(BLOCK_V // 512, 1)} | tiling  # 16 numbers a thread
    with device_of(logits):
        _backward_kernel[(M * triton.cdiv(V, tiling["BLOCK_V"]),)](
            logits, labels, largest, total, dloss, dlogits,
            V, logits.stride(0), dloss.stride(0), dlogits.stride(0), **terms.arguments(), **tiling,
        )  # fmt: skip


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    found, terms = {}, Terms()
    for M, V in ((8192, 32000), (1024, 128256)):  # Mistral-7B; a part of Llama-3's
        logits = torch.empty(M, V, dtype=dtype, device="meta")
        labels = torch.empty(M, dtype=torch.int64, device="meta")
        loss, largest, total, dloss = (torch.empty(M, device="meta") for _ in range(4))
        forward = functools.partial(launch_forward, logits, labels, terms, loss)
        found[f"forward {M}x{V}"] = functools.partial(forward, largest, total)
        found[f"forward with dlogits {M}x{V}"] = functools.partial(forward, dlogits=logits, dloss=dloss[0])
        backward = functools.partial(launch_backward, logits, labels, terms, largest, total, dloss, logits)
        found[f"backward {M}x{V}"] = backward
    return found


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, terms, overwrite_logits):
        rows = as_rows(logits)
        loss, largest, total = torch.empty(3, rows.shape[0], dtype=torch.float32, device=logits.device)
        launch_forward(rows, labels, terms, loss, largest, total)
        ctx.save_for_backward(logits, labels, largest, total)  # logits as they came: as_rows's copy is not kept alive
        ctx.terms, ctx.overwrite_logits = terms, overwrite_logits
        return loss.view(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, labels, largest, total = ctx.saved_tensors
        over = ctx.overwrite_logits
        dlogits = logits.detach() if over else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        launch_backward(as_rows(logits), labels, ctx.terms, largest, total, dloss.reshape(-1), as_rows(dlogits))
        if over:
            torch.autograd.graph.increment_version(logits)  # whoever needs the logits after this is told
        return dlogits, None, None, None


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | torch.Tensor | None = None,
    overwrite_logits: bool = False,
) -> torch.Tensor:
    """lse - (1 - label_smoothing) z_label - label_smoothing mean(z) + z_loss lse², by rows; z = the (capped) logits.

    logits           [..., V], V >= 1, float32, float16 or bfloat16. Contiguous tensors and column slices are read in
                     place, other layouts copied first: shift the labels, not the logits, to predict the next token.
    labels           [...], int64 or int32. A row whose label is ignore_index has loss 0 and gradient 0.
    softcap          c: z = c tanh(logits / c) (Gemma 2); None: z = logits
    reduction        "mean" over the rows not ignored (0 if all are, where torch has nan), "sum" or "none"
    num_items_in_batch   what the mean divides by instead: the labels that count in all micro-batches of a step, so that
                     accumulated gradients equal those of one large batch. A tensor on the GPU is not waited for.
    overwrite_logits the backward writes the gradient over logits, which must be contiguous, to save a tensor of that
                     size: for logits that nothing else needs. A second backward then raises, as any that needs them.
    returns          float32, one number, or [...] for "none"; so under autocast

    Differentiable once. A label that is neither ignore_index nor in [0, V) raises ValueError on a CPU; on a GPU, where
    looking would wait for it, the row's loss is nan. Raises TypeError for other dtypes, ValueError for shapes, devices
    or numbers that do not match, NotImplementedError for a device without kernels. CPU tensors take `reference` (see
    `on_triton`).
    """
    check_floats("cross_entropy", logits=logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"cross_entropy: logits has shape {tuple(logits.shape)}; give rows of at least one number")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy: reduction is {reduction!r}; give 'mean', 'sum' or 'none'")
    if overwrite_logits and not logits.is_contiguous():
        raise ValueError("cross_entropy: overwrite_logits needs contiguous logits; leave it out, or pass a copy")
    V, terms = logits.shape[-1], Terms(ignore_index, label_smoothing, z_loss, softcap)
    check_loss("cross_entropy", logits, V, labels, terms, reduction, num_items_in_batch)
    if on_triton("cross_entropy", "logits", logits):
        losses = _CrossEntropy.apply(logits, labels.reshape(-1), terms, overwrite_logits)
    else:
        losses = reference(logits, labels, terms)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / divisor(labels, ignore_index, num_items_in_batch)
