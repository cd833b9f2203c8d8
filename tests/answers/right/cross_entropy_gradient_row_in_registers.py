import triton
import triton.language as tl


@triton.jit
def gradient_kernel(
    logits_ptr, labels_ptr, dlogits_ptr, V, items, stride_logitsm, stride_dlogitsm, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_V)
    mask = cols < V
    label = tl.load(labels_ptr + row)
    logits = tl.load(logits_ptr + row * stride_logitsm + cols, mask=mask, other=-float("inf")).to(tl.float32)
    exps = tl.exp(logits - tl.max(logits))
    dlogits = (exps / tl.sum(exps) - (cols == label).to(tl.float32)) / items
    dlogits = tl.where(label == -100, 0.0, dlogits)
    tl.store(dlogits_ptr + row * stride_dlogitsm + cols, dlogits.to(tl.float16), mask=mask)


def cross_entropy_gradient(logits, labels, items, dlogits):
    M, V = logits.shape
    gradient_kernel[(M,)](
        logits, labels, dlogits, V, items, logits.stride(0), dlogits.stride(0), BLOCK_V=triton.next_power_of_2(V)
    )
