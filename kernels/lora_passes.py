"""What `kernels/lora.py` launches: passes over x and dy, whose programs leave parts of sums, and the sums of these.

The parts are added in the order of their numbers: no atomics, the same bits every time. An intermediate result of a
16-bit x is written as the sum of `terms` = 2 numbers of x's dtype, the rounded one and what rounding lost; of an fp32
one as it is, terms = 1. So it goes from memory to the tensor cores as it lies there, without a detour by registers.
Where there is rstd, it is multiplied before that, in fp32.

On sm_90 the parts of what lora_hopper.py takes are its own.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from fastkit.kernels import lora_hopper
from fastkit.kernels.common import architecture, device_of, fp32, sm_count, tl, triton

GROUP = 3  # adapters of one launch, such as q, k and v
LARGE = ("sm_80", "sm_90", "sm_100")  # of shared memory: 163 KiB and 227, where others have 99
FUSED_RANK = 32  # up to which dB and dyB come of one reading of dy


@triton.jit
def _pick(index, first, second, third):
    return tl.where(index == 0, first, tl.where(index == 1, second, third))


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
def _store_terms(ptr, stride_t, number, mask, TERMS: tl.constexpr):
    """Store `number`, fp32, as the sum of TERMS numbers of ptr's dtype, stride_t apart."""
    for term in tl.static_range(TERMS):
        rounded = number.to(ptr.dtype.element_ty)
        tl.store(ptr + term * stride_t, rounded, mask=mask)
        number -= rounded.to(tl.float32)


@triton.jit
def _project_kernel(
    x_ptr, a_ptr, xa_ptr, rstd_ptr,
    M, K, R, stride_xm, stride_ar, stride_ak, stride_xat, stride_xam,
    TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_R columns of BLOCK_M rows of rstd * x @ A.T. Those that share rows are neighbours."""
    blocks_r = tl.cdiv(R, BLOCK_R)
    rows = (tl.program_id(0) // blocks_r).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]; * stride: 2**31
    r = tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    xa = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        x_mask, a_mask = (rows < M)[:, None] & (cols < K)[None, :], (r < R)[:, None] & (cols < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=x_mask, other=0.0)
        a = tl.load(a_ptr + r[:, None] * stride_ar + cols[None, :] * stride_ak, mask=a_mask, other=0.0)
        xa = _dot(x, tl.trans(a), xa, PRECISION)
    if rstd_ptr is not None:
        xa *= tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
    mask = (rows < M)[:, None] & (r < R)[None, :]
    _store_terms(xa_ptr + rows[:, None] * stride_xam + r[None, :], stride_xat, xa, mask, TERMS)


@triton.jit
def _reduce_kernel(
    y0_ptr, y1_ptr, y2_ptr, z_ptr, b_ptr, yz_ptr, yb_ptr,
    M, N0, N1, N2, R, stride_y0m, stride_y1m, stride_y2m, stride_zt, stride_zm, stride_bn,
    stride_yzs, stride_yzn, stride_yzr,
    TERMS: tl.constexpr, PROJECT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """From one reading of each y [M, N]: parts of y.T @ z and, if PROJECT, of y @ b; z's columns and b's rows by turns.

    Program (split, block) takes BLOCK_N columns of a y in every `splits`-th tile of BLOCK_M rows. It writes yz [splits,
    N0 + N1 + N2, R], or what the strides say, a sum over its rows, and yb [blocks, M, R], a sum over its columns.
    """
    blocks0, blocks1 = tl.cdiv(N0, BLOCK_N), tl.cdiv(N1, BLOCK_N)
    blocks_n, blocks_r = blocks0 + blocks1 + tl.cdiv(N2, BLOCK_N), tl.cdiv(R, BLOCK_R)
    splits = tl.num_programs(0) // (blocks_n * blocks_r)
    r = tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    block = tl.program_id(0) // blocks_r % blocks_n
    split = tl.program_id(0) // (blocks_r * blocks_n)

    i = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)  # which y
    y_ptr, stride_ym = _pick(i, y0_ptr, y1_ptr, y2_ptr), _pick(i, stride_y0m, stride_y1m, stride_y2m)
    cols = (block - _pick(i, 0, blocks0, blocks0 + blocks1)) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_cols, in_rank = cols < _pick(i, N0, N1, N2), r < R
    b_rows = _pick(i, 0, N0, N0 + N1) + cols  # [BLOCK_N]
    if PROJECT:
        b_mask = in_cols[:, None] & in_rank[None, :]
        b = tl.load(b_ptr + b_rows[:, None] * stride_bn + r[None, :], mask=b_mask, other=0.0)
    yz = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)

    for tile in range(split, tl.cdiv(M, BLOCK_M), splits):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
        y_mask, z_mask = (rows < M)[:, None] & in_cols[None, :], (rows < M)[:, None] & in_rank[None, :]
        y = tl.load(y_ptr + rows[:, None] * stride_ym + cols[None, :], mask=y_mask, other=0.0)
        for term in tl.static_range(TERMS):
            z_rows = z_ptr + term * stride_zt + rows[:, None] * stride_zm
            z = tl.load(z_rows + (i * R + r)[None, :], mask=z_mask, other=0.0)
            yz = tl.dot(tl.trans(y), z, yz, input_precision=PRECISION)  # the long side as the tensor cores' rows
        if PROJECT:
            yb = _dot(y, b, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), PRECISION)
            tl.store(yb_ptr + (block.to(tl.int64) * M + rows[:, None]) * R + r[None, :], yb, mask=z_mask)

    out = yz_ptr + split.to(tl.int64) * stride_yzs + b_rows[:, None] * stride_yzn + r[None, :] * stride_yzr
    tl.store(out, yz, mask=in_cols[:, None] & in_rank[None, :])


@triton.jit
def _sum(parts_ptr, numbers, mask, size, parts, BLOCK_P: tl.constexpr):
    """[BLOCK]: the sum of parts [parts, size] at `numbers`, BLOCK_P of them on their way at a time."""
    total = tl.zeros_like(numbers).to(tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = (start + tl.arange(0, BLOCK_P)).to(tl.int64)  # [BLOCK_P]
        tile_mask = (part < parts)[:, None] & mask[None, :]
        total += tl.sum(tl.load(parts_ptr + part[:, None] * size + numbers[None, :], mask=tile_mask, other=0.0), axis=0)
    return total


@triton.jit
def _add_columns_kernel(
    yb_ptr, dyb_ptr, rstd_ptr,
    size, blocks0, blocks1, blocks2, stride_t, stride_m,
    R: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK of the `size` = M * R numbers of one adapter's dyB: rstd times the sum of its blocks."""
    programs = tl.cdiv(size, BLOCK)
    i = (tl.program_id(0) // programs).to(tl.int32)  # the adapter
    numbers = (tl.program_id(0) % programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = numbers < size
    first = _pick(i, 0, blocks0, blocks0 + blocks1).to(tl.int64)
    total = _sum(yb_ptr + first * size, numbers, mask, size, _pick(i, blocks0, blocks1, blocks2), BLOCK_P)
    if rstd_ptr is not None:
        total *= tl.load(rstd_ptr + numbers // R, mask=mask, other=0.0)
    _store_terms(dyb_ptr + numbers // R * stride_m + i * R + numbers % R, stride_t, total, mask, TERMS)


@triton.jit
def _add_rows_kernel(
    da_parts_ptr, db_parts_ptr, da_ptr, db_ptr, weight_ptr,
    K, da_size, db_size, da_parts, db_parts, da_each, db_end0, db_end1, scaling0, scaling1, scaling2,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK numbers of dA or of dB: the sum of its parts, times the scaling of their adapter.

    An adapter has da_each numbers of dA, rows of K, whose columns are multiplied by weight, if it is not None; of dB
    the first's end at db_end0 and the second's at db_end1.
    """
    programs = tl.cdiv(da_size, BLOCK)
    if tl.program_id(0) < programs:
        numbers = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        total = _sum(da_parts_ptr, numbers, numbers < da_size, da_size, da_parts, BLOCK_P)
        if weight_ptr is not None:
            total *= tl.load(weight_ptr + numbers % K).to(tl.float32)
        scaling = _pick(numbers // da_each, fp32(scaling0), fp32(scaling1), fp32(scaling2))
        tl.store(da_ptr + numbers, (scaling * total).to(da_ptr.dtype.element_ty), mask=numbers < da_size)
    else:
        numbers = (tl.program_id(0) - programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = _sum(db_parts_ptr, numbers, numbers < db_size, db_size, db_parts, BLOCK_P)
        i = (numbers >= db_end0).to(tl.int32) + (numbers >= db_end1).to(tl.int32)
        scaling = _pick(i, fp32(scaling0), fp32(scaling1), fp32(scaling2))
        tl.store(db_ptr + numbers, (scaling * total).to(db_ptr.dtype.element_ty), mask=numbers < db_size)


def _precision(arch: str) -> str:
    """How fp32 numbers are multiplied. Raises NotImplementedError where Triton has no tensor cores."""
    if arch == "sm_75":
        raise NotImplementedError("lora_gradients needs Triton's tensor cores, sm_80: use torch.matmul")
    return "ieee" if arch.startswith("gfx") else "tf32x3"


def _block_r(R: int, itemsize: int) -> int:
    return min(128 // itemsize, max(16, 1 << (R - 1).bit_length()))


def launch_project(x, A, xA, rstd=None, **tiling) -> None:
    """Write xA [terms, M, R] = x @ A.T, times rstd [M] if given; x [M, K] has any row stride, A [R, K] any strides.

    `tiling` overrides BLOCK_M, BLOCK_K, BLOCK_R, num_warps and num_stages.
    """
    (M, K), R = x.shape, A.shape[0]
    arch = architecture(x.device)
    precision, itemsize, BLOCK_R = _precision(arch), x.element_size(), _block_r(R, x.element_size())
    amd = arch.startswith("gfx")  # there, and in fp32, tiles pass through registers, as an A of another dtype does
    small = amd or itemsize == 4
    BLOCK_K = 32 if small else 128 if A.dtype == x.dtype and arch in LARGE else 64
    stage = BLOCK_K * (64 * itemsize + BLOCK_R * A.element_size())
    split = 0 if A.dtype == x.dtype else 2 * BLOCK_K * BLOCK_R * itemsize
    stages = max(1, min(2 if amd else 5, (_shared_bytes(arch) - split) // stage))
    tiling = {
        "BLOCK_M": 64,
        "BLOCK_K": BLOCK_K,
        "BLOCK_R": BLOCK_R,
        "num_warps": 8 if small else 4,
        "num_stages": stages,
    } | tiling
    grid = (-(-M // tiling["BLOCK_M"]) * -(-R // tiling["BLOCK_R"]),)
    with device_of(x):
        _project_kernel[grid](
            x, A, xA, rstd, M, K, R, x.stride(0), A.stride(0), A.stride(1), xA.stride(0), xA.stride(1),
            TERMS=xA.shape[0], PRECISION=precision, **tiling,
        )  # fmt: skip


def _shared_bytes(arch: str) -> int:
    """Of shared memory, for tiles under way, with 4 KiB to spare."""
    kib = {"sm_80": 163, "sm_90": 227, "sm_100": 163}.get(arch, 64 if arch.startswith("gfx") else 99)
    return (kib - 4) * 1024  # sm_100 has 227, of which a transposed tile takes some as well


def _reduce_tiling(y: torch.Tensor, R: int, N: int, terms: int, b_itemsize: int, arch: str) -> dict[str, int]:
    """The sum [BLOCK_N, BLOCK_R] stays in registers. Tiles are as wide as lets three be in shared memory: one in use,
    two under way. In fp32, and on AMD, they pass through registers, and are smaller."""
    itemsize, amd, large = y.element_size(), arch.startswith("gfx"), arch in LARGE
    BLOCK_R, BLOCK_M = _block_r(R, itemsize), 64 if itemsize == 2 and not amd else 16
    numbers = 16384 if large and BLOCK_R == 64 else 8192 if large else 4096
    BLOCK_N = 32 if amd else 64 if itemsize == 4 else min(numbers // BLOCK_R, max(64, 1 << (N - 1).bit_length()))
    while True:
        stage = BLOCK_M * (BLOCK_N + terms * BLOCK_R) * itemsize
        stages = (_shared_bytes(arch) - BLOCK_N * BLOCK_R * max(b_itemsize, itemsize)) // stage
        if stages >= 3 or BLOCK_N <= 64:
            break
        BLOCK_N //= 2
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "BLOCK_R": BLOCK_R,
        "num_warps": 4 if itemsize == 2 and not (amd or large) else 8,
        "num_stages": max(1, min(2 if amd else 4, stages)),
    }


def launch_reduce(
    ys: Sequence[torch.Tensor], z, B=None, transposed: bool = False, splits: int | None = None, **tiling
) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
    """(yz, yb, blocks): parts of each y.T @ its columns of z, and of each y @ its rows of B, all in fp32.

    ys      up to GROUP of one dtype, [M, N_i]; neighbours in their rows, which may be any stride apart
    z       [terms, M, n * R] for n ys
    B       [N, R], N the sum of N_i; None: no yb
    yz      [splits, N, R], or [splits, R, N] if `transposed`
    yb      [blocks, M, R], of which ys[i] has blocks[i], one after the other
    splits  how many programs share out the rows; by default so many that every SM has one, or two small ones

    `tiling` overrides BLOCK_M and so on.
    """
    n, M, Ns = len(ys), ys[0].shape[0], [y.shape[1] for y in ys]
    N, R, arch = sum(Ns), z.shape[2] // n, architecture(z.device)
    precision = _precision(arch)
    tiling = _reduce_tiling(ys[0], R, max(Ns), z.shape[0], 0 if B is None else B.element_size(), arch) | tiling
    blocks, blocks_r = [-(-size // tiling["BLOCK_N"]) for size in Ns], -(-R // tiling["BLOCK_R"])
    if splits is None:
        tiles = -(-M // tiling["BLOCK_M"])
        splits = max(1, min(tiles, sm_count(z.device) * (8 // tiling["num_warps"]) // (sum(blocks) * blocks_r)))
    yz = torch.empty((splits, R, N) if transposed else (splits, N, R), device=z.device)
    yb = None if B is None else torch.empty(sum(blocks), M, R, device=z.device)
    y0, y1, y2 = (*ys, *ys[:1] * (GROUP - n))
    with device_of(z):
        _reduce_kernel[(splits * sum(blocks) * blocks_r,)](
            y0, y1, y2, z, B, yz, yb,
            M, *Ns, *[0] * (GROUP - n), R, y0.stride(0), y1.stride(0), y2.stride(0), z.stride(0), z.stride(1),
            0 if B is None else B.stride(0), N * R, 1 if transposed else R, N if transposed else 1,
            TERMS=z.shape[0], PROJECT=B is not None, PRECISION=precision, **tiling,
        )  # fmt: skip
    return yz, yb, blocks


def launch_add_columns(yb, blocks: Sequence[int], dyB, rstd=None, **tiling) -> None:
    """Write dyB [terms, M, n * R], given yb and blocks as of `launch_reduce` for n ys; rstd as of launch_project."""
    _, M, R = yb.shape
    tiling = {"BLOCK": 256, "BLOCK_P": 8, "num_warps": 2} | tiling
    with device_of(yb):
        _add_columns_kernel[(len(blocks) * -(-M * R // tiling["BLOCK"]),)](
            yb, dyB, rstd, M * R, *blocks, *[0] * (GROUP - len(blocks)), dyB.stride(0), dyB.stride(1),
            R=R, TERMS=dyB.shape[0], **tiling,
        )  # fmt: skip


def launch_add_rows(dA_parts, dB_parts, dA, dB, Ns, scalings: Sequence[float], weight=None, **tiling) -> None:
    """Write dA [n * R, K], times weight [K] if given, and dB [N, R] of n adapters, given their parts [splits, ...]."""
    n, R = len(Ns), dB.shape[1]
    tiling = {"BLOCK": 256, "BLOCK_P": 8, "num_warps": 2} | tiling
    ends = [sum(Ns[: i + 1]) * R for i in range(GROUP - 1)]
    with device_of(dA):
        _add_rows_kernel[(-(-dA.numel() // tiling["BLOCK"]) - (-dB.numel() // tiling["BLOCK"]),)](
            dA_parts, dB_parts, dA, dB, weight,
            dA.shape[1], dA.numel(), dB.numel(), dA_parts.shape[0], dB_parts.shape[0], dA.numel() // n, *ends,
            *map(float, scalings), *[0.0] * (GROUP - n), **tiling,
        )  # fmt: skip


def launch(x, dys, A, B, scalings, dA, dB, rstd=None, weight=None) -> None:
    """Write dA and dB, like A [n * R, K] and B [N, R] in shape, which stack those of n adapters, up to GROUP.

    x [M, K] and dys[i] [M, N_i] are of one dtype, N is the sum of N_i; all have neighbours in their rows.
    With rstd [M], fp32, and weight [K] the input is rstd * x * weight, see lora.py.
    """
    if weight is not None:
        A = torch.mul(A, weight, out=torch.empty_like(A, dtype=torch.promote_types(A.dtype, x.dtype)))
    R, Ns = B.shape[1], [dy.shape[1] for dy in dys]
    if lora_hopper.takes(architecture(x.device), x, dys, A, B):
        launch_add_rows(*lora_hopper.launch(x, dys, A, B, rstd), dA, dB, Ns, scalings, weight)
        return
    terms, dtype = (2, x.dtype) if x.element_size() == 2 else (1, torch.float32)
    xA, dyB = torch.empty(2, terms, x.shape[0], A.shape[0], dtype=dtype, device=x.device)
    launch_project(x, A, xA, rstd)
    fused = R <= FUSED_RANK
    dB_parts, dyB_parts, blocks = launch_reduce(dys, xA, B if fused else None)
    if fused:
        launch_add_columns(dyB_parts, blocks, dyB, rstd)
    else:
        for i, (dy, rows) in enumerate(zip(dys, B.split(Ns), strict=True)):
            launch_project(dy, rows.T, dyB[:, :, i * R : (i + 1) * R], rstd)
    launch_add_rows(launch_reduce([x], dyB, transposed=True)[0], dB_parts, dA, dB, Ns, scalings, weight)


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    M, K, N, r = 8192, 4096, 14336, 16  # Mistral-7B, 4 sequences of 2,048 tokens: gate and up
    empty = functools.partial(torch.empty, device="meta")
    found = {}
    for name, kind, rank in (("", dtype, r), (", fp32 adapters", torch.float32, r), (", rank 256", dtype, 256)):
        x, dy, z = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype), empty(2, M, 2 * rank, dtype=dtype)
        A, B = empty(2 * rank, K, dtype=kind), empty(2 * N, rank, dtype=kind)
        rows = functools.partial(launch_reduce, [dy, dy], z, B if rank <= FUSED_RANK else None, splits=2)
        found |= {
            f"x @ A.T {M}x{K}{name}": functools.partial(launch_project, x, A, z),
            f"dB, dy @ B {M}x2x{N}{name}": rows,
            f"dA {M}x{K}{name}": functools.partial(launch_reduce, [x], z, transposed=True, splits=8),
        }
    yb, dA, dB = empty(56, M, r), empty(2 * r, K, dtype=dtype), empty(2 * N, r, dtype=dtype)
    dyB, parts = empty(2, M, 2 * r, dtype=dtype), (empty(8, 2 * r, K), empty(2, 2 * N, r))
    return found | {
        f"sum of dy @ B {M}x2x{r}": functools.partial(launch_add_columns, yb, [28, 28], dyB),
        "sums of dA and dB": functools.partial(launch_add_rows, *parts, dA, dB, [N, N], [2.0, 2.0]),
    }
