# fault: values
def stop(losses, patience):
    since_lowest = len(losses) - 1 - losses.index(min(losses))
    return patience > 0 and since_lowest > patience
