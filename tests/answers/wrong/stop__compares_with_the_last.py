# fault: values
def stop(losses, patience):
    if patience == 0 or len(losses) <= patience:
        return False
    return all(losses[-n] >= losses[-n - 1] for n in range(1, patience + 1))
