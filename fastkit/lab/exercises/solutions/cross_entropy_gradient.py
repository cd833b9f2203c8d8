import triton
import triton.language as tl


@triton.jit
def gradient_kernel(
    logits_ptr, labels_ptr, dlogits_ptr, V, items, stride_logitsm, stride_dlogitsm, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logitsm
    dlogits_ptr += row * stride_dlogitsm
    label = tl.load(labels_ptr + row)
    weight = tl.where(label != -100, 1.0 / items, 0.0)

    largest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(logits))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(logits - new))
        largest = new

    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        dlogits = tl.exp(logits - largest) / total - tl.where(cols == label, 1.0, 0.0)
        tl.store(dlogits_ptr + cols, (dlogits * weight).to(tl.float16), mask=cols < V)


def cross_entropy_gradient(logits, labels, items, dlogits):
    M, V = logits.shape
    gradient_kernel[(M,)](
        logits, labels, dlogits, V, items, logits.stride(0), dlogits.stride(0), BLOCK_V=1024, num_warps=4
    )
