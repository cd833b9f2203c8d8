# fault: returns
import torch


def labels(ids, spans):
    result = torch.full((len(ids),), -100)
    for start, end in spans:
        result[start:end] = torch.tensor(ids[start:end])
    return result
