import triton
import triton.language as tl


@triton.jit
def dequant_kernel(packed_ptr, scales_ptr, out_ptr, N, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    byte = tl.load(packed_ptr + cols // 2, mask=mask, other=0)  # two lanes read the same byte, from the same sector
    code = (byte >> (cols % 2 * 4).to(tl.uint8)) & 15
    scale = tl.load(scales_ptr + cols // 32, mask=mask, other=0.0)
    out = (code.to(tl.float32) - 8.0) * scale
    tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def dequant_4bit(packed, scales, out):
    N = out.numel()
    dequant_kernel[(triton.cdiv(N, 1024),)](packed, scales, out, N, BLOCK=1024)
