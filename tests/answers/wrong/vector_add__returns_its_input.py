# fault: returns
def vector_add(x, y, out):
    return x
