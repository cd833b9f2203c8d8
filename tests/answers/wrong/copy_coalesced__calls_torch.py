# fault: calls torch
def copy_coalesced(x, out):
    out.copy_(x)
