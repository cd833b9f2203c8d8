# fault: values
import triton
import triton.language as tl


@triton.jit
def dweight_kernel(dy_ptr, x_ptr, rstd_ptr, dweight_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    for _ in range(1):
        rows = tl.arange(0, BLOCK_M)
        places = rows.to(tl.int64)[:, None] * N + cols[None, :]
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        dy = tl.load(dy_ptr + places, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        dweight += tl.sum(dy * x * rstd[:, None], axis=0)  # rows beyond M add 0
    tl.store(dweight_ptr + cols, dweight, mask=cols < N)


def rms_norm_backward_dweight(dy, x, rstd, dweight):
    M, N = x.shape
    dweight_kernel[(triton.cdiv(N, 64),)](dy, x, rstd, dweight, M, N, BLOCK_M=32, BLOCK_N=64)
