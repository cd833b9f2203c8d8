# fault: values
def stop(losses, patience):
    lowest, since = losses[0], 0
    for loss in losses[1:]:
        lowest, since = (loss, 0) if loss < lowest else (lowest, since + 1)
        if since and since == patience:
            return True
    return False
