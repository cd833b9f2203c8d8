# fault: values
def merged(W, A, B, alpha):
    return (W.float() + alpha / len(A) ** 0.5 * (B @ A)).to(W.dtype)
