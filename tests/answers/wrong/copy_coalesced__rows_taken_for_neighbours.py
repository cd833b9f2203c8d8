# fault: strides
import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, out_ptr, N, stride_xm, stride_outm, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # neighbouring lanes, neighbouring addresses
    mask = cols < N
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask)
    tl.store(out_ptr + row * stride_outm + cols, x, mask=mask)


def copy_coalesced(x, out):
    M, N = x.shape
    copy_kernel[(M, triton.cdiv(N, 512))](x, out, N, N, N, BLOCK_N=512)
