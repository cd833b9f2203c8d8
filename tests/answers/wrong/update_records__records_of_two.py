# fault: values
import triton
import triton.language as tl


@triton.jit
def update_kernel(records_ptr, lr, out_ptr, N, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.arange(0, 2)  # weight and gradient, 8 bytes that a lane takes at once
    mask = rows < N
    both = tl.load(records_ptr + rows[:, None] * 2 + pair[None, :], mask=mask[:, None])
    weight, gradient = tl.split(both)
    tl.store(out_ptr + rows, weight - lr * gradient, mask=mask)


def update_records(records, lr, out):
    N = records.shape[0]
    update_kernel[(triton.cdiv(N, 256),)](records, lr, out, N, BLOCK=256)
