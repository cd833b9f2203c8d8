"""The gradients of LoRA adapters (Hu et al. 2021, arXiv:2106.09685): dA and dB of all that share an input.

Forward, for each adapter, with x [M, K], A [r, K], B [N, r] (`kernels/merged_dequantize.py` folds it into the weight):

    y = ... + scaling * (x @ A.T) @ B.T

Backward, given dy = ∂L/∂y [M, N]. y is linear in A and in B, so by the product rule

    xA  = x @ A.T       [M, r]          dB = scaling * dy.T @ xA    [N, r]
    dyB = dy @ B        [M, r]          dA = scaling * dyB.T @ x    [r, K]

Four skinny products: r is 16 where M, N, K are thousands, so each is bound by the reading of x or dy. Hence as few
readings as there can be, whatever the number of adapters: dA needs dyB, thus all of dy, and dB needs xA, thus all of x:

    1. x  gives xA of all adapters, their A stacked
    2. dy gives dB and dyB at once, for each adapter
    3. x  gives dA of all adapters

Passes 2 and 3 sum over the rows, which programs share out, and pass 2 over the columns too. A program writes its part
of a sum in fp32 and a small kernel adds the parts in their order: no atomics, the same bits every time. To write and
read dyB's parts costs 8 r / BLOCK_N bytes for each number of dy, which has 2 itself; above rank 32 a second reading is
cheaper and is what we do.

Casts: x and dy go to the tensor cores as they are. A and B, where they are of another dtype, and xA and dyB, which are
fp32, go there as a sum of two numbers of x's dtype, the rounded one and what rounding lost: two products for one, in
kernels that wait for memory, and errors of 2**-17 (bf16) where cuBLAS' bf16 intermediates have 2**-9. fp32 inputs are
multiplied as three TF32 products. Sums are fp32. dA and dB have the dtypes of A and B, rounded once.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from fastkit.kernels.common import Cost, architecture, as_rows, check_floats, device_of, on_triton, sm_count, tl, triton

MAX_RANK = 256
FUSED_RANK = 32  # up to which dB and dyB come of one reading of dy


def cost(M: int, K: int, Ns: Sequence[int], r: int, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16) -> Cost:
    """The least work for x [M, K] of `dtype` and adapters of rank r with outputs of `Ns` columns."""
    adapters = r * (K * len(Ns) + sum(Ns)) * adapter_dtype.itemsize
    return Cost(
        bytes_moved=M * (2 * K + sum(Ns)) * dtype.itemsize + 2 * adapters,  # read x twice, dy, A, B; write dA, dB
        flops=4 * M * r * (K * len(Ns) + sum(Ns)),
    )


def reference(x, dys, As, Bs, scalings) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same in plain torch, in fp32. fp64 stays fp64: the tests' truth."""
    accurate = torch.promote_types(x.dtype, torch.float32)
    M = x.shape[:-1].numel()
    rows, dAs, dBs = x.reshape(M, x.shape[-1]).to(accurate), [], []
    for dy, A, B, scaling in zip(dys, As, Bs, scalings, strict=True):
        dy = dy.reshape(M, dy.shape[-1]).to(accurate)
        dAs.append((scaling * ((dy @ B.to(accurate)).T @ rows)).to(A.dtype))
        dBs.append((scaling * (dy.T @ (rows @ A.to(accurate).T))).to(B.dtype))
    return dAs, dBs


@triton.jit
def _dot(x, y, accumulator, PRECISION: tl.constexpr):
    """accumulator + x @ y. y of another dtype, fp32 that is, goes as a sum of two numbers of x's."""
    if y.dtype == x.dtype:
        accumulator = tl.dot(x, y, accumulator, input_precision=PRECISION)
    else:
        y = y.to(tl.float32)
        high = y.to(x.dtype)
        low = (y - high.to(tl.float32)).to(x.dtype)
        accumulator = tl.dot(x, low, accumulator, input_precision=PRECISION)
        accumulator = tl.dot(x, high, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def _project_kernel(
    x_ptr, a_ptr, xa_ptr,
    M, K, R, stride_xm, stride_ar, stride_ak, stride_xam, scaling,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_R columns of BLOCK_M rows of scaling * x @ A.T. Those that share rows are neighbours."""
    blocks_r = tl.cdiv(R, BLOCK_R)
    rows = (tl.program_id(0) // blocks_r).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]; * stride: 2**31
    r = tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    xa = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
        mask = (r < R)[:, None] & (cols < K)[None, :]
        a = tl.load(a_ptr + r[:, None] * stride_ar + cols[None, :] * stride_ak, mask=mask, other=0.0)
        xa = _dot(x, tl.trans(a), xa, PRECISION)
    tl.store(
        xa_ptr + rows[:, None] * stride_xam + r[None, :], scaling * xa, mask=(rows < M)[:, None] & (r < R)[None, :]
    )


@triton.jit
def _reduce_kernel(
    y_ptr, z_ptr, b_ptr, yz_ptr, yb_ptr,
    M, N, R, stride_ym, stride_zm, stride_bn, stride_yzn, stride_yzr,
    PROJECT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """From one reading of y [M, N]: parts of y.T @ z and, if PROJECT, of y @ b.

    Program (split, block) takes BLOCK_N columns of y in every `splits`-th tile of BLOCK_M rows. It writes yz [splits,
    N, R], or [splits, R, N], a sum over its rows, and yb [blocks, M, R], a sum over its columns. z and both sums are
    fp32.
    """
    blocks_n, blocks_r = tl.cdiv(N, BLOCK_N), tl.cdiv(R, BLOCK_R)
    splits = tl.num_programs(0) // (blocks_n * blocks_r)
    r = tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    block = tl.program_id(0) // blocks_r % blocks_n
    split = tl.program_id(0) // (blocks_r * blocks_n)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_cols, in_rank = cols < N, r < R
    if PROJECT:
        b = tl.load(b_ptr + cols[:, None] * stride_bn + r[None, :], mask=in_cols[:, None] & in_rank[None, :], other=0.0)
    yz = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)

    for tile in range(split, tl.cdiv(M, BLOCK_M), splits):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
        in_rows = rows < M
        y = tl.load(
            y_ptr + rows[:, None] * stride_ym + cols[None, :], mask=in_rows[:, None] & in_cols[None, :], other=0.0
        )
        mask = in_rows[:, None] & in_rank[None, :]
        z = tl.load(z_ptr + rows[:, None] * stride_zm + r[None, :], mask=mask, other=0.0)
        yz = _dot(tl.trans(y), z, yz, PRECISION)  # the long side as the tensor cores' rows
        if PROJECT:
            yb = _dot(y, b, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), PRECISION)
            tl.store(yb_ptr + (block.to(tl.int64) * M + rows[:, None]) * R + r[None, :], yb, mask=mask)

    out = yz_ptr + split.to(tl.int64) * N * R + cols[:, None] * stride_yzn + r[None, :] * stride_yzr
    tl.store(out, yz, mask=in_cols[:, None] & in_rank[None, :])


@triton.jit
def _sum_kernel(
    parts_ptr, out_ptr,
    size, N, parts, stride_outm, scaling,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK of the `size` numbers of out [M, N] = scaling * the sum of [parts, M, N], in order."""
    numbers = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = numbers < size
    total = tl.zeros([BLOCK], tl.float32)
    part_ptr = parts_ptr + numbers
    for _ in range(parts):
        total += tl.load(part_ptr, mask=mask, other=0.0)
        part_ptr += size
    out = out_ptr + numbers // N * stride_outm + numbers % N
    tl.store(out, (scaling * total).to(out_ptr.dtype.element_ty), mask=mask)


def _precision(arch: str) -> str:
    """How fp32 numbers are multiplied. Raises NotImplementedError where Triton has no tensor cores."""
    if arch == "sm_75":
        raise NotImplementedError("lora_gradients needs Triton's tensor cores, sm_80: use torch.matmul")
    return "ieee" if arch.startswith("gfx") else "tf32x3"


def _block_r(R: int) -> int:
    return min(64, max(16, 1 << (R - 1).bit_length()))


def launch_project(x, A, xA, scaling: float = 1.0, **tiling) -> None:
    """Write xA [M, R], fp32, = scaling * x @ A.T, given x [M, K], rows any stride apart, and A [R, K] of any strides.

    `tiling` overrides BLOCK_M, BLOCK_K, BLOCK_R, num_warps and num_stages.
    """
    (M, K), R = x.shape, A.shape[0]
    arch = architecture(x.device)
    precision = _precision(arch)
    BLOCK_K = 32 if x.element_size() == 4 or arch.startswith("gfx") else 128
    tiling = {"BLOCK_M": 64, "BLOCK_K": BLOCK_K, "BLOCK_R": _block_r(R), "num_warps": 4, "num_stages": 3} | tiling
    grid = (-(-M // tiling["BLOCK_M"]) * -(-R // tiling["BLOCK_R"]),)
    with device_of(x):
        _project_kernel[grid](
            x, A, xA, M, K, R, x.stride(0), A.stride(0), A.stride(1), xA.stride(0), scaling,
            PRECISION=precision, **tiling,
        )  # fmt: skip


def _reduce_tiling(x: torch.Tensor, R: int, N: int, arch: str) -> dict[str, int]:
    """The sum [BLOCK_N, BLOCK_R] stays in registers, 32 a thread, and tiles of y in shared memory while others load."""
    amd, roomy = arch.startswith("gfx"), arch in ("sm_90", "sm_100")
    # 227 KiB of shared memory and 163; 99 elsewhere; 64 and no spare registers on AMD
    numbers = 1024 if amd else 8192 if roomy or arch == "sm_80" else 4096
    BLOCK_R = _block_r(R)
    BLOCK_N = min(numbers * 2 // x.element_size() // BLOCK_R, max(64, 1 << (N - 1).bit_length()))
    return {
        "BLOCK_M": 64 if x.element_size() == 2 and (BLOCK_R < 64 or roomy) and not amd else 32,
        "BLOCK_N": BLOCK_N,
        "BLOCK_R": BLOCK_R,
        "num_warps": 8 if BLOCK_N * BLOCK_R > 4096 else 4,
        "num_stages": 3 if roomy else 2,
    }


def launch_reduce(
    y, z, b=None, transposed: bool = False, splits: int | None = None, **tiling
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Parts of y.T @ z, [splits, N, R], or [splits, R, N] if `transposed`, and of y @ b, [blocks, M, R]; all fp32.

    y [M, N], z [M, R], fp32, and b [N, R] have neighbours in their rows; without b there is no second result. `splits`
    is how many programs share out the rows; by default so many that every SM has one, or two small ones. `tiling`
    overrides BLOCK_M and so on.
    """
    (M, N), R = y.shape, z.shape[1]
    arch = architecture(y.device)
    precision = _precision(arch)
    tiling = _reduce_tiling(y, R, N, arch) | tiling
    blocks_n, blocks_r = -(-N // tiling["BLOCK_N"]), -(-R // tiling["BLOCK_R"])
    if splits is None:
        tiles = -(-M // tiling["BLOCK_M"])
        splits = max(1, min(tiles, sm_count(y.device) * (8 // tiling["num_warps"]) // (blocks_n * blocks_r)))
    yz = torch.empty((splits, R, N) if transposed else (splits, N, R), device=y.device)
    yb = None if b is None else torch.empty(blocks_n, M, R, device=y.device)
    with device_of(y):
        _reduce_kernel[(splits * blocks_n * blocks_r,)](
            y, z, b, yz, yb, M, N, R, y.stride(0), z.stride(0), 0 if b is None else b.stride(0),
            1 if transposed else R, N if transposed else 1, PROJECT=b is not None, PRECISION=precision, **tiling,
        )  # fmt: skip
    return yz, yb


def launch_sum(parts, out, scaling: float, BLOCK: int = 1024) -> None:
    """Write out [M, N], rows any stride apart, = scaling * the sum of parts [parts, M, N]."""
    size = out.numel()
    with device_of(out):
        _sum_kernel[(-(-size // BLOCK),)](
            parts, out, size, out.shape[1], parts.shape[0], out.stride(0), scaling, BLOCK, num_warps=4
        )


def launch(x, dys, A, Bs, scalings, dA, dBs) -> None:
    """Write dA [R, K] and each dBs[i] [N_i, r_i], where A [R, K] stacks the A of all adapters, R = sum of r_i.

    x [M, K] and dys[i] [M, N_i] of one dtype, Bs[i] [N_i, r_i]; all with neighbours in their rows.
    """
    M, R = x.shape[0], A.shape[0]
    xA, dyB = (torch.empty(M, R, device=x.device) for _ in range(2))
    launch_project(x, A, xA)
    start = 0
    for dy, B, scaling, dB in zip(dys, Bs, scalings, dBs, strict=True):
        r = slice(start, start := start + B.shape[1])
        fused = B.shape[1] <= FUSED_RANK
        dB_parts, dyB_parts = launch_reduce(dy, xA[:, r], B if fused else None)
        launch_sum(dB_parts, dB, scaling)
        if fused:
            launch_sum(dyB_parts, dyB[:, r], scaling)
        else:
            launch_project(dy, B.T, dyB[:, r], scaling)
    launch_sum(launch_reduce(x, dyB, transposed=True)[0], dA, 1.0)


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    M, K, N, r = 8192, 4096, 14336, 16  # Mistral-7B, 4 sequences of 2,048 tokens: gate and up
    empty = functools.partial(torch.empty, device="meta")
    x, dy, xA = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype), empty(M, 2 * r)
    A, B = empty(2 * r, K, dtype=dtype), empty(N, r, dtype=dtype)
    found = {
        f"x @ A.T {M}x{K}, rank {2 * r}": functools.partial(launch_project, x, A, xA),
        f"dB and dy @ B {M}x{N}, rank {r}": functools.partial(launch_reduce, dy, xA[:, :r], B, splits=4),
        f"dA {M}x{K}, rank {2 * r}": functools.partial(launch_reduce, x, xA, transposed=True, splits=8),
        f"sum of 28 parts {M}x{r}": functools.partial(launch_sum, empty(28, M, r), xA[:, :r], 2.0),
    }
    high = empty(M, 256)
    return found | {
        f"x @ A.T {M}x{K}, rank 256": functools.partial(launch_project, x, empty(256, K, dtype=dtype), high),
        f"dB {M}x{N}, rank 256": functools.partial(launch_reduce, dy, high, splits=4),
    }


def _with_torch(x, dys, As, Bs, scalings) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For GPUs without tensor cores that Triton can use: cuBLAS, in the dtype of x."""
    dAs, dBs = [], []
    for dy, A, B, scaling in zip(dys, As, Bs, scalings, strict=True):
        dAs.append((scaling * ((dy @ B.to(x.dtype)).T @ x)).to(A.dtype))
        dBs.append((scaling * (dy.T @ (x @ A.to(x.dtype).T))).to(B.dtype))
    return dAs, dBs


def _check(x, dys, As, Bs, scalings) -> None:
    if not len(dys) == len(As) == len(Bs) == len(scalings) >= 1:
        counts = f"{len(dys)} dys, {len(As)} As, {len(Bs)} Bs, {len(scalings)} scalings"
        raise ValueError(f"lora_gradients: there are {counts}; give one of each for every adapter")
    named = {f"{name}[{i}]": t for name, ts in (("dys", dys), ("As", As), ("Bs", Bs)) for i, t in enumerate(ts)}
    check_floats("lora_gradients", x=x, **named)
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
    scalings: Sequence[float],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """(dAs, dBs): the gradients of LoRA adapters that share the input x, such as q, k and v (arXiv:2106.09685).

    x         [..., K], float32, float16 or bfloat16
    dys       for each adapter ∂L/∂y [..., N_i], of x's dtype
    As, Bs    [r_i, K] and [N_i, r_i], float32, float16 or bfloat16, r_i from 1 to 256
    scalings  numbers, alpha / r
    returns   lists of tensors like As and Bs, contiguous

    x is read twice and each dy once (twice above rank 32), in place if its rows are contiguous, however far apart;
    other layouts are copied first. Zero rows are fine. No gradient of the gradients: the inputs are taken as constants.

    Raises TypeError for another dtype or dys of another than x's, ValueError for shapes or devices that do not match,
    NotImplementedError for a device without kernels. CPU tensors take `reference` (see `on_triton`), GPUs before sm_80
    torch's products in the dtype of x.
    """
    _check(x, dys, As, Bs, scalings)
    with torch.no_grad():
        kernels = all(on_triton("lora_gradients", "x", t) for t in (x, *As, *Bs))  # bf16 on a CPU: none
        if not kernels or 0 in (x.numel(), *(dy.numel() for dy in dys)):
            return reference(x, dys, As, Bs, scalings)
        x, dys = as_rows(x), [as_rows(dy) for dy in dys]
        if architecture(x.device) == "sm_75":
            return _with_torch(x, dys, As, Bs, scalings)
        dBs = [torch.empty(B.shape, dtype=B.dtype, device=x.device) for B in Bs]
        stacked = As[0] if len(As) == 1 else torch.cat(list(As))
        dA = torch.empty(stacked.shape, dtype=stacked.dtype, device=x.device)
        launch(x, dys, stacked, [B if B.stride(1) == 1 else B.contiguous() for B in Bs], scalings, dA, dBs)
        return [part.to(A.dtype) for part, A in zip(dA.split([len(A) for A in As]), As, strict=True)], dBs
