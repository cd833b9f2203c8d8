def stop(losses, patience):
    if patience == 0 or len(losses) <= patience:
        return False
    return min(losses[-patience:]) >= min(losses[:-patience])
