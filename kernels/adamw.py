"""AdamW on one flat buffer, in two launches (Loshchilov & Hutter 2019, arXiv:1711.05101).

All parameters of a model lie end to end in one tensor of n numbers, their gradients in another. Step t, with g the
gradient of a number p:

    norm = sqrt(sum of g²) / grad_scale                            of all n gradients, the loss scale taken out
    g    = g * min(1, max_norm / (norm + 1e-6)) / grad_scale       clipped, as torch.nn.utils.clip_grad_norm_ does
    m    = m + (1 - beta1) * (g - m)                               running mean of g
    v    = beta2 * v + (1 - beta2) * g²                            running mean of g²
    p    = (1 - lr * weight_decay) * p
    p    = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

m and v start at 0 and are too small at first: 1 - beta^t is the sum of the weights that the running mean has given out
by step t. If norm is not finite, nothing changes and the step does not count.

Two launches, because the first new p needs every g. The first sums g² and, in its last program to finish, makes of the
sum, t and lr the few numbers that the second reads: the host knows none of them and waits for nothing, so that a CUDA
graph can replay both. Gradients are read twice; the second launch starts at the end that the L2 cache still holds.

The same bits every time and on every card: each program adds its own g² in a fixed order, the last one all their sums
by number, not by time of arrival, and how many programs there are hangs on n alone.

8-bit state (`adamw_state`): a byte and its block's absmax become fp32 as they are loaded. On the way back the byte is
the number of midpoints of the map below m / absmax, found by walking down a tree of them: eight loads a number, from
1 KiB that stays in L1. A block of 256 is a warp's work, so that its absmax is found by shuffles alone.

Casts: all arithmetic is fp32, but for 1 - beta^t in fp64: fp32 loses four of beta2's digits there. p is rounded once,
when it is stored; so is `copy`. State of 8 bits is rounded after p has been computed from its exact value.
"""

import functools
import math
from collections.abc import Callable

import torch

from fastkit.kernels.adamw_state import BLOCK_N, State, decoded, encoded
from fastkit.kernels.common import Cost, check_floats, device_of, fp32, on_triton, tl, triton

PARTIALS = 512  # programs of the first launch, at most: each leaves a partial sum, which its last program adds
SCALARS = 6  # what the first launch leaves: norm, found_inf, factor of g, lr, lr / correction1, sqrt(correction2)


def cost(n: int, param_dtype=torch.float32, grad_dtype=torch.bfloat16, bits=32, copy_dtype=None) -> tuple[Cost, Cost]:
    """The least work for n numbers: (norm, update), with one weight decay for all of them."""
    state_bytes = 2 * n * 4 if bits == 32 else 2 * (n + 4 * -(-n // BLOCK_N))
    copy_bytes = 0 if copy_dtype is None else n * copy_dtype.itemsize
    norm = Cost(bytes_moved=n * grad_dtype.itemsize, flops=2 * n)
    update = Cost(
        bytes_moved=n * (grad_dtype.itemsize + 2 * param_dtype.itemsize) + 2 * state_bytes + copy_bytes,
        flops=14 * n + (0 if bits == 32 else 22 * n),  # g, m 3, v 4, p 6; 8 bits: 2 products and 9 more, of m and of v
    )
    return norm, update


def reference(
    param, grad, state, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_norm=None, grad_scale=None, copy=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, with the same casts and without waiting for the device. A param in fp64 stays so."""
    accurate = torch.promote_types(param.dtype, torch.float32)
    p, g = param.view(-1).to(accurate), grad.view(-1).to(accurate)
    factor = 1.0 if grad_scale is None else 1 / grad_scale
    norm = torch.linalg.vector_norm(g) * factor
    found_inf = ~norm.isfinite()
    if max_norm is not None:
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1)
    g = g * factor
    step = state.step + 1
    correction1, correction2 = (1 - beta ** step.double() for beta in betas)

    m, v = state.state1.view(-1), state.state2.view(-1)
    if state.codebook is not None:
        qmap1, qmap2 = state.codebook[:2]
        m, v = decoded(m, state.absmax1, qmap1), decoded(v, state.absmax2, qmap2)
    if isinstance(weight_decay, torch.Tensor):
        weight_decay = weight_decay.repeat_interleave(BLOCK_N)[: p.numel()]
    m = m + (1 - betas[0]) * (g - m)
    v = betas[1] * v + (1 - betas[1]) * g * g
    p = (1 - lr * weight_decay) * p - lr / correction1 * (m / (v.sqrt() / correction2.sqrt() + eps))

    new = {state.step: step, param: p, copy: p, state.state1: m, state.state2: v}
    if state.codebook is not None:
        new[state.state1], new[state.absmax1] = encoded(m, qmap1)
        new[state.state2], new[state.absmax2] = encoded(v, qmap2)
    for old, value in new.items():
        if old is not None:
            old.copy_(torch.where(found_inf, old, value.view(old.shape).to(old.dtype)))
    return norm, found_inf.float()


@triton.jit
def _tile(tile, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHARE: tl.constexpr):
    """(blocks [BLOCK_M], offsets of their numbers [BLOCK_M, BLOCK_N], which of these are among the n).

    SHARE is how many neighbours a lane takes, at most; else, as many as make 128 bits of the narrowest dtype.
    """
    blocks = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # n can pass 2**31
    offsets = blocks[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    offsets = tl.max_contiguous(offsets, [1, SHARE])
    return blocks, offsets, offsets < n


@triton.jit
def _norm_kernel(
    grad_ptr, partial_ptr, arrivals_ptr, step_ptr, lr_ptr, grad_scale_ptr, scalars_ptr,
    n, tiles, lr, max_norm,
    beta1: tl.constexpr, beta2: tl.constexpr,
    PARTIALS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program sums the squares of tiles i, i + programs, ...; the last to finish does the rest (`_conclude`)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    sum_sq = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(program, tiles, programs):
        _, offsets, mask = _tile(tile, n, BLOCK_M, BLOCK_N, SHARE=8)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        sum_sq += grad * grad
    tl.store(partial_ptr + program, tl.sum(sum_sq))
    # release: who sees this arrival sees the partial sum. acquire: the last to arrive sees all of them
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
    if arrived == programs - 1:
        tl.store(arrivals_ptr, 0)
        index = tl.arange(0, PARTIALS)
        is_there = index < programs
        partials = tl.load(partial_ptr + index, mask=is_there, other=0.0, cache_modifier=".cg")  # not from this SM's L1
        _conclude(tl.sum(partials), step_ptr, lr_ptr, grad_scale_ptr, scalars_ptr, lr, max_norm, beta1, beta2)


@triton.jit
def _conclude(
    sum_sq, step_ptr, lr_ptr, grad_scale_ptr, scalars_ptr, lr, max_norm, beta1: tl.constexpr, beta2: tl.constexpr
):
    """From the sum of all squares to the SCALARS that the update reads; counts the step unless it is skipped."""
    unscale = 1.0
    if grad_scale_ptr is not None:
        unscale = 1.0 / tl.load(grad_scale_ptr)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr)
    else:
        lr = fp32(lr)
    norm = tl.sqrt(sum_sq) * unscale
    finite = tl.abs(norm) < float("inf")  # false for NaN
    step = tl.load(step_ptr) + 1
    tl.store(step_ptr, step, mask=finite)
    correction1, correction2 = 1.0 - _power(beta1, step), 1.0 - _power(beta2, step)
    tl.store(scalars_ptr, norm)
    tl.store(scalars_ptr + 1, tl.where(finite, 0.0, 1.0))
    tl.store(scalars_ptr + 2, tl.minimum(fp32(max_norm) / (norm + 1e-6), 1.0) * unscale)
    tl.store(scalars_ptr + 3, lr)
    tl.store(scalars_ptr + 4, (lr / correction1).to(tl.float32))
    tl.store(scalars_ptr + 5, tl.sqrt(correction2).to(tl.float32))


@triton.jit
def _power(base: tl.constexpr, exponent):
    """base^exponent in fp64, by squaring; exponent is an int32, not negative."""
    power = tl.full([], 1.0, tl.float64)
    square = tl.full([], base, tl.float64)
    for _ in range(31):
        power = tl.where(exponent % 2 == 1, power * square, power)
        square = square * square
        exponent = exponent // 2
    return power


@triton.jit
def _update_kernel(
    param_ptr, grad_ptr, state1_ptr, state2_ptr, absmax1_ptr, absmax2_ptr, copy_ptr,
    codebook_ptr, weight_decay_ptr, scalars_ptr,
    n, weight_decay,
    beta1: tl.constexpr, beta2: tl.constexpr, eps: tl.constexpr,
    EIGHT_BIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program updates BLOCK_M blocks of BLOCK_N numbers, and starts from the end, which the norm read last."""
    # 4 numbers, 128 bits of fp32, a lane: with 8, each fp32 request would ask for half of each of its sectors, and what
    # is stored would have to change lanes first. In 8 bits it is 8, so that a block and its absmax are one warp's.
    SHARE: tl.constexpr = 8 if EIGHT_BIT else 4
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks, offsets, mask = _tile(tile, n, BLOCK_M, BLOCK_N, SHARE)
    block_mask = blocks * BLOCK_N < n
    p = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N], as g, m and v
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if EIGHT_BIT:
        m = _decode(state1_ptr + offsets, absmax1_ptr + blocks, codebook_ptr, mask, block_mask)
        v = _decode(state2_ptr + offsets, absmax2_ptr + blocks, codebook_ptr + 256, mask, block_mask)
    else:
        m = tl.load(state1_ptr + offsets, mask=mask, other=0.0)
        v = tl.load(state2_ptr + offsets, mask=mask, other=0.0)
    if weight_decay_ptr is not None:
        weight_decay = tl.load(weight_decay_ptr + blocks, mask=block_mask, other=0.0)[:, None]
    else:
        weight_decay = fp32(weight_decay)
    found_inf = tl.load(scalars_ptr + 1)  # in the order of `_conclude`
    factor, lr = tl.load(scalars_ptr + 2), tl.load(scalars_ptr + 3)
    step_size, root_correction2 = tl.load(scalars_ptr + 4), tl.load(scalars_ptr + 5)

    g *= factor
    m += (1.0 - beta1) * (g - m)  # beta1 is a constant: 1 - beta1 is computed in fp64, then rounded
    v = beta2 * v + (1.0 - beta2) * g * g
    p = (1.0 - lr * weight_decay) * p - step_size * (m / (tl.sqrt(v) / root_correction2 + eps))

    n = tl.where(found_inf == 0.0, n, 0)  # a skipped step stores nothing
    mask = offsets < n
    tl.store(param_ptr + offsets, p.to(param_ptr.dtype.element_ty), mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offsets, p.to(copy_ptr.dtype.element_ty), mask=mask)
    if EIGHT_BIT:
        block_mask = blocks * BLOCK_N < n
        _encode(m, state1_ptr + offsets, absmax1_ptr + blocks, codebook_ptr + 512, mask, block_mask)
        _encode(v, state2_ptr + offsets, absmax2_ptr + blocks, codebook_ptr + 768, mask, block_mask)
    else:
        tl.store(state1_ptr + offsets, m, mask=mask)
        tl.store(state2_ptr + offsets, v, mask=mask)


@triton.jit
def _decode(state_ptrs, absmax_ptrs, map_ptr, mask, block_mask):
    """The numbers that the bytes at state_ptrs [BLOCK_M, BLOCK_N] stand for; 0 where masked."""
    code = tl.load(state_ptrs, mask=mask, other=0)
    absmax = tl.load(absmax_ptrs, mask=block_mask, other=0.0)  # [BLOCK_M]
    return tl.where(mask, tl.load(map_ptr + code.to(tl.int32)) * absmax[:, None], 0.0)


@triton.jit
def _encode(x, state_ptrs, absmax_ptrs, tree_ptr, mask, block_mask):
    """Store x [BLOCK_M, BLOCK_N] as bytes, each the number of midpoints below x / absmax."""
    absmax = tl.max(tl.abs(x), axis=1)  # [BLOCK_M]
    absmax = tl.where(absmax < 1.1754944e-38, 0.0, absmax)  # the least normal number: less has no reciprocal
    relative = x * (1.0 / tl.maximum(absmax, 1.1754944e-38))[:, None]  # 0 stays 0
    node = tl.full(x.shape, 1, tl.int32)
    for _ in tl.static_range(8):
        node = 2 * node + (relative > tl.load(tree_ptr + node)).to(tl.int32)
    tl.store(state_ptrs, (node - 256).to(tl.uint8), mask=mask)
    tl.store(absmax_ptrs, absmax, mask=block_mask)


def launch_norm(grad, state: State, lr, scalars, betas, max_norm, grad_scale=None, *, BLOCK_M=16, num_warps=8) -> None:
    """Write scalars [SCALARS] (fp32): what `launch_update` needs. Counts the step, in state, unless it is skipped."""
    n = grad.numel()
    tiles = -(-n // (BLOCK_M * BLOCK_N))
    programs = min(tiles, PARTIALS)
    partial = torch.empty(programs, dtype=torch.float32, device=grad.device)
    lr_number, lr_tensor = (0.0, lr) if isinstance(lr, torch.Tensor) else (float(lr), None)
    with device_of(grad):
        _norm_kernel[(programs,)](
            grad, partial, state.arrivals, state.step, lr_tensor, grad_scale, scalars,
            n, tiles, lr_number, math.inf if max_norm is None else float(max_norm), *betas,
            PARTIALS, BLOCK_M, BLOCK_N, num_warps=num_warps,
        )  # fmt: skip


def launch_update(
    param, grad, state: State, scalars, betas, eps, weight_decay, copy=None, *, BLOCK_M=4, num_warps=4
) -> None:
    """Update param, copy and state in place by what `launch_norm` left in scalars."""
    n = param.numel()
    decay, decays = (0.0, weight_decay) if isinstance(weight_decay, torch.Tensor) else (float(weight_decay), None)
    with device_of(param):
        _update_kernel[(-(-n // (BLOCK_M * BLOCK_N)),)](
            param, grad, state.state1, state.state2, state.absmax1, state.absmax2, copy,
            state.codebook, decays, scalars, n, decay, *betas, eps,
            state.codebook is not None, BLOCK_M, BLOCK_N, num_warps=num_warps,
        )  # fmt: skip


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    n, betas = 41_943_040, (0.9, 0.999)  # Mistral-7B, LoRA of rank 16 on all seven projections
    grad, copy = (torch.empty(n, dtype=dtype, device="meta") for _ in range(2))
    param, scalars = torch.empty(n, device="meta"), torch.empty(SCALARS, device="meta")
    update = functools.partial(launch_update, betas=betas, eps=1e-8, weight_decay=0.0)
    return {
        f"norm {n}": functools.partial(launch_norm, grad, State.zeros(param), 1e-4, scalars, betas, 1.0),
        f"update {n}": functools.partial(update, param, grad, State.zeros(param), scalars, copy=copy),
        f"update {n}, 8-bit state": functools.partial(update, param, grad, State.zeros(param, 8), scalars, copy=copy),
        f"update {n}, 8-bit state, no master": functools.partial(update, copy, grad, State.zeros(param, 8), scalars),
    }


@torch.no_grad()
def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    lr: float | torch.Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | torch.Tensor = 0.0,
    max_norm: float | None = None,
    grad_scale: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of AdamW on all numbers of `param`, in place (Loshchilov & Hutter 2019, arXiv:1711.05101).

    param         any shape, n numbers, contiguous, float32, float16 or bfloat16
    grad          of param's shape, contiguous, in any of these dtypes; not changed
    state         `State.zeros(param, bits=32 or 8)` before the first step; changed in place, the step count too
    lr            a number, or a float32 tensor [] that a CUDA graph reads anew at each replay
    weight_decay  a number, or float32 [ceil(n / 256)], one for each 256 numbers: parameters that decay and others, each
                  beginning at a multiple of 256
    max_norm      gradients are scaled down to this norm, all n taken together; None leaves them
    grad_scale    float32 []: the loss was multiplied by this, and gradients are divided by it first
    copy          of param's shape, contiguous, any of these dtypes: gets the new param too, rounded once; 16-bit
                  weights for the next forward, say, of a float32 param
    returns       (norm, found_inf), float32 []: the gradients' norm before clipping; 1 if it was not finite, which
                  leaves everything as it was, else 0

    The same inputs give the same bits every time. The host never waits for the GPU. Nothing is differentiated.
    Raises TypeError for another dtype, ValueError for shapes, layouts or devices that do not match or numbers out of
    range, NotImplementedError for a device without kernels. CPU tensors take `reference` (see `on_triton`).
    """
    floats = _check(param, grad, state, lr, betas, eps, weight_decay, max_norm, grad_scale, copy)
    if not all(on_triton("adamw", name, tensor) for name, tensor in floats.items()) or param.numel() == 0:
        return reference(param, grad, state, lr, betas, eps, weight_decay, max_norm, grad_scale, copy)
    scalars = torch.empty(SCALARS, dtype=torch.float32, device=param.device)
    launch_norm(grad, state, lr, scalars, betas, max_norm, grad_scale)
    launch_update(param, grad, state, scalars, betas, eps, weight_decay, copy)
    return scalars[0], scalars[1]


def _check(param, grad, state, lr, betas, eps, weight_decay, max_norm, grad_scale, copy) -> dict[str, torch.Tensor]:
    """Raise for what `adamw` cannot take; return its floating-point tensors by name."""
    floats = {"param": param, "grad": grad} | ({} if copy is None else {"copy": copy})
    check_floats("adamw", **floats)
    blocks = -(-param.numel() // BLOCK_N)
    eight_bit = state.codebook is not None
    expected = {name: (tensor, tensor.dtype, param.shape) for name, tensor in floats.items()}
    for which in ("1", "2"):
        name = f"state{which}"
        expected[name] = (getattr(state, name), torch.uint8 if eight_bit else torch.float32, param.shape)
        if eight_bit:
            expected[f"absmax{which}"] = (getattr(state, f"absmax{which}"), torch.float32, (blocks,))
    numbers = {"lr": (lr, ()), "grad_scale": (grad_scale, ()), "weight_decay": (weight_decay, (blocks,))}
    for name, (value, shape) in numbers.items():
        if isinstance(value, torch.Tensor):
            expected[name] = (value, torch.float32, shape)
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype:
            raise TypeError(f"adamw: {name} has dtype {tensor.dtype}; convert it to {dtype}")
        if tensor.shape != shape or not tensor.is_contiguous():
            layout = "" if tensor.is_contiguous() else " and is not contiguous"
            raise ValueError(f"adamw: {name} has shape {tuple(tensor.shape)}{layout}; give {tuple(shape)}, contiguous")
        if tensor.device != param.device:
            raise ValueError(
                f"adamw: {name} is on {tensor.device} but param is on {param.device}; move one to the other"
            )
    limits = {"betas[0]": (betas[0], 1), "betas[1]": (betas[1], 1), "eps": (eps, math.inf)}
    limits |= {} if max_norm is None else {"max_norm": (max_norm, math.inf)}
    for name, (value, most) in limits.items():
        if not 0 <= value < most:
            raise ValueError(f"adamw: {name} is {value}; give 0 <= {name} < {most}")
    return floats
