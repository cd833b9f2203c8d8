import triton
import triton.language as tl


@triton.jit
def loss_kernel(logits_ptr, labels_ptr, loss_ptr, V, BLOCK_V: tl.constexpr):
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    if label == -100:
        tl.store(loss_ptr + row, 0.0)
    else:
        largest, total = -float("inf"), 0.0
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            logits = tl.load(logits_ptr + row * V + cols, mask=cols < V, other=-float("inf"))
            new = tl.maximum(largest, tl.max(logits))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(logits - new))
            largest = new
        tl.store(loss_ptr + row, largest + tl.log(total) - tl.load(logits_ptr + row * V + label))


def cross_entropy_loss(logits, labels, loss):
    M, V = logits.shape
    loss_kernel[(M,)](logits, labels, loss, V, BLOCK_V=256)
