"""RMSNorm: scale each row to unit root mean square, then by a learned weight (Zhang & Sennrich 2019, arXiv:1910.07467).

Forward, for a row x of N numbers:

    rstd  = 1 / sqrt(mean(x²) + eps)        one number a row
    x_hat = x * rstd
    y     = weight * x_hat

Backward. Given dy = ∂L/∂y, write wdy = weight * dy, which is ∂L/∂x_hat. An x_i reaches the loss twice: through its own
x_hat_i, and through rstd, which all of the row shares:

    ∂rstd/∂x_i    = -½ (mean(x²) + eps)^(-3/2) * 2 x_i / N  =  -rstd³ x_i / N  =  -rstd² x_hat_i / N
    ∂x_hat_j/∂x_i = rstd * [i = j]  +  x_j * ∂rstd/∂x_i     =  rstd * ([i = j] - x_hat_j x_hat_i / N)

Multiply by wdy_j and sum over j. The sum is the same for every i, so it is one number c a row:

    c  = mean(x_hat * wdy)
    dx = rstd * (wdy - x_hat * c)
    dweight = sum over rows of dy * x_hat

A check by geometry: without eps, dx is orthogonal to x in every row, because a longer x gives the same y.

Saved for the backward: x (the caller's own tensor, no copy), weight and rstd, 4 bytes a row. x_hat is recomputed: one
multiplication by the x that has to be read anyway, where saving it would write and read as much memory as x again.

Casts: every load is converted to fp32 at once and all arithmetic is fp32, so that 1e4² does not overflow in fp16; a
result is rounded once, when it is stored. Hugging Face's Llama, Mistral and Qwen round twice, x_hat and then its
product with weight: we can differ from them in the last bit, and have the smaller error bound. y and dx have x's dtype,
dweight has weight's. The forward's squares are rounded before they are added (enable_fp_fusion=False): a lane that
holds one number of a row would else add its own square unrounded to its neighbour's, and lanes would differ in rstd.
torch.compile leaves that out; there rstd may differ in its last bit.
"""

import functools
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from fastkit.kernels.common import Cost, as_rows, check_floats, device_of, fp32, on_triton, sm_count, tl, triton
from fastkit.kernels.fp8_scale import check_fp8, row_scale

MAX_BLOCK_N = 8192  # longer blocks run out of registers in the backward
MAX_N = 8 * MAX_BLOCK_N  # 65,536, longer than any model's rows


def cost(M: int, N: int, dtype=torch.bfloat16, weight_grad: bool = False) -> tuple[Cost, Cost]:
    """The least work for M rows of N numbers, x and weight of `dtype`: (forward, backward).

    The partial sums that our dweight goes through are our own choice and thus not counted.
    """
    x_bytes, weight_bytes, rstd_bytes = M * N * dtype.itemsize, N * dtype.itemsize, M * 4
    forward = Cost(
        bytes_moved=2 * x_bytes + weight_bytes + rstd_bytes,  # read x, weight; write y, rstd
        flops=4 * M * N,  # x * x, its sum, * rstd, * weight
    )
    backward = Cost(
        bytes_moved=3 * x_bytes + weight_bytes * (2 if weight_grad else 1) + rstd_bytes,  # read dy, x; write dx
        flops=(9 if weight_grad else 7) * M * N,  # x_hat, wdy, their product and its sum, dx 3; dweight 2
    )
    return forward, backward


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """The same in plain torch, with the same casts, differentiated by autograd. fp64 stays fp64: the tests' truth."""
    accurate = torch.promote_types(x.dtype, torch.float32)
    x_hat = x.to(accurate)
    x_hat = x_hat * torch.rsqrt(x_hat.square().mean(-1, keepdim=True) + eps)
    return (x_hat * weight.to(accurate)).to(x.dtype)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr,
    M, N, stride_xm, stride_ym, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_N columns of BLOCK_M rows. It reads x once and holds it in registers until y is known.

    The BLOCKS_N programs of a row longer than a block are neighbours, so they find each other's reads in the L2 cache.
    """
    tile, block = tl.program_id(0) // BLOCKS_N, tl.program_id(0) % BLOCKS_N
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]; rows * stride can pass 2**31
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_rows, in_cols = rows < M, cols < N
    mask = in_rows[:, None] & in_cols[None, :]
    x_rows = x_ptr + rows[:, None] * stride_xm

    x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    sum_sq = tl.sum(x * x, axis=1)  # [BLOCK_M]; masked lanes add 0
    for step in range(1, BLOCKS_N):  # the rest of a long row; compiled away when the row fits the block
        far_cols = (block + step) % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
        far_mask = in_rows[:, None] & (far_cols < N)[None, :]
        far_x = tl.load(x_rows + far_cols[None, :], mask=far_mask, other=0.0).to(tl.float32)
        sum_sq += tl.sum(far_x * far_x, axis=1)
    rstd = tl.rsqrt(sum_sq / N + fp32(eps))
    tl.store(rstd_ptr + rows, rstd, mask=in_rows & (block == 0))  # one writer a row

    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)  # [BLOCK_N]
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + rows[:, None] * stride_ym + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr, factor_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, dweight_partial_ptr, dx8_ptr, scale_ptr,
    M, N, stride_dym, stride_xm, stride_dresidualm, stride_dxm, stride_dx8m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_N columns of dx for row tiles i, i + walkers, ... and sums dweight over those rows.

    These may be None: factor [M], what dy's rows are yet to be multiplied by; dresidual, added to dx (see
    add_rms_norm.py); dweight_partial, [walkers, N] in fp32, a row of it for each walker; dx8 and scale [M], dx as
    fp8_rows.py writes it. No atomics: the order of the additions is fixed, and with it every bit of the result.
    """
    walkers = tl.num_programs(0) // BLOCKS_N
    walker, block = tl.program_id(0) // BLOCKS_N, tl.program_id(0) % BLOCKS_N
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_cols = cols < N
    if dweight_partial_ptr is not None:
        dweight = tl.zeros([BLOCK_N], tl.float32)

    for tile in tl.range(walker, tl.cdiv(M, BLOCK_M), walkers, num_stages=STAGES):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
        in_rows = rows < M
        mask = in_rows[:, None] & in_cols[None, :]
        x_rows = x_ptr + rows[:, None] * stride_xm
        dy_rows = dy_ptr + rows[:, None] * stride_dym

        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)[:, None]  # [BLOCK_M, 1]
        x_hat = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32) * rstd  # [BLOCK_M, BLOCK_N]
        dy = tl.load(dy_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if factor_ptr is not None:
            factor = tl.load(factor_ptr + rows, mask=in_rows, other=0.0)[:, None]
            dy *= factor
        # the same for every row, but to keep it would take registers from programs that could run beside this one
        weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)  # [BLOCK_N]
        if dresidual_ptr is not None:  # read now, that its bytes are under way while the row is summed
            dresidual_rows = dresidual_ptr + rows[:, None] * stride_dresidualm
            dresidual = tl.load(dresidual_rows + cols[None, :], mask=mask, other=0.0)
        wdy = dy * weight[None, :]
        c = tl.sum(x_hat * wdy, axis=1)  # [BLOCK_M]
        for step in range(1, BLOCKS_N):  # the rest of a long row, as in the forward
            far_cols = (block + step) % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
            far_mask = in_rows[:, None] & (far_cols < N)[None, :]
            far_x = tl.load(x_rows + far_cols[None, :], mask=far_mask, other=0.0).to(tl.float32)
            far_dy = tl.load(dy_rows + far_cols[None, :], mask=far_mask, other=0.0).to(tl.float32)
            if factor_ptr is not None:
                far_dy *= factor
            far_weight = tl.load(weight_ptr + far_cols, mask=far_cols < N, other=0.0).to(tl.float32)
            c += tl.sum(far_x * rstd * (far_dy * far_weight[None, :]), axis=1)
        c = (c / N)[:, None]  # [BLOCK_M, 1]
        dx = rstd * (wdy - x_hat * c)
        if dresidual_ptr is not None:
            dx += dresidual.to(tl.float32)
        tl.store(dx_ptr + rows[:, None] * stride_dxm + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dx8_ptr is not None:
            _store_fp8(dx.to(dx_ptr.dtype.element_ty), dx8_ptr, scale_ptr, rows, cols, stride_dx8m, mask, in_rows)
        if dweight_partial_ptr is not None:
            dweight += tl.sum(dy * x_hat, axis=0)

    if dweight_partial_ptr is not None:
        tl.store(dweight_partial_ptr + walker * N + cols, dweight, mask=in_cols)


@triton.jit
def _store_fp8(x, x8_ptr, scale_ptr, rows, cols, stride_x8m, mask, in_rows):
    """Store whole rows x, 0 where masked, in FP8."""
    x = x.to(tl.float32)
    scale, inverse = row_scale(tl.max(tl.abs(x), axis=1))
    x8 = (x * inverse[:, None]).to(x8_ptr.dtype.element_ty)
    tl.store(x8_ptr + rows[:, None] * stride_x8m + cols[None, :], x8, mask=mask)
    tl.store(scale_ptr + rows, scale, mask=in_rows)


def row_tiling(N: int) -> dict[str, int]:
    """Blocks and warps for rows of N numbers: 16 numbers a thread, two 128-bit loads in a 16-bit dtype.

    A block is a power of two, so rows of 576 leave 44% of its 1024 lanes idle. An idle lane moves no bytes, and bytes
    are what this kernel waits for; what it must not do is leave too few loads under way. Hence short rows share a
    program, at least 2048 lanes' worth of them.
    """
    BLOCK_N = min(1 << (N - 1).bit_length(), MAX_BLOCK_N)
    BLOCK_M = max(1, 2048 // BLOCK_N)
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "BLOCKS_N": -(-N // BLOCK_N),
        "num_warps": BLOCK_M * BLOCK_N // (16 * 32),
    }


def _dweight_tiling(N: int, lane_bytes: int) -> dict[str, int]:
    """The same for a backward that sums dweight and reads `lane_bytes` for each number that it writes.

    The sum takes registers, so few programs run side by side, and each must keep more loads under way: tiles to come
    are fetched into shared memory while one is worked on, at most two of them and as many as 32 KiB hold (48 with the
    weight's copies).
    """
    tiling = row_tiling(N)
    tile_bytes = tiling["BLOCK_M"] * tiling["BLOCK_N"] * lane_bytes
    return tiling | {"STAGES": 1 + min(2, 2**15 // tile_bytes)}


def launch_forward(x, weight, eps: float, y, rstd, **tiling) -> None:
    """Write y [M, N] and rstd [M] (fp32), given x [M, N]. Rows may be any stride apart, as `as_rows` returns them.

    `tiling` overrides BLOCK_M and num_warps.
    """
    M, N = x.shape
    if M == 0:
        return
    tiling = row_tiling(N) | tiling
    grid = (-(-M // tiling["BLOCK_M"]) * tiling["BLOCKS_N"],)
    with device_of(x):
        _forward_kernel[grid](
            x, weight, y, rstd, M, N, x.stride(0), y.stride(0), eps, enable_fp_fusion=False, **tiling
        )  # fmt: skip


def launch_backward(
    dy, x, weight, rstd, dx, weight_grad: bool, dresidual=None, factor=None, walkers: int | None = None, dx8=None,
    scale=None, **tiling,
) -> torch.Tensor | None:  # fmt: skip
    """Write dx [M, N]; return dweight [N] in weight's dtype if `weight_grad`, else None, with no work done for it.

    dresidual [M, N], if given, is added to dx, as add_rms_norm's backward needs it. dx may be dy or dresidual itself,
    which saves a buffer, as long as a row fits one block (N <= MAX_BLOCK_N). factor [M], if given, is what dy's rows
    are yet to be multiplied by. dx8 [M, N] and scale [M], if given and a row fits one block, are written too: dx in
    FP8, as fp8_rows.py writes it; raises NotImplementedError where there is none. `tiling` overrides BLOCK_M, num_warps
    and STAGES, and `walkers` how many programs share the rows.
    """
    if dx8 is not None:
        check_fp8("rms_norm", x.device)
    M, N = x.shape
    if M == 0:
        return torch.zeros_like(weight) if weight_grad else None
    if weight_grad:
        lane_bytes = x.element_size() * (2 if dresidual is None else 3)  # dy, x, dresidual
        tiling = _dweight_tiling(N, lane_bytes) | tiling
    else:
        tiling = row_tiling(N) | {"STAGES": 1} | tiling
    tiles = -(-M // tiling["BLOCK_M"])
    if walkers is None:  # with dweight two an SM, so that few partial sums are left to add; else each tile its own
        walkers = 2 * sm_count(x.device) if weight_grad else tiles
    walkers = min(walkers, tiles)
    dweight_partial = torch.empty(walkers, N, dtype=torch.float32, device=x.device) if weight_grad else None
    stride_dresidualm = 0 if dresidual is None else dresidual.stride(0)
    with device_of(x):
        _backward_kernel[(walkers * tiling["BLOCKS_N"],)](
            dy, factor, x, weight, rstd, dresidual, dx, dweight_partial, dx8, scale,
            M, N, dy.stride(0), x.stride(0), stride_dresidualm, dx.stride(0), 0 if dx8 is None else dx8.stride(0),
            **tiling,
        )  # fmt: skip
    return dweight_partial.sum(0).to(weight.dtype) if weight_grad else None


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    M, found = 8192, {}  # 4 sequences of 2,048 tokens
    for N in (4096, 5120):  # Mistral-7B and Llama-2-7B; Llama-2-13B, whose rows take the longest block
        dy, x, y = (torch.empty(M, N, dtype=dtype, device="meta") for _ in range(3))
        weight, rstd = torch.empty(N, dtype=dtype, device="meta"), torch.empty(M, device="meta")
        backward = functools.partial(launch_backward, dy, x, weight, rstd, y)
        found[f"forward {M}x{N}"] = functools.partial(launch_forward, x, weight, 1e-6, y, rstd)
        found[f"backward {M}x{N}"] = functools.partial(backward, weight_grad=False)
        found[f"backward with dweight {M}x{N}"] = functools.partial(backward, weight_grad=True)
    return found


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        weight = weight.contiguous()
        rows = as_rows(x)
        y = x.new_empty(x.shape)
        rstd = x.new_empty(rows.shape[0], dtype=torch.float32)
        launch_forward(rows, weight, eps, as_rows(y), rstd)
        ctx.save_for_backward(x, weight, rstd)  # x as it came: a copy made by as_rows is not kept alive
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        dweight = launch_backward(as_rows(dy), as_rows(x), weight, rstd, as_rows(dx), ctx.needs_input_grad[1])
        return dx, dweight, None


def check_rows(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise ValueError unless x has rows that the kernels can take, and weight a number for each of their columns."""
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_N:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}; rows of 1 to {MAX_N} numbers are supported, "
            "use torch.nn.functional.rms_norm for longer ones"
        )
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; x's rows need ({x.shape[-1]},)")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """weight * x / sqrt(mean(x²) + eps) over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    x        [..., N], float32, float16 or bfloat16, 1 <= N <= 65536. Contiguous tensors and column slices of them are
             read in place, other layouts copied first. Zero rows are fine.
    weight   [N], float32, float16 or bfloat16, not necessarily x's dtype. No work is done for its gradient unless it
             requires one.
    returns  [..., N], contiguous, in x's dtype. Arithmetic is fp32 with one rounding at the end; so under autocast.

    Differentiable once. Raises TypeError for another dtype, ValueError for shapes or devices that do not match or rows
    too long, NotImplementedError for a device without kernels. CPU tensors take `reference` (see `on_triton`).
    """
    check_floats("rms_norm", x=x, weight=weight)
    check_rows("rms_norm", x, weight)
    if not on_triton("rms_norm", "x", x):
        return reference(x, weight, eps)
    return _RMSNorm.apply(x, weight, float(eps))
