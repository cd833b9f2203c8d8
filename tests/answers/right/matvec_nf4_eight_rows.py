import triton
import triton.language as tl


@triton.jit
def matvec_kernel(packed_ptr, absmax_ptr, code_ptr, x_ptr, y_ptr, N, B, ROWS: tl.constexpr):
    """One program takes ROWS rows, a block of 64 numbers of each at a time, so that absmax counts once a block."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < N
    byte = tl.arange(0, 32)
    y = tl.zeros([ROWS], tl.float32)
    for block in range(0, B):
        places = rows[:, None] * (B * 32) + block * 32 + byte[None, :]
        packed = tl.load(packed_ptr + places, mask=in_rows[:, None], other=0).to(tl.int32)
        x = x_ptr + block * 64 + 2 * byte
        first, second = tl.load(x).to(tl.float32), tl.load(x + 1).to(tl.float32)
        high, low = tl.load(code_ptr + (packed >> 4)), tl.load(code_ptr + (packed & 15))
        absmax = tl.load(absmax_ptr + rows * B + block, mask=in_rows, other=0.0)
        y += absmax * tl.sum(high * first[None, :] + low * second[None, :], axis=1)
    tl.store(y_ptr + rows, y, mask=in_rows)


def matvec_nf4(packed, absmax, code, x, y):
    N = y.numel()
    matvec_kernel[(triton.cdiv(N, 8),)](packed, absmax, code, x, y, N, x.numel() // 64, ROWS=8)
