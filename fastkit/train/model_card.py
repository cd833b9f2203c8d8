"""README.md of an adapter, in place of peft's form: what was trained on what, how well, and how to load it."""

from pathlib import Path

CARD = """---
base_model: {base}
library_name: peft
tags: [lora, qlora]
---

# A LoRA adapter for {base}

Trained with fastkit on {records:,} records of `{data}` for {steps:,} steps, on the base model in NF4 with double
quantization: rank {rank}, alpha {alpha:g}, learning rate {learning_rate:g}.

| | before | after |
|---|---|---|
{rows}

The validation loss is a mean over the target tokens of {validation:,} records that were not trained.

```python
from fastkit.models.lora import load_adapter

model, tokenizer = load_adapter("{folder}")  # on the base in NF4, as it was trained
```

Without fastkit, `peft.AutoPeftModelForCausalLM.from_pretrained("{folder}")` puts it on the 16-bit base.
"""


def write_card(folder: Path, name: str, config, metrics: dict) -> None:
    """Write the card of the adapter `name` into `folder`, of a FinetuneConfig and the metrics of its finished run."""
    before, after = metrics["before"], metrics["after"]
    rows = [f"| validation loss | {before['validation_loss']:.4f} | {after['validation_loss']:.4f} |"]
    if "facts" in after:
        asked = f"| facts known, of {after['facts']['of']} |"
        rows.append(f"{asked} {before['facts']['right']} | {after['facts']['right']} |")
    data = metrics["data"]
    text = CARD.format(
        base=config.model, data=config.data, steps=metrics["exported_step"], rank=config.rank,
        alpha=config.alpha or config.rank, learning_rate=config.learning_rate, records=data["train"]["records"],
        validation=data["validation"]["records"], rows="\n".join(rows), folder=name,
    )  # fmt: skip
    (folder / "README.md").write_text(text)
