# fault: precision
def merged(W, A, B, alpha):
    return W + alpha / len(A) * (B.to(W.dtype) @ A.to(W.dtype))
