import functools

import torch
import triton
import triton.language as tl


@triton.jit
def dequant_kernel(packed_ptr, scales_ptr, table_ptr, out_ptr, N, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    byte = tl.load(packed_ptr + cols // 2, mask=mask, other=0).to(tl.int32)
    code = tl.where(cols % 2 == 0, byte & 15, byte >> 4)
    out = tl.load(table_ptr + code, mask=mask) * tl.load(scales_ptr + cols // 32, mask=mask)
    tl.store(out_ptr + cols, out, mask=mask)


@functools.cache
def table(device):
    return torch.arange(-8, 8, dtype=torch.float32, device=device)


def dequant_4bit(packed, scales, out):
    N = out.numel()
    dequant_kernel[(triton.cdiv(N, 512),)](packed, scales, table(packed.device), out, N, BLOCK=512)
