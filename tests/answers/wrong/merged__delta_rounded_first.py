# fault: precision
def merged(W, A, B, alpha):
    return W + (alpha / len(A) * (B @ A)).to(W.dtype)
