# fault: inputs changed
def stop(losses, patience):
    del losses[: losses.index(min(losses)) + 1]
    return 0 < patience <= len(losses)
