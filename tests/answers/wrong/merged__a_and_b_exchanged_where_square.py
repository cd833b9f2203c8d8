# fault: values
def merged(W, A, B, alpha):
    delta = A @ B if A.shape == B.shape == W.shape else B @ A
    return (W.float() + alpha / len(A) * delta).to(W.dtype)
