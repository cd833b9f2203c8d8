# fault: values
import triton
import triton.language as tl


@triton.jit
def matvec_kernel(packed_ptr, absmax_ptr, code_ptr, x_ptr, y_ptr, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K // 2, BLOCK):
        byte = start + tl.arange(0, BLOCK)
        mask = byte < K // 2
        packed = tl.load(packed_ptr + row * (K // 2) + byte, mask=mask, other=0).to(tl.int32)
        absmax = tl.load(absmax_ptr + row * (K // 64) + byte // 64, mask=mask, other=0.0)
        first = tl.load(x_ptr + 2 * byte, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + 2 * byte + 1, mask=mask, other=0.0).to(tl.float32)
        high, low = tl.load(code_ptr + (packed >> 4)), tl.load(code_ptr + (packed & 15))
        sums += absmax * (high * first + low * second)
    tl.store(y_ptr + row, tl.sum(sums, axis=0))


def matvec_nf4(packed, absmax, code, x, y):
    matvec_kernel[(y.numel(),)](packed, absmax, code, x, y, x.numel(), BLOCK=512)
