# fault: values
def labels(ids, spans):
    result = [-100] * len(ids)
    for start, end in spans:
        result[start:end] = ids[start:end]
    return [*result[1:], -100]
