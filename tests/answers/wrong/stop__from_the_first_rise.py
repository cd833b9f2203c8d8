# fault: values
from itertools import pairwise


def stop(losses, patience):
    since = 0
    for before, after in pairwise(losses):
        if since or after > before:
            since += 1
    return 0 < patience <= since
