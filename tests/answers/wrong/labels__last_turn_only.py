# fault: values
def labels(ids, spans):
    for start, end in spans:
        result = [-100] * len(ids)
        result[start:end] = ids[start:end]
    return result if spans else [-100] * len(ids)
