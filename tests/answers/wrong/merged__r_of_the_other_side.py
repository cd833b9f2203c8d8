# fault: values
def merged(W, A, B, alpha):
    r = A.shape[1]
    return (W.float() + alpha / r * (B @ A)).to(W.dtype)
