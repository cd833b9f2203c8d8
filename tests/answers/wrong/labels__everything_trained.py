# fault: values
def labels(ids, spans):
    return list(ids)
