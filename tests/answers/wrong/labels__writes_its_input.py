# fault: inputs changed
def labels(ids, spans):
    trained = {place for start, end in spans for place in range(start, end)}
    for place in range(len(ids)):
        if place not in trained:
            ids[place] = -100
    return ids
