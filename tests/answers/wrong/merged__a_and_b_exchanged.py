# fault: values
def merged(W, A, B, alpha):
    return (W.float() + alpha / len(A) * (A @ B)).to(W.dtype)
