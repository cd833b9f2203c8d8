# fault: inputs changed
def merged(W, A, B, alpha):
    W += alpha / len(A) * (B @ A)
    return W
