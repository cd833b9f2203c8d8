# fault: values
def merged(W, A, B, alpha):
    return (W.float() + alpha * (B @ A)).to(W.dtype)
