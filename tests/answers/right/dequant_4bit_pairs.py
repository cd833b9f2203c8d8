import triton
import triton.language as tl


@triton.jit
def dequant_kernel(packed_ptr, scales_ptr, out_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # a byte and its two numbers to each lane
    byte = tl.load(packed_ptr + at, mask=2 * at < N)
    scale = tl.load(scales_ptr + at // 16, mask=2 * at < N)
    low = ((byte & 15).to(tl.float32) - 8) * scale
    high = ((byte >> 4).to(tl.float32) - 8) * scale
    both = tl.interleave(low, high)
    cols = tl.program_id(0) * BLOCK * 2 + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + cols, both.to(tl.float16), mask=cols < N)


def dequant_4bit(packed, scales, out):
    N = out.numel()
    dequant_kernel[(triton.cdiv(N, 256),)](packed, scales, out, N, BLOCK=128)
