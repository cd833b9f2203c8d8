import torch
import triton
import triton.language as tl


@triton.jit
def partial_kernel(x_ptr, partial_ptr, N, BLOCKS, BLOCK_N: tl.constexpr):
    row, block = tl.program_id(0), tl.program_id(1)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + row * N + cols, mask=cols < N, other=0.0)
    tl.store(partial_ptr + row * BLOCKS + block, tl.sum(x.to(tl.float32)))


@triton.jit
def total_kernel(partial_ptr, out_ptr, BLOCKS, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(out_ptr + row, tl.sum(tl.load(partial_ptr + row * BLOCKS + cols, mask=cols < BLOCKS, other=0.0)))


def row_sum(x, out):
    M, N = x.shape
    blocks = triton.cdiv(N, 256)
    partial = torch.empty(M, blocks, dtype=torch.float32, device=x.device)
    partial_kernel[(M, blocks)](x, partial, N, blocks, BLOCK_N=256)
    total_kernel[(M,)](partial, out, blocks, BLOCK=triton.next_power_of_2(blocks))
