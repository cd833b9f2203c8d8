"""Which tokens of a batch see each other, read from the mask that transformers hands to a decoder layer.

A fused layer's attention is causal, within a sequence, and knows nothing of masks. That is enough for

* batches without a mask;
* batches padded on the right: a query sees no key after its own, and padding comes after. What the padding itself
  attends to differs from transformers, and reaches no token of the text;
* sequences packed end to end, and batches padded on the left: stretches of the rows that do not see each other, as
  `attention_varlen` takes them. (Labels that have padding predict the first token of a text, as a plain shift leaves
  them behind padding on the left, learn from noise in transformers and from another noise here.)

Every other mask is refused. The mask is compared with what was made of it, whole, so nothing is taken on trust; once a
batch, for all layers that share it. A GPU is waited for once, as transformers does when it makes the mask.
"""

from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fastkit.models.projection import Refusal


class Packed(NamedTuple):
    """Sequences in the rows of a batch, all rows end to end: cu_seqlens, int32 [sequences + 1], and the longest."""

    cu_seqlens: torch.Tensor
    longest: int


class Sequences:
    """Reads masks, and remembers what it read as long as the mask lives.

    unread   masks are not read: in the capture of a CUDA graph, when the host cannot wait for one, and transformers
             makes one whatever it is given
    told     what `read` then returns
    """

    unread, told = False, None

    def __init__(self):
        self._known = WeakIdKeyDictionary()

    def read(
        self, mask, position_ids: torch.Tensor | None, B: int, T: int, window: int | None, implementation: str
    ) -> Packed | None:
        """The sequences of a batch of B rows of T tokens; None where each row is one, or one and padding on its right.

        implementation: the model's `_attn_implementation`. Raises Refusal for what is neither.
        """
        if self.unread:
            return self.told
        by_flash = implementation.startswith("flash_attention")
        if mask is None and by_flash and B == 1:  # then transformers takes packed sequences from the positions
            mask = position_ids
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor):
            raise Refusal(f"the attention mask is a {type(mask).__name__}")
        known = self._known.setdefault(mask, {})
        key = (mask._version, mask is position_ids, window, B, T)
        if key not in known:
            known[key] = _read(mask, mask is position_ids, B, T, window)
        if isinstance(known[key], Refusal):
            raise known[key]
        return known[key]


def _read(mask: torch.Tensor, positions: bool, B: int, T: int, window: int | None) -> Packed | Refusal | None:
    seen = None
    first = torch.zeros(B, T, dtype=torch.bool, device=mask.device)  # whether a token begins a sequence
    first[:, 0] = True
    if positions:
        real = torch.ones_like(first)
        first = begin(mask)
    elif mask.shape == (B, T):  # what flash attention is given
        real = mask.bool()
    elif mask.dim() == 4 and mask.shape[1:] == (1, T, T) and mask.shape[0] in (1, B):
        seen = (mask if mask.dtype == torch.bool else mask == 0).expand(B, 1, T, T)[:, 0]  # [B, query, key]
        real = seen.diagonal(dim1=1, dim2=2)  # a token of the text sees itself
        if window != 1:
            first[:, 1:] |= ~seen.diagonal(-1, dim1=1, dim2=2) & real[:, 1:]  # and the token before, unless it is first
    else:
        return Refusal(f"an attention mask of shape {tuple(mask.shape)} for {B} rows of {T} tokens")
    first[:, 1:] |= real[:, 1:] != real[:, :-1]
    agrees = (
        torch.ones((), dtype=torch.bool, device=mask.device) if seen is None else _agrees(seen, real, first, window)
    )
    later = (first & real)[:, 1:].any()  # a sequence that does not begin its row
    agrees, later = torch.stack([agrees, later]).tolist()
    if not agrees:
        return Refusal("an attention mask that is neither causal, nor padding, nor packing")
    if not later:
        return None
    cu_seqlens = ends(first)
    return Packed(cu_seqlens, int(cu_seqlens.diff().max()))


def begin(position_ids: torch.Tensor) -> torch.Tensor:
    """Which tokens [B, T] begin a sequence: the first of a row, and each whose position does not follow the last."""
    first = torch.ones_like(position_ids, dtype=torch.bool)
    first[:, 1:] = position_ids.diff(dim=1) != 1
    return first


def ends(first: torch.Tensor) -> torch.Tensor:
    """cu_seqlens of `Packed`, of which tokens begin one. A GPU is waited for."""
    starts = first.flatten().nonzero().squeeze(1)
    return torch.cat([starts, starts.new_tensor([first.numel()])]).to(torch.int32)


def _agrees(seen: torch.Tensor, real: torch.Tensor, first: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether each token of the text sees just what comes up to it in its sequence and window."""
    token = torch.arange(seen.shape[1], device=seen.device)
    behind = token[:, None] - token[None, :]  # how far a key lies behind a query
    ids = first.cumsum(1)
    expected = (ids[:, :, None] == ids[:, None, :]) & (behind >= 0)
    if window is not None:
        expected &= behind < window
    return ((expected == seen) | ~real[:, :, None]).all()
