"""Attention, forward: the kernel that `attention` launches, and what it shares with the backward's.

What is computed, and why so, stands in attention.py. Here: how the work is cut.

A program owns BLOCK_M queries of one head and walks over the keys that they see, BLOCK_N at a time. Keys that all of
its queries see need no mask, and they are nearly all: only the blocks across the diagonal, a window's far edge or a
sequence's end pay for one. Keys that none of them sees are never read.

K and V come by pointers or, on sm_90 and later, as whole tiles by the copy engine (TMA), which frees the registers and
instructions that would compute addresses. TMA fills with zeros what lies beyond a tensor's end; in a packed batch a
sequence ends inside the tensor, where it cannot, and 0 * nan of a neighbour would be nan: packed batches take pointers.

On sm_90 what needs neither a window nor packing is attention_hopper.py's, where the head's size allows.
"""

import functools
import math
from collections.abc import Callable

import torch

from fastkit.kernels import attention_hopper
from fastkit.kernels.common import architecture, device_of, fp32, tl, triton

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None  # Triton is missing and `on_triton` sees to it that nothing is launched

MAX_D = 256
MAX_STRIDE = 2**22  # numbers from a row to the next: so a tile's offsets, of up to 256 rows, fit 32 bits, and registers
LOG2_E = math.log2(math.e)
TMA_ARCHITECTURES = ("sm_90", "sm_100")
LENGTHS = ("T_q", "T_k", "window")  # as they vary, code for any; for T = 1 ptxas (CUDA 12.8) crashed
SHAPES = (("32/8 heads of 128", 32, 8, 128), ("9/3 heads of 64", 9, 3, 64))  # Mistral-7B; SmolLM2-135M
CACHED_BYTES = 16 * 2**20  # of K and V that programs running at once may want: what the L2 of small cards holds as well


@triton.jit
def place(heads, section_heads, LAST_FIRST: tl.constexpr):
    """(block of rows, head of the batch) of this program.

    Section by section of heads whose keys fit the L2 cache together, and in a section block by block: what runs at once
    shares its keys. The blocks with most to do come first, so that the short ones fill the SMs at the end.
    """
    blocks = tl.num_programs(0) // heads
    section = tl.program_id(0) // (section_heads * blocks)
    first = section * section_heads
    within = tl.program_id(0) - first * blocks
    width = tl.minimum(heads - first, section_heads)  # the last section may be narrower
    block = within // width
    if LAST_FIRST:
        block = blocks - 1 - block
    return block, first + within % width


@triton.jit
def sequence(cu_ptr, index, T, stride_b, stride_t, PACKED: tl.constexpr):
    """(offset of the first row, number of rows) of sequence `index` of the batch."""
    if PACKED:
        start = tl.load(cu_ptr + index)
        return start.to(tl.int64) * stride_t, tl.load(cu_ptr + index + 1) - start
    else:
        return index.to(tl.int64) * stride_b, T


@triton.jit
def load_tile(
    x, batch, head, row, T, stride_t,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows row, row + 1, ... of a head: [BLOCK, BLOCK_D], with zeros beyond T (if EDGE) and beyond D.

    x  a pointer to the head's first number or, with TMA, the descriptor of [B, H, T, D]
    """
    if TMA:
        return x.load([batch, head, row, 0]).reshape(BLOCK, BLOCK_D)
    else:
        rows, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        x += tl.cast(row, tl.int64) * stride_t
        ptrs = x + ((rows * stride_t)[:, None] + dims[None, :])  # 32 bits do within a tile: see MAX_STRIDE
        if EDGE:
            return tl.load(ptrs, mask=(row + rows < T)[:, None] & (dims < D)[None, :], other=0.0)
        elif D < BLOCK_D:
            return tl.load(ptrs, mask=(dims < D)[None, :], other=0.0)
        else:
            return tl.load(ptrs)


@triton.jit
def store_tile(x_ptr, tile, row, T, stride_t, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the rows of `tile` that lie before T, rounded to x's dtype."""
    rows, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    x_ptr += tl.cast(row, tl.int64) * stride_t
    ptrs = x_ptr + ((rows * stride_t)[:, None] + dims[None, :])
    tl.store(ptrs, tile.to(x_ptr.dtype.element_ty), mask=(row + rows < T)[:, None] & (dims < D)[None, :])


@triton.jit
def sees(queries, keys, T_q, T_k, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether each of `queries` sees each of `keys`, given in shapes that broadcast. The last query sees the last key.

    CAUSAL  no key after the query, and so none beyond T_k, unless the query lies beyond T_q itself
    WINDOW  of those up to the query the last `window`, its own included
    """
    if CAUSAL:
        positions = queries + (T_k - T_q)
        if WINDOW:
            return (keys <= positions) & (keys > positions - window)
        else:
            return keys <= positions
    else:
        return keys < T_k


@triton.jit
def key_range(
    row, T_q, T_k, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(first, whole_first, whole_last, last): the queries row .. row + BLOCK_M see keys in [first, last) alone, and
    all of those in [whole_first, whole_last). All but `last` are multiples of BLOCK_N."""
    diagonal = row + (T_k - T_q)  # the last key that the first query sees
    beyond = tl.minimum(diagonal + BLOCK_M, T_k)  # the first that the last query does not
    first, whole_first, whole_last, last = 0, 0, T_k // BLOCK_N * BLOCK_N, T_k
    if CAUSAL:
        last = tl.maximum(beyond, 0)
        whole_last = tl.maximum(tl.minimum(diagonal + 1, T_k), 0) // BLOCK_N * BLOCK_N
    if WINDOW:
        first = tl.maximum(diagonal + 1 - window, 0) // BLOCK_N * BLOCK_N
        whole_first = tl.cdiv(tl.minimum(tl.maximum(beyond - window, 0), last), BLOCK_N) * BLOCK_N
        whole_last = tl.maximum(whole_first, whole_last)
    return first, whole_first, whole_last, last


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k, v, batch, head, row, first, last, T_q, T_k, stride_kt, stride_vt, window, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acc, row_sum and row_max after the keys [first, last) as well."""
    for n in tl.range(first, last, BLOCK_N):
        keys = load_tile(k, batch, head, n, T_k, stride_kt, D, BLOCK_N, BLOCK_D, MASKED, TMA)
        s = tl.dot(q, keys.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            rows, cols = row + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
            seen = sees(rows[:, None], cols[None, :], T_q, T_k, window, CAUSAL, WINDOW)
            s = tl.where(seen, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)  # [BLOCK_M]
        p = tl.exp2(s * scale_log2 - new_max[:, None])  # one multiply-add and one exp2 a score
        decay = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * decay + tl.sum(p, 1)
        values = load_tile(v, batch, head, n, T_k, stride_vt, D, BLOCK_N, BLOCK_D, MASKED, TMA)
        acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=LENGTHS)
def _forward_kernel(
    q_ptr, k, v, o_ptr, lse_ptr, cu_q_ptr, cu_k_ptr,
    H, heads, section_heads, T_q, T_k, window, scale_log2,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot, stride_lseb, stride_lseh,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program writes o and lse of BLOCK_M queries of one head."""
    scale_log2 = fp32(scale_log2)
    block, index = place(heads, section_heads, CAUSAL)
    batch, head = index // H, index % H
    q_offset, T_q = sequence(cu_q_ptr, batch, T_q, stride_qb, stride_qt, PACKED)
    o_offset, _ = sequence(cu_q_ptr, batch, T_q, stride_ob, stride_ot, PACKED)
    lse_offset, _ = sequence(cu_q_ptr, batch, T_q, stride_lseb, 1, PACKED)
    k_offset, _ = sequence(cu_k_ptr, batch, T_k, stride_kb, stride_kt, PACKED)
    v_offset, T_k = sequence(cu_k_ptr, batch, T_k, stride_vb, stride_vt, PACKED)
    row = block * BLOCK_M
    if row >= T_q:  # a packed sequence shorter than the longest
        return
    q_ptr += q_offset + head.to(tl.int64) * stride_qh
    o_ptr += o_offset + head.to(tl.int64) * stride_oh
    lse_ptr += lse_offset + head.to(tl.int64) * stride_lseh
    kv_head = head // GROUP
    if not TMA:
        k += k_offset + kv_head.to(tl.int64) * stride_kh
        v += v_offset + kv_head.to(tl.int64) * stride_vh

    q = load_tile(q_ptr, batch, head, row, T_q, stride_qt, D, BLOCK_M, BLOCK_D, True, False)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -3.0e38, tl.float32)  # below any score but finite, for -inf - -inf is nan
    first, whole_first, whole_last, last = key_range(row, T_q, T_k, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    for part in tl.static_range(3):  # far edge, middle, diagonal or end
        if WINDOW or part > 0:
            begin = first if part == 0 else whole_first if part == 1 else whole_last
            end = whole_first if part == 0 else whole_last if part == 1 else last
            acc, row_sum, row_max = _attend(
                acc, row_sum, row_max, q, k, v, batch, kv_head, row, begin, end, T_q, T_k, stride_kt, stride_vt,
                window, scale_log2, part != 1, CAUSAL, WINDOW, TMA, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip

    none = row_sum == 0.0  # a query before all keys, or a sequence without any
    row_sum = tl.where(none, 1.0, row_sum)
    o = acc * (1.0 / row_sum)[:, None]
    store_tile(o_ptr, o, row, T_q, stride_ot, D, BLOCK_M, BLOCK_D)
    rows = row + tl.arange(0, BLOCK_M)
    lse = tl.where(none, float("-inf"), (row_max + tl.log2(row_sum)) * 0.6931471805599453)  # ln 2
    tl.store(lse_ptr + rows, lse, mask=rows < T_q)


def on_hopper(arch: str, q, k, *others) -> bool:
    """Whether attention_hopper.py is for q, k, v and o, as far as they are given, without a window and not packed."""
    return takes_tma(arch, q, k, *others) and attention_hopper.takes(arch, q, k)


def takes_tma(arch: str, *tensors: torch.Tensor) -> bool:
    """Whether `arch` has TMA and it can copy all of `tensors` [B, H, T, D]: 16-bit, rows that begin at multiples of 16
    bytes. Not while torch.compile traces, which knows no addresses."""
    if arch not in TMA_ARCHITECTURES or torch.compiler.is_compiling():
        return False
    return all(
        x.numel()
        and x.element_size() == 2
        and x.data_ptr() % 16 == 0
        and all(n > 0 and n % 8 == 0 for n in x.stride()[:3])
        for x in tensors
    )


def descriptor(x: torch.Tensor, BLOCK: int, BLOCK_D: int):
    """TMA's descriptor of x [B, H, T, D], cut into [BLOCK, BLOCK_D]."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, BLOCK, BLOCK_D])


def lacking(arch: str, dtype: torch.dtype) -> str:
    """Why the kernels are not for `arch` and `dtype`, in words; "" if they are. The interpreter lacks nothing."""
    if arch == "interpreter":
        return ""
    if dtype == torch.float32:
        return "for float32, which tensor cores would cut to tf32"
    if arch.startswith("sm_"):
        return "" if int(arch[3:]) >= 80 else f"for {arch}, whose tensor cores Triton cannot use"
    return "" if arch.startswith("gfx9") else f"for {arch}, whose registers do not hold a backward's tiles"


def check_runs_on(arch: str, dtype: torch.dtype) -> None:
    """Raise NotImplementedError where the kernels are not for `arch` and `dtype`."""
    if why := lacking(arch, dtype):
        raise NotImplementedError(
            f"attention has no kernel {why}: use torch.nn.functional.scaled_dot_product_attention"
        )


def block_d(D: int) -> int:
    """The power of two that a head's D numbers are padded to; 16 is the least that the tensor cores multiply."""
    return max(16, triton.next_power_of_2(D))


def section_heads(heads: int, T_k: int, D: int, dtype: torch.dtype) -> int:
    """How many of the batch's key heads fit with their K and V in CACHED_BYTES; at least one."""
    return min(heads, max(1, CACHED_BYTES // max(1, 2 * T_k * D * dtype.itemsize)))


def family(arch: str, TMA: bool = False) -> str:
    """Which row of tilings `arch` takes. Large shared memory takes large tiles, and TMA, which needs no registers for
    addresses, larger ones."""
    if arch in TMA_ARCHITECTURES:
        return "TMA" if TMA else "sm_90"
    return arch if arch == "interpreter" else "gfx9" if arch.startswith("gfx") else "sm_80"


def tiling(tilings: dict[str, tuple], family: str, BLOCK_D: int) -> dict[str, int]:
    """The entry of `tilings` for heads of up to 64, 128 or 256 numbers, by its names."""
    sizes = tilings[family][(BLOCK_D > 64) + (BLOCK_D > 128)]
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), sizes, strict=True))


# (BLOCK_M, BLOCK_N, num_warps, num_stages) for heads of up to 64, 128 and 256 numbers: as large as goes without spills
_TILINGS = {
    "TMA": ((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2)),
    "sm_90": ((128, 128, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2)),
    "sm_80": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),  # 99 KiB of shared memory, for sm_86 to sm_120
    "gfx9": ((128, 32, 8, 1), (128, 32, 8, 1), (64, 32, 4, 1)),
    "interpreter": ((32, 32, 4, 1),) * 3,
}


def launch_forward(
    q, k, v, o, lse, *, causal: bool, window: int | None, scale: float,
    cu_q=None, cu_k=None, max_q: int | None = None, max_k: int | None = None, TMA: bool | None = None, **overrides,
) -> None:  # fmt: skip
    """Write o [B, H, T_q, D] and lse [B, H, T_q] (fp32), given q [B, H, T_q, D] and k and v [B, H_k, T_k, D].

    Any strides with neighbours in D adjacent. A packed batch has B = 1, sequences that begin and end at `cu_q` and
    `cu_k` (int32, one more than sequences), the longest of `max_q` and `max_k`. `overrides` are for BLOCK_M and so
    on, TMA for whether K and V come through it; with either, the kernel is this file's own.
    """
    (B, H, T_q, D), (_, H_k, T_k, _) = q.shape, k.shape
    packed = cu_q is not None
    if packed:
        B, T_q, T_k = cu_q.numel() - 1, max_q, max_k
    if B * T_q * o.numel() == 0:
        return
    BLOCK_D = block_d(D)
    arch = architecture(q.device)
    check_runs_on(arch, q.dtype)
    plain = not packed and window is None and TMA is None and not overrides
    if plain and lse.is_contiguous() and on_hopper(arch, q, k, v, o):
        attention_hopper.launch(q, k, v, o, lse, causal, scale)
        return
    if TMA is None:  # H100, 4x2048, 32/8 heads of 128: causal 0.383 ms and 0.358 without, else 0.675 and 0.740
        TMA = not packed and not (causal and arch == "sm_90") and takes_tma(arch, k, v)
    chosen = tiling(_TILINGS, family(arch, TMA), BLOCK_D)
    if window is not None and family(arch) == "sm_80":  # a third loop takes the registers of some keys
        chosen["BLOCK_N"] = 32
    chosen |= overrides
    grid = (triton.cdiv(T_q, chosen["BLOCK_M"]) * B * H,)
    section = section_heads(B * H_k, T_k, D, q.dtype) * (H // H_k)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], *lse.stride()[:2])
    if TMA:
        k, v = [descriptor(x, chosen["BLOCK_N"], BLOCK_D) for x in (k, v)]
    with device_of(q):
        _forward_kernel[grid](
            q, k, v, o, lse, cu_q, cu_k,
            H, B * H, section, T_q, T_k, window or 0, scale * LOG2_E, *strides,
            GROUP=H // H_k, CAUSAL=causal, WINDOW=window is not None, PACKED=packed, TMA=TMA,
            D=D, BLOCK_D=BLOCK_D, **chosen,
        )  # fmt: skip


def examples(dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The launches that matter, by name, for `fastkit compile`; meta tensors have a shape and no memory."""
    found = {}
    for name, H, H_k, D in SHAPES:
        q, o = (torch.empty(4, 2048, H, D, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
        k, v = (torch.empty(4, 2048, H_k, D, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
        launch = functools.partial(
            launch_forward, q, k, v, o, torch.empty(4, H, 2048, device="meta"), causal=True, window=None, scale=D**-0.5
        )
        found[f"forward {name} 4x2048"] = launch
    return found
