"""What `kernels/nf4_matvec_lines.py` is compiled for: sizes, and what lanes do in shared memory, in PTX.

Triton's own operations on shared memory make warps wait for one another; here each keeps to its part of it.

A lane is 4 * g + t. Its registers of the product mma.m16n8k16 (PTX's documentation draws them) are, of A, numbers 2 t
and 2 t + 1, and 8 further, of rows g and g + 8; of B, the same numbers of column g; of C, columns 2 t and 2 t + 1 of
rows g and g + 8.
"""

import functools
from dataclasses import dataclass

SCALE = 1.3661962747573853  # the best of 2**16 between 1 and 2
TABLE, CODES = 32768, 1024  # bytes of shared memory: two numbers of a byte, 32 times; what indices of absmax mean


@dataclass(frozen=True)
class Plan:
    """Constants of the kernel.

    K, W        a row's numbers, and the warps that share them, 256 each, in `stretches` of W * 256
    even        every warp has words in every stretch
    units       blocks of 64 that share an absmax; double_quant: which comes as an index
    beside      blocks of x that stand side by side: 4 for up to 2 rows, 2 for up to 4, 1 for up to 8
    depth       turns that the ring holds; stage: bytes of a warp's turn in it
    buffers     of 32 KiB, of shared memory; codes, ring, sums: where in it these begin, behind the table
    scale       of CODE
    ask, arrived, find, products, leave: what lanes do in shared memory, in PTX
    operands    constraints of `products`
    """

    K: int
    W: int
    stretches: int
    even: bool
    units: int
    double_quant: bool
    beside: int
    depth: int
    stage: int
    buffers: int
    codes: int
    ring: int
    sums: int
    scale: float
    ask: str
    arrived: str
    find: str
    products: str
    operands: str
    leave: str


def ask(K: int, double_quant: bool) -> str:
    """PTX that asks for a warp's turn, if $5: words from $1 to $2, 4 rows apart, and what makes up absmax, $3 to $4.

    Of absmax as it is, a lane asks for its part if $5 is 2."""
    lines = [".reg .pred p, q;", "setp.ne.u32 p, $5, 0;", f"setp.ge.u32 q, $5, {1 if double_quant else 2};"]
    lines.append("bar.warp.sync -1;")  # for all lanes have read what was there
    lines += [f"@p cp.async.cg.shared.global [$2+{512 * n}], [$1+{2 * K * n}], 16;" for n in range(4)]
    lines.append(f"@q cp.async.ca.shared.global [$4], [$3], {4 if double_quant else 16};")
    return "\n".join(["{", *lines, "cp.async.commit_group;", "mov.b32 $0, 0;", "}"])


def find(double_quant: bool) -> str:
    """PTX of absmax or, of its two parts, the code whose index stands at $1 (codes at $2)."""
    if not double_quant:
        return "ld.shared.f32 $0, [$1];"
    lines = ("ld.shared.u8 n, [$1];", "shl.b32 n, n, 2;", "add.u32 n, n, $2;", "ld.shared.f32 $0, [n];")
    return "\n".join(["{", ".reg .b32 n;", *lines, "}"])


def products(beside: int) -> tuple[str, str]:
    """(PTX, constraints) of y += absmax * (CODE @ x) of `beside` blocks, by a lane's registers.

    Operands, of four registers: y; y as it was; x of each of two words; absmax; where the lane's words stand; its
    address in the table; t. Of y and absmax they are [row g or g + 8, column 2 t or 2 t + 1]; the last three are the
    same number four times. Of a row's blocks of 32 bytes, n stands n ^ (row % 4) blocks in: so lanes of 4 rows read
    different banks.
    """
    y, was, one, other, absmax, words, table, t = ([f"${4 * n + r}" for r in range(4)] for n in range(8))
    lines = [".reg .b32 a<4>, b<4>, w<4>, one<4>, at;", ".reg .f32 c<16>;", ".reg .pred p<4>;"]
    lines += [f"mov.b32 one{byte}, {128 << 8 * byte};" for byte in range(4)]
    for block in range(beside):
        lines.append(f"xor.b32 at, {words[0]}, {32 * block};")
        lines += [f"ld.shared.v2.b32 {{w{2 * p}, w{2 * p + 1}}}, [at+{1024 * p}];" for p in range(2)]
        c = ", ".join(f"c{4 * block + r}" for r in range(4))
        sums = ", ".join(["0f00000000"] * 4)
        for word, first in ((0, 0), (0, 2), (1, 0), (1, 2)):  # a product takes two bytes of each row's word
            for r in range(4):
                lines.append(f"dp4a.u32.u32 b{r}, w{2 * (r % 2) + word}, one{first + r // 2}, {table[0]};")
            lines += [f"ld.shared.b32 a{r}, [b{r}];" for r in range(4)]
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{c}}}, {{a0, a1, a2, a3}}, "
                f"{{{', '.join((one, other)[word][first : first + 2])}}}, {{{sums}}};"
            )
            sums = c
    # A lane's columns are those of block t * beside / 4.
    lines += [f"setp.{'eq' if beside == 4 else 'ge'}.u32 p{n}, {t[0]}, {4 * n // beside};" for n in range(1, beside)]
    for r in range(4):
        lines += [f"selp.f32 c{r}, c{r + 4 * n}, c{r}, p{n};" for n in range(1, beside)]
        lines.append(f"fma.rn.f32 {y[r]}, {absmax[r]}, c{r}, {was[r]};")
    kinds = ["=&f", "f", "r", "r", "f", "r", "r", "r"]
    return "\n".join(["{", *lines, "}"]), ",".join(kind for kind in kinds for _ in range(4))


def leave(beside: int) -> str:
    """PTX that stores a lane's sums $4-7 from address $8 on, 128 bytes apart, and adds what is there, if $16.

    $12 is t, and $0-3 are nothing. Lanes t that have the same columns, of other blocks, exchange halves until each has
    the whole sum of one part.
    """
    lines = [".reg .f32 c<4>, s<2>;", ".reg .b32 bit;", ".reg .pred p;"]
    lines += [f"mov.f32 c{r}, ${4 + r};" for r in range(4)]
    for half in (2, 1)[: beside // 2]:
        lines += [f"and.b32 bit, $12, {half};", "setp.ne.u32 p, bit, 0;"]
        for r in range(half):
            lines += [f"selp.f32 s{r}, c{r}, c{r + half}, p;", f"selp.f32 c{r}, c{r + half}, c{r}, p;"]
            lines += [f"shfl.sync.bfly.b32 s{r}, s{r}, {half}, 31, -1;", f"add.f32 c{r}, c{r}, s{r};"]
    lines.append("setp.ne.u32 p, $16, 0;")
    for r in range(4 // beside):
        lines += ["mov.f32 s0, 0f00000000;", f"@p ld.shared.f32 s0, [$8+{128 * r}];", f"add.f32 c{r}, c{r}, s0;"]
        lines.append(f"st.shared.f32 [$8+{128 * r}], c{r};")
    return "\n".join(["{", *lines, *(f"mov.b32 ${r}, 0;" for r in range(4)), "}"])


def most_tiles(W: int, beside: int, room: int) -> int:
    """Of a program: a warp adds up one, and their sums may take half of what tables leave of `room` bytes."""
    return min(W, (room - TABLE - CODES) // 2 // (W * (512 // beside)))


@functools.cache
def plan(K: int, units: int, double_quant: bool, beside: int, W: int, most: int, room: int, depth: int) -> Plan:
    """The Plan of programs of at most `most` tiles, in `room` bytes of shared memory; `depth` is lowered to fit."""
    chunks, ring, stage, left = K // 256, TABLE + CODES, 2048 + (128 if double_quant else 256), most * W * 512 // beside
    stretches = -(-chunks // W)
    depth = max(1, min(depth, (room - ring - left) // (W * stage), stretches * most))
    sums = ring + depth * W * stage
    buffers, arrived = -(-(sums + left) // 32768), f"cp.async.wait_group {depth - 1}; bar.warp.sync -1; mov.b32 $0, $1;"
    return Plan(
        K, W, stretches, chunks % W == 0, units, double_quant, beside, depth, stage, buffers, TABLE, ring, sums, SCALE,
        ask(K, double_quant), arrived, find(double_quant), *products(beside), leave(beside),
    )  # fmt: skip
