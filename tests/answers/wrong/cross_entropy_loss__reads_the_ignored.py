# fault: out of bounds
import triton
import triton.language as tl


@triton.jit
def loss_kernel(logits_ptr, labels_ptr, loss_ptr, V, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    counts = label != -100
    cols = tl.arange(0, BLOCK_V)
    logits = tl.load(logits_ptr + row * V + cols, mask=cols < V, other=-float("inf"))
    largest = tl.max(logits)
    lse = largest + tl.log(tl.sum(tl.exp(logits - largest)))
    target = tl.load(logits_ptr + row * V + label)  # -100 is no place to read from
    tl.store(loss_ptr + row, tl.where(counts, lse - target, 0.0))


def cross_entropy_loss(logits, labels, loss):
    M, V = logits.shape
    loss_kernel[(M,)](logits, labels, loss, V, BLOCK_V=triton.next_power_of_2(V))
