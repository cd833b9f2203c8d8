# fault: no kernel
def vector_add(x, y, out):
    out.numpy()[:] = x.numpy() + y.numpy()
