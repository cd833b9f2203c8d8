# fault: values
def labels(ids, spans):
    result = [-100] * len(ids)
    for start, end in spans:
        result[start : end + 1] = ids[start : end + 1]
    return result
