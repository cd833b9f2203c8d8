# fault: demand
import triton
import triton.language as tl


@triton.jit
def transpose_kernel(x_ptr, out_ptr, N, stride_xm, stride_outn, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask)
    tl.store(out_ptr + cols * stride_outn + row, x, mask=mask)


def transpose_coalesced(x, out):
    M, N = x.shape
    transpose_kernel[(M, triton.cdiv(N, 64))](x, out, N, x.stride(0), out.stride(0), BLOCK=64)
