# fault: values
def stop(losses, patience):
    since_lowest = losses[::-1].index(min(losses))
    return 0 < patience <= since_lowest
