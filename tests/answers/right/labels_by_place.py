def labels(ids, spans):
    def trained(place):
        return any(start <= place < end for start, end in spans)

    return [token if trained(place) else -100 for place, token in enumerate(ids)]
