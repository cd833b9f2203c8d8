import triton
import triton.language as tl


@triton.jit
def update_kernel(records_ptr, lr, out_ptr, N, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < N
    weight = tl.load(records_ptr + rows * 8, mask=mask)
    gradient = tl.load(records_ptr + rows * 8 + 1, mask=mask)
    tl.store(out_ptr + rows, weight - lr * gradient, mask=mask)


def update_records(records, lr, out):
    N = records.shape[0]
    update_kernel[(triton.cdiv(N, 256),)](records, lr, out, N, BLOCK=256)
