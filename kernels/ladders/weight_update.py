"""A weight update, the ladder of data layout: weight -= lr * gradient, for parameters of which an optimizer keeps more.

It keeps eight numbers of 4 bytes for each parameter (`FIELDS`), and plain gradient descent wants two of them. Where
those stand decides what moves:

    rung  field f of parameter i  neighbouring lanes' weights  sectors a request     bytes used of each sector
    aos   number 8 * i + f        32 bytes apart               32                    4 of 32
    soa   number n * f + i        4 bytes apart                16, 16 bytes a lane   32

aos  An array of structs: all that belongs to a parameter lies together, as one would write it in a class. Its eight
     numbers fill a sector, so whoever wants one of them moves all.
soa  A struct of arrays: all weights lie together, then all gradients. Neighbouring lanes want neighbouring numbers, and
     where n is divisible by 16 a lane takes four of them at once.

Both give the same result to the last bit, in place: a weight's new value takes the old one's memory.
"""

import torch

from fastkit.kernels.common import Cost, check_floats, fp32, on_triton, tl, triton
from fastkit.kernels.ladders.rung import Rung, best, find
from fastkit.kernels.ladders.rung import examples as rung_examples

FIELDS = (
    "weight", "gradient", "first_moment", "second_moment", "max_second_moment", "lr_scale", "weight_decay", "step",
)  # fmt: skip
WEIGHT, GRADIENT = FIELDS.index("weight"), FIELDS.index("gradient")


def cost(n: int) -> Cost:
    """The least work to update n weights: read weight and gradient, write the weight, in float32."""
    return Cost(bytes_moved=3 * 4 * n, flops=2 * n)


def reference(state: torch.Tensor, lr: float) -> torch.Tensor:
    """The same in plain torch."""
    state[:, WEIGHT] -= lr * state[:, GRADIENT]
    return state


@triton.jit
def _aos_kernel(
    state_ptr, lr, n, FIELDS: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """One program updates BLOCK parameters. A parameter's fields are neighbours."""
    params = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = params < n
    weight_ptrs = state_ptr + params * FIELDS + WEIGHT
    gradient_ptrs = state_ptr + params * FIELDS + GRADIENT
    weight = tl.load(weight_ptrs, mask=mask, other=0.0)
    gradient = tl.load(gradient_ptrs, mask=mask, other=0.0)
    tl.store(weight_ptrs, weight - fp32(lr) * gradient, mask=mask)


@triton.jit
def _soa_kernel(
    state_ptr, lr, n, FIELDS: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """One program updates BLOCK parameters. A field of all parameters lies together, n numbers after the last field."""
    params = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = params < n
    weight_ptrs = state_ptr + WEIGHT * n + params
    gradient_ptrs = state_ptr + GRADIENT * n + params
    weight = tl.load(weight_ptrs, mask=mask, other=0.0)
    gradient = tl.load(gradient_ptrs, mask=mask, other=0.0)
    tl.store(weight_ptrs, weight - fp32(lr) * gradient, mask=mask)


def _launch(kernel, state, lr: float, BLOCK: int, num_warps: int) -> None:
    n, fields = state.shape
    places = dict(FIELDS=fields, WEIGHT=WEIGHT, GRADIENT=GRADIENT)
    kernel[(triton.cdiv(n, BLOCK),)](state, lr, n, **places, BLOCK=BLOCK, num_warps=num_warps)


def launch_aos(state, lr: float = 1e-3, BLOCK: int = 1024, num_warps: int = 4) -> None:
    _launch(_aos_kernel, state, lr, BLOCK, num_warps)


def launch_soa(state, lr: float = 1e-3, BLOCK: int = 1024, num_warps: int = 4) -> None:
    _launch(_soa_kernel, state, lr, BLOCK, num_warps)


def _refuses_all_but_structs(state) -> str:
    return "" if state.is_contiguous() else f"takes state[n, 8] with strides (8, 1), and it has {state.stride()}"


def _refuses_all_but_arrays(state) -> str:
    return "" if state.T.is_contiguous() else f"takes state[n, 8] with strides (1, n), and it has {state.stride()}"


RUNGS = (
    Rung(
        "aos", "an array of structs: a parameter's eight numbers fill a sector, of which two are wanted", launch_aos,
        refuses=_refuses_all_but_structs,
    ),
    Rung(
        "soa", "a struct of arrays: neighbouring lanes want neighbouring numbers, every sector is used whole",
        launch_soa, refuses=_refuses_all_but_arrays,
    ),
)  # fmt: skip


def laid_out(state: torch.Tensor, rung: str) -> torch.Tensor:
    """A copy of state[n, 8], the same numbers, as the rung "aos" or "soa" wants them to lie in memory.

    Raises ValueError for a rung that there is not.
    """
    chosen = find("weight_update", RUNGS, rung)
    return state.clone(memory_format=torch.contiguous_format) if chosen is RUNGS[0] else state.T.contiguous().clone().T


def examples(dtype=torch.float32):
    """The launches for `fastkit compile`, at the size that is measured. Their precision is fp32, whatever `dtype`."""
    structs = torch.empty(2**24, len(FIELDS), device="meta")
    return rung_examples(RUNGS[:1], "16777216", structs) | rung_examples(
        RUNGS[1:], "16777216", laid_out(structs, "soa")
    )


def weight_update(state: torch.Tensor, lr: float, rung: str | None = None) -> torch.Tensor:
    """weight -= lr * gradient, in place, by one of RUNGS (None: the one that takes state's layout).

    state    [n, 8], float32, the columns being FIELDS; strides (8, 1) for rung "aos", (1, n) for "soa": see `laid_out`.
    returns  state.

    Raises TypeError for another dtype, ValueError for another shape, a layout that is neither or not the rung's, or a
    rung that there is not, NotImplementedError for a device without kernels. CPU tensors take `reference` (see
    `on_triton`).
    """
    check_floats("weight_update", state=state)
    if state.dtype != torch.float32:
        raise TypeError(f"weight_update: state has dtype {state.dtype}; optimizers keep float32")
    if state.dim() != 2 or state.shape[1] != len(FIELDS):
        raise ValueError(f"weight_update: state has shape {tuple(state.shape)}; give [n, {len(FIELDS)}]")
    chosen = find("weight_update", RUNGS, rung)
    if all(rung.refuses(state) for rung in RUNGS):
        raise ValueError(f"weight_update: state has strides {state.stride()}; pass laid_out(state, 'soa')")
    if not on_triton("weight_update", "state", state):
        return reference(state, lr)
    (chosen or best(RUNGS, state)).launch(state, lr=lr)
    return state
