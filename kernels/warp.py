"""A warp's 32 lanes talk without memory: shuffles, votes and reductions, by Triton and by hand in PTX.

A warp is 32 lanes that run one instruction together. A shuffle hands every lane a register of another lane: no memory,
no barrier. A *butterfly* makes of it a reduction. In step d, lane i adds the value of lane i ^ d:

    lane        0     1     2     3                  sum of
    start       a     b     c     d
    d = 2      a+c   b+d   c+a   d+b                 2 lanes
    d = 1      all   all   all   all                 4 lanes

Each step doubles the lanes that a sum is made of, so 32 lanes take 5 steps, d = 16, 8, 4, 2, 1, and not only lane 0 but
every lane ends with the result: nothing is left to broadcast. Both lanes of a pair add the same two numbers, and a + b
is b + a, so all lanes hold the same bits.

What it saves: through shared memory a step is a store, a barrier and a load, and takes memory that other data could
use; here it is one instruction, and lanes of a warp need no barrier. So a reduction goes by registers first (each lane
adds what it loaded), by shuffles then, and by shared memory last, once for each warp and not once for each number.
`tl.sum` does just that: with num_warps=1 its machine code has five `shfl.sync.bfly` and no shared memory; with more
warps, a store to shared memory, a barrier, a load, and shuffles again for what the warps left there.

By hand: `tl.inline_asm_elementwise` runs its PTX once for each element of a tile. Here a tile is [32] and a program one
warp, so that each lane holds one element, and "once for each element" is "once, in all lanes together", which is what
`.sync` with the mask of all 32 lanes asks for. Triton does not promise such a layout; the tests read it from the
compiler's output. The assembly is declared impure: its result hangs on other lanes' values, which are not among its
arguments, so it must be neither merged with another nor moved.

    shfl.sync.bfly     lane i gets lane i ^ d's value                         from sm_30 on
    shfl.sync.idx      every lane gets one lane's value: a broadcast
    match.all.sync     whether all lanes hold the same bits                   from sm_70 on
    redux.sync         sum, min or max of all lanes' int32, one instruction   from sm_80 on; before, the butterfly

Where there is no PTX (AMD, Triton's interpreter) or not this instruction (`redux` on sm_75), reductions run as Triton's
own, `launch_rows`; `broadcast_first` and `all_equal`, which Triton cannot say, run in torch.

Casts: floating-point numbers are converted to fp32 as they are loaded and results stay fp32; int32 stays int32; a sum
that it cannot hold wraps around (in the interpreter, numpy refuses it).
"""

import functools
from collections.abc import Callable

import torch

from fastkit.kernels.common import Cost, architecture, device_of, on_triton, tl, triton

LANES = 32
REDUX = {
    "sum": "redux.sync.add.s32 $0, $1, 0xffffffff;",
    "min": "redux.sync.min.s32 $0, $1, 0xffffffff;",
    "max": "redux.sync.max.s32 $0, $1, 0xffffffff;",
}
IDENTITY = {  # what changes no result: for the lanes beyond a row's end
    torch.float32: {"sum": 0.0, "min": "inf", "max": "-inf"},
    torch.int32: {"sum": 0, "min": 2**31 - 1, "max": -(2**31)},
}


def cost(M: int, N: int, dtype=torch.float32) -> Cost:
    """The least work to reduce M rows of N numbers to one of 4 bytes each."""
    return Cost(bytes_moved=M * N * dtype.itemsize + M * 4, flops=M * (N - 1))


def reference(x: torch.Tensor, kind: str = "sum") -> torch.Tensor:
    """The same in plain torch: `kind` of each row of x [M, N]. fp64 stays fp64: the tests' truth."""
    x = x if x.dtype == torch.int32 else x.to(torch.promote_types(x.dtype, torch.float32))
    return x.sum(-1, dtype=x.dtype) if kind == "sum" else getattr(x, f"a{kind}")(-1)


@triton.constexpr_function
def _number(identity):
    """One of IDENTITY as a number: of math.inf torch.compile (2.11) makes a name that its code does not know."""
    return float(identity) if isinstance(identity, str) else identity


@triton.jit
def _combine(a, b, KIND: tl.constexpr):
    return a + b if KIND == "sum" else (tl.minimum(a, b) if KIND == "min" else tl.maximum(a, b))


@triton.jit
def _reduce(x, axis: tl.constexpr, KIND: tl.constexpr):
    return tl.sum(x, axis) if KIND == "sum" else (tl.min(x, axis) if KIND == "min" else tl.max(x, axis))


@triton.jit
def _rows_kernel(
    x_ptr, y_ptr, N, stride_xm,
    KIND: tl.constexpr, IDENTITY: tl.constexpr, LANES: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """One program reduces one row, SHARE neighbours a lane at a time.

    Triton chooses how: in a lane's registers, by shuffles in a warp, through shared memory between warps.
    """
    row = tl.program_id(0).to(tl.int64)  # row * stride can pass 2**31
    dtype = y_ptr.dtype.element_ty
    found = tl.full([LANES], _number(IDENTITY), dtype)
    for start in range(0, N, SHARE * LANES):
        cols = start + SHARE * tl.arange(0, LANES)[:, None] + tl.arange(0, SHARE)[None, :]  # [LANES, SHARE]
        x = tl.load(x_ptr + row * stride_xm + cols, mask=cols < N, other=_number(IDENTITY)).to(dtype)
        found = _combine(found, _reduce(x, 1, KIND), KIND)
    tl.store(y_ptr + row, _reduce(found, 0, KIND))


@triton.jit
def _own_number(
    x_ptr, N, dtype: tl.constexpr,
    KIND: tl.constexpr, IDENTITY: tl.constexpr, LANES: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """[LANES]: what each lane makes, in its own registers, of every LANES-th number; SHARE loads are under way at once.

    128-bit loads would be a tile [LANES, SHARE], and a row that is not aligned is dealt out one number a lane: then the
    sum over SHARE is itself made by shuffles, and lanes end with numbers that are not theirs alone.
    """
    found = tl.full([LANES], _number(IDENTITY), dtype)
    for start in range(0, N, SHARE * LANES):
        for step in tl.static_range(SHARE):
            cols = start + step * LANES + tl.arange(0, LANES)
            found = _combine(found, tl.load(x_ptr + cols, mask=cols < N, other=_number(IDENTITY)).to(dtype), KIND)
    return found


@triton.jit
def _shuffles_kernel(
    x_ptr, y_ptr, N, stride_xm,
    KIND: tl.constexpr, IDENTITY: tl.constexpr, LANES: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """One warp reduces one row, its lanes by the butterfly."""
    row = tl.program_id(0).to(tl.int64)
    found = _own_number(x_ptr + row * stride_xm, N, y_ptr.dtype.element_ty, KIND, IDENTITY, LANES, SHARE)  # one a lane
    for step in tl.static_range(5):
        theirs = tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r",
            [found, 16 >> step], found.dtype, is_pure=False, pack=1,
        )  # fmt: skip
        found = _combine(found, theirs, KIND)
    lanes = tl.arange(0, LANES)
    tl.store(y_ptr + row + 0 * lanes, found, mask=lanes == 0)  # every lane has it, one stores it


@triton.jit
def _redux_kernel(
    x_ptr, y_ptr, N, stride_xm,
    KIND: tl.constexpr, IDENTITY: tl.constexpr, LANES: tl.constexpr, SHARE: tl.constexpr, REDUX: tl.constexpr,
):  # fmt: skip
    """One warp reduces one row of int32, its lanes by one instruction."""
    row = tl.program_id(0).to(tl.int64)
    found = _own_number(x_ptr + row * stride_xm, N, y_ptr.dtype.element_ty, KIND, IDENTITY, LANES, SHARE)
    found = tl.inline_asm_elementwise(REDUX, "=r,r", [found], tl.int32, is_pure=False, pack=1)
    lanes = tl.arange(0, LANES)
    tl.store(y_ptr + row + 0 * lanes, found, mask=lanes == 0)


@triton.jit
def _broadcast_kernel(x_ptr, y_ptr, N, stride_xm, LANES: tl.constexpr):
    """One warp writes lane 0's number to all of a row. Memory could do it too; here a register does."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    x = tl.load(x_ptr + row * stride_xm + lanes, mask=lanes < N, other=0)
    first = tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", [x], x.dtype, is_pure=False, pack=1
    )
    tl.store(y_ptr + row * N + lanes, first, mask=lanes < N)


@triton.jit
def _match_kernel(x_ptr, y_ptr, N, stride_xm, LANES: tl.constexpr):
    """One warp finds whether a row's numbers have the same bits. Lanes beyond its end take its last number."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    x = tl.load(x_ptr + row * stride_xm + tl.minimum(lanes, N - 1))
    same = tl.inline_asm_elementwise(  # the mask of all lanes if they agree, else 0
        "match.all.sync.b32 $0, $1, 0xffffffff;", "=r,r", [x], tl.int32, is_pure=False, pack=1
    )
    tl.store(y_ptr + row + 0 * lanes, same != 0, mask=lanes == 0)


@torch.compiler.assume_constant_result
def lacking(device: torch.device, least: int = 70) -> str:
    """What `device` lacks for PTX of sm_`least`, in words; "" if nothing."""
    found = architecture(device)
    if not found.startswith("sm_"):
        return f"is PTX and this is {found}"
    return f"needs sm_{least} and this is {found}" if int(found[3:]) < least else ""


def _launch(kernel, x, y, num_warps=1, **constants) -> None:
    """One program a row of x [M, N], whose rows may be any stride apart."""
    if x.shape[0]:
        with device_of(x):
            kernel[(x.shape[0],)](
                x, y, x.shape[1], x.stride(0), **constants, LANES=LANES * num_warps, num_warps=num_warps
            )  # fmt: skip


def _launch_reduction(kernel, x, y, kind, num_warps=1, **constants) -> None:
    """`_launch` of a kernel whose lanes load 128 bits at a time."""
    share, identity = 16 // x.element_size(), IDENTITY[y.dtype][kind]
    _launch(kernel, x, y, num_warps, **constants, KIND=kind, IDENTITY=identity, SHARE=share)


def launch_rows(x, y, kind: str, num_warps: int = 1) -> None:
    """Write `kind` of each row of x [M, N] to y [M], which is fp32 or, for an int32 x, int32. By Triton."""
    _launch_reduction(_rows_kernel, x, y, kind, num_warps)


def launch_shuffles(x, y, kind: str) -> None:
    """The same by hand, in shuffles. Raises NotImplementedError without PTX."""
    if why := lacking(x.device):
        raise NotImplementedError(f"warp: shfl.sync {why}: use launch_rows")
    _launch_reduction(_shuffles_kernel, x, y, kind)


def launch_redux(x, y, kind: str) -> None:
    """The same for int32, in one instruction. Raises NotImplementedError before sm_80."""
    if why := lacking(x.device, 80):
        raise NotImplementedError(f"warp: redux.sync {why}: use launch_rows")
    _launch_reduction(_redux_kernel, x, y, kind, REDUX=REDUX[kind])


def launch_broadcast(x, y) -> None:
    """Write each row's first number to all of that row of y [M, N], N <= 32. Raises NotImplementedError without PTX."""
    if why := lacking(x.device):
        raise NotImplementedError(f"warp: shfl.sync {why}: use x[:, :1].expand_as(x)")
    _launch(_broadcast_kernel, x, y)


def launch_match(x, y) -> None:
    """Write to y [M] (bool) whether a row's numbers, 32 at most, are the same. Raises as `launch_shuffles`."""
    if why := lacking(x.device):
        raise NotImplementedError(f"warp: match.all.sync {why}: use (x == x[:, :1]).all(-1)")
    _launch(_match_kernel, x, y)


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    M, N = 8192, 4096
    x, y = torch.empty(M, N, dtype=dtype, device="meta"), torch.empty(M, device="meta")
    numbers, row = (torch.empty(*shape, dtype=torch.int32, device="meta") for shape in ((M, N), (M,)))
    lanes, same = numbers[:, :LANES], torch.empty(M, dtype=torch.bool, device="meta")
    return {
        f"rows, one warp, {M}x{N}": functools.partial(launch_rows, x, y, "sum"),
        f"rows, eight warps, {M}x{N}": functools.partial(launch_rows, x, y, "sum", num_warps=8),
        f"shuffles {M}x{N}": functools.partial(launch_shuffles, x, y, "sum"),
        f"redux {M}x{N}": functools.partial(launch_redux, numbers, row, "sum"),
        f"broadcast {M}x{LANES}": functools.partial(launch_broadcast, lanes, torch.empty_like(lanes)),
        f"match {M}x{LANES}": functools.partial(launch_match, lanes, same),
    }


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of each row, by `tl.sum` in one warp.

    x        [M, N], N >= 1, float32, float16, bfloat16 or int32. Rows are read in place, whatever lies between them, if
             a row's numbers are neighbours; other layouts are copied first.
    returns  [M] in float32, or int32 for an int32 x.

    Not differentiated. Raises TypeError for another dtype, ValueError for another shape, NotImplementedError for
    a device without kernels and for an x that requires a gradient. CPU tensors take `reference` (see `on_triton`).
    """
    return _reduced("row_sum", x, "sum", launch_rows)


def shuffle_sum(x: torch.Tensor) -> torch.Tensor:
    """`row_sum` by hand: a butterfly of five `shfl.sync.bfly`; `row_sum` itself where there is no PTX."""
    return _reduced("shuffle_sum", x, "sum", launch_shuffles)


def shuffle_max(x: torch.Tensor) -> torch.Tensor:
    """The largest number of each row by the same butterfly. Everything else as in `shuffle_sum`; rows without NaN."""
    return _reduced("shuffle_max", x, "max", launch_shuffles)


def redux(x: torch.Tensor, kind: str = "sum") -> torch.Tensor:
    """ "sum", "min" or "max" of each row of x [M, N] (int32) by one `redux.sync`; before sm_80 as in `row_sum`.

    Raises what `row_sum` raises, and ValueError for another kind.
    """
    if kind not in REDUX:
        raise ValueError(f"redux: kind is {kind!r}; give one of {', '.join(REDUX)}")
    return _reduced("redux", x, kind, launch_redux, (torch.int32,), least=80)


def broadcast_first(x: torch.Tensor) -> torch.Tensor:
    """[M, N]: each row's first number in all its places, by one `shfl.sync.idx`; by torch where there is no PTX.

    x  [M, N], 1 <= N <= 32, float32 or int32. Not differentiated; raises as `row_sum` does.
    """
    if not _checked("broadcast_first", x, (torch.float32, torch.int32), LANES) or lacking(x.device):
        return x[:, :1].expand(x.shape).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_broadcast(_neighbours(x), y)
    return y


def all_equal(x: torch.Tensor) -> torch.Tensor:
    """[M], bool: whether a row's numbers have all the same bits, by one `match.all.sync`; by torch without PTX.

    x  [M, N], 1 <= N <= 32, float32 or int32. -0.0 and 0.0 differ, NaNs of the same bits do not. Raises as `row_sum`.
    """
    if not _checked("all_equal", x, (torch.float32, torch.int32), LANES) or lacking(x.device):
        bits = x.contiguous().view(torch.int32)
        return (bits == bits[:, :1]).all(-1)
    y = torch.empty(x.shape[0], dtype=torch.bool, device=x.device)
    launch_match(_neighbours(x), y)
    return y


def _reduced(op, x, kind, launcher, dtypes=(torch.float32, torch.float16, torch.bfloat16, torch.int32), least=70):
    """`kind` of each row of x by `launcher`, or by `launch_rows` where there is no PTX of sm_`least`."""
    if not _checked(op, x, dtypes):
        return reference(x, kind)
    y = torch.empty(x.shape[0], dtype=torch.int32 if x.dtype == torch.int32 else torch.float32, device=x.device)
    (launch_rows if lacking(x.device, least) else launcher)(_neighbours(x), y, kind)
    return y


def _neighbours(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _checked(op: str, x: torch.Tensor, dtypes: tuple, most: int | None = None) -> bool:
    """Whether kernels run on x (see `on_triton`). Raises for what `op` does not take: rows of more than `most`, say."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: x is a {type(x).__name__}; give a torch.Tensor")
    if x.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: x has dtype {x.dtype}; convert it to one of {known}")
    if x.dim() != 2 or x.shape[1] < 1 or (most and x.shape[1] > most):
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; give rows [M, N] of 1 to {most or 'any'} numbers")
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{op}: x requires a gradient and there is no backward; use x.detach(), or x.sum(-1)")
    return on_triton(op, "x", x)
