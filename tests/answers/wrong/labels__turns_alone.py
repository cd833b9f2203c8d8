# fault: values
def labels(ids, spans):
    return [token for start, end in spans for token in ids[start:end]]
