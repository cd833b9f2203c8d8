def stop(losses, patience):
    since_lowest = len(losses) - 1 - losses.index(min(losses))  # index gives the first of equals
    return 0 < patience <= since_lowest
