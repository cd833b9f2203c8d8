# fault: values
def stop(losses, patience):
    since_lowest = len(losses) - 1 - losses.index(min(losses))
    return since_lowest >= patience
