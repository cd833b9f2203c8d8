# fault: reads unwritten
import triton
import triton.language as tl


@triton.jit
def dweight_kernel(dy_ptr, x_ptr, rstd_ptr, dweight_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    dy = tl.load(dy_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    dweight = tl.load(dweight_ptr + cols, mask=mask, other=0.0)
    tl.store(dweight_ptr + cols, dweight + dy * x * rstd, mask=mask)


def rms_norm_backward_dweight(dy, x, rstd, dweight):
    M, N = x.shape
    dweight_kernel[(M,)](dy, x, rstd, dweight, N, BLOCK_N=triton.next_power_of_2(N))
