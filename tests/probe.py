"""What tests look at in a model: its logits, its gradients, its linear layers."""

import torch

IDS = torch.arange(3, 43).reshape(2, 20)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradients of one training step on IDS, for everything trainable."""
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def linears(model) -> dict[str, torch.nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
