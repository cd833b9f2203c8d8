"""LoRA adapters (arXiv:2106.09685) on a loaded model, through peft."""

import json
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

import fastkit.models.bnb  # noqa: F401  before peft imports bitsandbytes
from fastkit.errors import FastkitError
from fastkit.models import smollm2
from fastkit.models.load import first_line, load, read_tokenizer

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(
    model,
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: tuple[str, ...] | list[str] = PROJECTIONS,
    seed: int = 0,
):
    """Freeze `model` and add trainable LoRA matrices A [rank, in] and B [out, rank] to its linear layers.

    Each target computes `x @ W.T + (alpha / rank) * dropout(x) @ A.T @ B.T`. B starts at zero, so the model starts
    unchanged. The adapters are fp32 whatever the model's dtype: an update of 1e-4 of a weight is lost in bf16.

    Args:
        rank: of the adapters, 1 or more.
        alpha: the scale's numerator; None for `alpha = rank`, a scale of 1.
        dropout: probability on the adapter's input, in [0, 1).
        targets: names of linear layers; by default all seven projections of a decoder layer.
        seed: of A.

    Returns the peft model. Raises FastkitError for a bad value, or a target that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise FastkitError(f"LoRA rank {rank} must be 1 or more")
    if not 0 <= dropout < 1:
        raise FastkitError(f"LoRA dropout {dropout} must be in [0, 1)")
    if hasattr(model, "peft_config"):
        raise FastkitError("the model already has an adapter: load it anew, or merge the adapter first")
    present = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    if unknown := [t for t in targets if t not in present]:
        raise FastkitError(f"the model has no linear layer named {unknown[0]!r}: it has {', '.join(sorted(present))}")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws A on the CPU or the weight's device
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        with _quiet():
            return get_peft_model(model, config)


def load_adapter(adapter: str | None, *, model: str | None = None, device: str = "auto", dtype: str = "auto"):
    """Load a model with the LoRA adapter in the folder `adapter`; without one, the model alone.

    `model` names the base; by default the one that the adapter's `adapter_config.json` names, or smollm2.
    Returns (model, tokenizer) in eval mode, the tokenizer being the adapter's own where it has one.
    Raises FastkitError for a folder that holds no adapter, or pickle weights.
    """
    from peft import PeftModel

    if adapter is None:
        return load(model or "smollm2", device=device, dtype=dtype)
    folder = Path(adapter)
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise FastkitError(f"{folder} holds no adapter: it has no adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        raise FastkitError(f"{folder} has no adapter_model.safetensors: pickle adapters are not loaded")
    model = model or base_of(json.loads(config.read_text()))
    if not model:
        raise FastkitError(f"{config} names no base model: name it with model")
    if Path(model).is_absolute() and not Path(model).exists():
        raise FastkitError(f"{config} has {model} for its base, which is not here: name it with --model")
    base, tokenizer = load(model, device=device, dtype=dtype)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = read_tokenizer(folder)
    try:
        with _quiet():
            return PeftModel.from_pretrained(base, folder).eval(), tokenizer
    except (ValueError, RuntimeError, SafetensorError) as error:  # other layers, other shapes, a broken file
        raise FastkitError(f"the adapter {folder} does not fit {model}: {first_line(error)}; name its base") from error


def base_of(config: dict) -> str | None:
    """The base that an adapter's config names; smollm2 in the cache of another user or machine is smollm2 here."""
    base = config.get("base_model_name_or_path")
    elsewhere = base and Path(base).name == smollm2.NAME and Path(base).is_absolute() and not Path(base).exists()
    return "smollm2" if elsewhere else base


@contextmanager
def _quiet():
    with warnings.catch_warnings():  # peft reads an attribute that transformers 5.23 renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
