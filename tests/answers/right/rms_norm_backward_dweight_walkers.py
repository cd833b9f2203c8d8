import torch
import triton
import triton.language as tl


@triton.jit
def partial_kernel(dy_ptr, x_ptr, rstd_ptr, partial_ptr, M, N, BLOCK_N: tl.constexpr):
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    dweight = tl.zeros([BLOCK_N], tl.float32)
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        dy = tl.load(dy_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
        dweight += dy * x * tl.load(rstd_ptr + row)
    tl.store(partial_ptr + tl.program_id(0) * N + cols, dweight, mask=mask)


@triton.jit
def add_kernel(partial_ptr, dweight_ptr, WALKERS, N, BLOCK_N: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    for walker in range(WALKERS):
        dweight += tl.load(partial_ptr + walker * N + cols, mask=cols < N, other=0.0)
    tl.store(dweight_ptr + cols, dweight, mask=cols < N)


def rms_norm_backward_dweight(dy, x, rstd, dweight):
    M, N = x.shape
    walkers = min(M, 8)
    partial = torch.empty(walkers, N, dtype=torch.float32, device=x.device)
    partial_kernel[(walkers,)](dy, x, rstd, partial, M, N, BLOCK_N=triton.next_power_of_2(N))
    add_kernel[(triton.cdiv(N, 64),)](partial, dweight, walkers, N, BLOCK_N=64)
