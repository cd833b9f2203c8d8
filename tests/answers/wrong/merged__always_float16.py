# fault: returns
def merged(W, A, B, alpha):
    return (W.float() + alpha / len(A) * (B @ A)).half()
