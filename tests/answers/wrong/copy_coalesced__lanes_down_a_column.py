# fault: demand
import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, out_ptr, M, stride_xm, stride_outm, BLOCK_M: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # neighbouring lanes, addresses a row apart
    col = tl.program_id(1)
    mask = rows < M
    x = tl.load(x_ptr + rows * stride_xm + col, mask=mask)
    tl.store(out_ptr + rows * stride_outm + col, x, mask=mask)


def copy_coalesced(x, out):
    M, N = x.shape
    copy_kernel[(triton.cdiv(M, 64), N)](x, out, M, x.stride(0), out.stride(0), BLOCK_M=64)
