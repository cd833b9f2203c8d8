"""The fused decoder layer under padding, packing, windows and other masks."""

import pytest
import torch
from fused_case import WINDOWED, assert_same_step, batch, fused, layers_of, model_of, step
from tiny import ARCHITECTURES

from fastkit.models.projection import Refusal
from fastkit.models.sequences import Sequences


def packed(lengths, rows=1):
    ids = torch.randint(3, 300, (rows, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(rows, -1).contiguous()
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


BATCHES = {
    "whole": lambda: batch([11, 11]),
    "padded on the right": lambda: batch([11, 7, 1]),
    "padded on the right to a width": lambda: batch([6, 4], width=16),
    "padded on the left": lambda: batch([11, 7, 1], left=True),
    "packed": lambda: packed([4, 9, 1]),
    "packed in rows": lambda: packed([8, 3], rows=2),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(
    ("arch", "implementation"), [*((arch, "sdpa") for arch in ARCHITECTURES), ("llama", "eager"), ("qwen2", "eager")]
)
def test_batches(folder, references, fresh_seed, recwarn, arch, implementation, name):
    model, tokens = model_of(folder, arch, **WINDOWED.get(arch, {})), BATCHES[name]()
    model.base_model.model.set_attn_implementation(implementation)
    assert_same_step(step(fused(model), **tokens), step(model, **tokens))
    assert not [w for w in recwarn if "not fused" in str(w.message)]


def test_a_packed_batch_through_the_kernels(folder, fresh_seed):
    model, tokens = model_of(folder), packed([3, 5])
    assert_same_step(step(fused(model), **tokens), step(model, **tokens))


def test_a_mask_is_read_once_for_all_layers(folder, references, monkeypatch):
    from fastkit.models import sequences

    calls = []
    read = sequences._read
    monkeypatch.setattr(sequences, "_read", lambda *args: calls.append(1) or read(*args))
    model = fused(model_of(folder))
    step(model, **batch([9, 5]))
    assert len(calls) == 1
    step(model, **batch([9, 5]))
    assert len(calls) == 2


def test_other_masks_go_through_transformers_and_are_said(folder, references, monkeypatch):
    model, ids = model_of(folder), torch.randint(3, 300, (1, 9))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[:4, :4] = True  # a prefix that sees itself whole
    tokens = {"input_ids": ids, "labels": ids, "attention_mask": mask[None, None]}
    ours = fused(model)
    with pytest.warns(UserWarning, match="neither causal, nor padding, nor packing"):
        result = step(ours, **tokens)
    theirs = step(model, **tokens)
    assert_same_step(result, theirs)
    mask[:4, :4] = torch.ones(4, 4, dtype=torch.bool).tril()  # changed in place: now it is causal
    with monkeypatch.context() as patcher:
        patcher.setattr(type(layers_of(ours)[0]), "forward", None)
        result = step(ours, **tokens)
    assert_same_step(result, step(model, **tokens))


@pytest.mark.parametrize(
    ("mask", "positions", "ends"),
    [
        ([[1, 1, 1, 0], [1, 1, 1, 1]], None, None),
        ([[0, 0, 1, 1], [1, 1, 1, 0]], None, [0, 2, 4, 7, 8]),
        (None, [[0, 1, 2, 3]], None),
        (None, [[5, 6, 0, 1, 2, 0]], [0, 2, 5, 6]),
        (None, [[0, 1, 0, 1], [0, 1, 2, 3]], None),  # there transformers looks at one row alone
    ],
)
def test_what_flash_attention_is_given(mask, positions, ends):
    given = [None if x is None else torch.tensor(x) for x in (mask, positions)]
    rows = next(x for x in given if x is not None)
    found = Sequences().read(*given, *rows.shape, None, "flash_attention_2")
    assert (found is None) == (ends is None)
    if found:
        assert found.cu_seqlens.tolist() == ends and found.cu_seqlens.dtype == torch.int32
        assert found.longest == found.cu_seqlens.diff().max()


def test_masks_that_cannot_be_read():
    for mask, why in (
        (torch.ones(2, 1, 4, 5), r"shape \(2, 1, 4, 5\) for 2 rows of 4 tokens"),
        (torch.zeros(2, 3, 4, 4), r"shape \(2, 3, 4, 4\)"),
        ({}, "a dict"),
    ):
        with pytest.raises(Refusal, match=why):
            Sequences().read(mask, None, 2, 4, None, "sdpa")
