# fault: returns
def stop(losses, patience):
    if 0 < patience <= len(losses) - 1 - losses.index(min(losses)):
        return True
