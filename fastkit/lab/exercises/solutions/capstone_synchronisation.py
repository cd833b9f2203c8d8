import torch

from fastkit.lab.capstone import MOST


def clip(dw):
    norm = torch.linalg.vector_norm(dw, dtype=torch.float32)
    return dw.mul_((MOST / norm).clamp(max=1.0))
