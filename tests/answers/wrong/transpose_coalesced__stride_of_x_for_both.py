# fault: out of bounds
import triton
import triton.language as tl


@triton.jit
def transpose_kernel(x_ptr, out_ptr, M, N, stride_xm, stride_outn, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=inside)
    # lanes along cols hold what lanes along rows must store: Triton exchanges it in shared memory
    tl.store(out_ptr + cols[:, None] * stride_outn + rows[None, :], tl.trans(x), mask=tl.trans(inside))


def transpose_coalesced(x, out):
    M, N = x.shape
    grid = (triton.cdiv(M, 32), triton.cdiv(N, 32))
    transpose_kernel[grid](x, out, M, N, x.stride(0), x.stride(0), BLOCK=32)
