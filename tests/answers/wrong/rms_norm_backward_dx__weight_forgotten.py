# fault: values
import triton
import triton.language as tl


@triton.jit
def dx_kernel(dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    dy = tl.load(dy_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    wdy = dy
    x_hat = x * rstd
    c = tl.sum(x_hat * wdy) / N  # masked lanes add 0
    dx = rstd * (wdy - x_hat * c)
    tl.store(dx_ptr + row * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def rms_norm_backward_dx(dy, x, weight, rstd, dx):
    M, N = x.shape
    dx_kernel[(M,)](dy, x, weight, rstd, dx, N, BLOCK_N=triton.next_power_of_2(N))
