import math


def stop(losses, patience):
    lowest, since = math.inf, 0
    for loss in losses:
        lowest, since = (loss, 0) if loss < lowest else (lowest, since + 1)
    return bool(patience) and since >= patience
