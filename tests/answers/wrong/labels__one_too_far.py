# fault: values
def labels(ids, spans):
    result = [-100] * len(ids)
    for start, end in spans:
        for place in range(start, end + 1):
            result[place] = ids[place]
    return result
