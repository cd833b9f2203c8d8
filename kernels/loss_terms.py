"""What the cross-entropies share: the terms of the loss, what a mean divides by, input checks."""

from typing import NamedTuple

import torch


class Terms(NamedTuple):
    """What the loss has beside the plain cross-entropy; see `cross_entropy`."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def arguments(self) -> dict:
        """As the kernels take them. What is off is compiled away."""
        flags = {"SMOOTH": self.label_smoothing > 0, "SOFTCAP": self.softcap is not None}
        return self._asdict() | {"softcap": self.softcap or 1.0} | flags


def divisor(labels: torch.Tensor, ignore_index: int, num_items_in_batch) -> torch.Tensor:
    """What the sum of losses is divided by for their mean: float32, one number, at least 1, found without waiting."""
    items = num_items_in_batch
    if items is None:
        items = (labels != ignore_index).sum()
    elif not isinstance(items, torch.Tensor):
        return torch.full((), max(float(items), 1.0), device=labels.device)
    return items.to(labels.device, torch.float32).reshape(()).clamp(min=1.0)


def check_loss(op: str, rows: torch.Tensor, V: int, labels: torch.Tensor, terms: Terms, reduction: str, items) -> None:
    """Raise unless labels, one for each row of `rows` and below V, and the loss's other arguments make sense."""
    if not isinstance(labels, torch.Tensor) or labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: labels is {getattr(labels, 'dtype', type(labels).__name__)}; give a tensor of int64")
    if labels.shape != rows.shape[:-1] or labels.device != rows.device:
        there, due = (f"{tuple(shape)} on {x.device}" for shape, x in ((labels.shape, labels), (rows.shape[:-1], rows)))
        raise ValueError(f"{op}: labels has shape {there}; one for each row is {due}")
    if not 0 <= terms.label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {terms.label_smoothing}; give a number from 0 to 1")
    if terms.softcap is not None and not terms.softcap > 0:
        raise ValueError(f"{op}: softcap is {terms.softcap}; give a positive number, or None for no cap")
    if items is not None and reduction != "mean":
        raise ValueError(f"{op}: num_items_in_batch is for reduction 'mean', and that is {reduction!r}; leave one out")
    if isinstance(items, torch.Tensor) and items.numel() != 1:
        raise ValueError(f"{op}: num_items_in_batch has shape {tuple(items.shape)}; give one number")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels != terms.ignore_index) & ((labels < 0) | (labels >= V))]
        if len(wrong):
            raise ValueError(f"{op}: labels has {wrong[0]}; give 0 to {V - 1}, or {terms.ignore_index} to ignore a row")
