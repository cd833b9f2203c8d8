"""A patched model in trl's SFTTrainer, as anybody would use it."""

import copy

import pytest
import torch
from datasets import load_dataset
from fused_case import LAYERS, model_of
from tiny import tiny_data
from transformers import AutoTokenizer

from fastkit.models import attend
from fastkit.models.patch import patch

pytestmark = [pytest.mark.usefixtures("references"), pytest.mark.slow]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_trainer_learns_the_same(folder, tmp_path, monkeypatch, packing):
    from trl import SFTConfig, SFTTrainer

    attends, run = [], attend.attend
    monkeypatch.setattr(attend, "attend", lambda *args: attends.append(1) or run(*args))
    stock = model_of(folder, attn_implementation="sdpa")
    ours = copy.deepcopy(stock)
    assert patch(ours, "recompute-mlp-qkv+offload").layers == LAYERS
    tokenizer = AutoTokenizer.from_pretrained(stock.get_base_model().name_or_path)
    data = load_dataset("json", data_files=str(tiny_data(tmp_path / "data") / "train.jsonl"), split="train")
    curves = []
    for name, model in (("ours", ours), ("stock", stock)):
        args = SFTConfig(
            output_dir=str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            max_length=48,
            packing=packing,
            packing_strategy="wrapped",
            eval_strategy="steps",
            eval_steps=3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
        trainer.train()
        curves.append([h.get("loss", h.get("eval_loss")) for h in trainer.state.log_history if "train_loss" not in h])
    assert len(attends) == 3 * 2 * LAYERS
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())
    # trl rounds adapters to bf16, which transformers multiplies in bf16, and the merged weight takes in exactly
    drift = torch.tensor(curves[0]) - torch.tensor(curves[1])
    assert len(curves[0]) == 4 and drift.abs().max() <= 1e-3
