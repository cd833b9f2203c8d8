# fault: values
def stop(losses, patience):
    lowest, without = losses[0], 0
    for loss in losses[1:]:
        if loss < lowest:
            lowest = loss
        else:
            without += 1
    return 0 < patience <= without
