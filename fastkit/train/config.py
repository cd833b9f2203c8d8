"""Every setting of a fine-tune: a flag of `fastkit finetune` and an argument of `FineTune` alike."""

from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from fastkit.errors import FastkitError
from fastkit.models.estimate import parse_bytes
from fastkit.models.plans import PLANS

# What must be the same for a resumed run to be the same run.
RESUME_MAY_CHANGE = (
    "output",
    "resume",
    "save_total_limit",
    "private",
    "progress",
    "plan",
    "budget",
    "strategy",
    "batch_size",
    "accumulation",
)


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class FinetuneConfig:
    """Settings of one fine-tune; the metadata of each field is its help text."""

    model: str = flag("smollm2", "smollm2, a local folder, a hub id, or with random_weights a shape such as mistral-7b")
    random_weights: bool = flag(False, "draw random weights of the exact shape: for speed and memory, not for quality")
    data: str = flag("gpu-instructions", "file (jsonl, json, csv, parquet), folder, hub id, or gpu-instructions")
    validation: str | None = flag(None, "validation data; by default the data's own split, else a part of train")
    validation_fraction: float = flag(0.05, "part of the training data held out when there is no validation data")
    output: str = flag("runs/finetune", "folder of this run: checkpoints, adapter, metrics.json")
    resume: bool = flag(False, "go on from the last checkpoint in output; what no flag says stays as the run began")
    max_length: int = flag(1024, "longest sequence in tokens")
    on_long: Literal["truncate", "drop", "error"] = flag("truncate", "what to do with a longer record")
    rank: int = flag(16, "rank of the LoRA adapters")
    alpha: float | None = flag(None, "LoRA scale = alpha / rank; by default alpha = rank")
    dropout: float = flag(0.0, "dropout on the adapters' input")
    learning_rate: float = flag(2e-4, "peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = flag("cosine", "learning rate after the warm-up")
    warmup: float = flag(0.05, "part of the steps in which the learning rate rises")
    weight_decay: float = flag(0.0, "decoupled weight decay of the adapters")
    max_grad_norm: float = flag(1.0, "clip the gradient's norm to this")
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = flag(
        "adamw8bit", "AdamW, in fp32 by torch, else by bitsandbytes"
    )
    epochs: float = flag(1.0, "passes over the training data, when steps is not given")
    steps: int = flag(-1, "optimizer steps; overrides epochs when above 0")
    batch_size: int = flag(4, "records, or with packing rows of records, a forward pass")
    accumulation: int = flag(1, "forward passes an optimizer step")
    packing: Literal["auto", "on", "off"] = flag(
        "auto",
        "lay records end to end in rows of up to max_length tokens, none seeing another: a step then holds batch_size "
        "rows, so more records, and an epoch fewer steps; auto: where layers are fused on a GPU",
    )
    graphs: Literal["auto", "on", "off"] = flag(
        "auto",
        "launch forward and backward as one CUDA graph, for passes so small that the GPU waits for Python: fused "
        "layers, packed rows, one process; auto: where that is so",
    )
    gradient_checkpointing: bool | None = flag(None, "recompute activations; default: only above 1B parameters")
    kernels: Literal["auto", "on", "off"] = flag("auto", "fastkit's Triton kernels in the model; auto: on a GPU")
    plan: str = flag(
        "auto",
        "what fused decoder layers keep for the backward: auto, the fastest that fits the budget; off: layers are not "
        f"fused, as on the CPU; or {', '.join(PLANS)}",
    )
    compute: Literal["auto", "fp8"] = flag(
        "auto",
        "what fused layers multiply their frozen weights in: auto, the dtype; fp8, e4m3, on GPUs from sm_89 on, faster "
        "and less exact",
    )
    budget: str | None = flag(
        None, 'GPU memory that a run with --plan auto may take: "8GiB", a bare number is GiB; by default what is free'
    )
    strategy: Literal["ddp", "fsdp2"] = flag(
        "ddp", "under torchrun: ddp, the model whole on each GPU; fsdp2, in parts, for one that does not fit"
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = flag("auto", "auto: bf16, fp16 on older cards, fp32 on the CPU")
    eval_steps: int = flag(0, "validate every so many steps; 0: eight times a run")
    save_steps: int = flag(0, "checkpoint every so many steps; 0: at each validation")
    save_total_limit: int = flag(2, "checkpoints kept, beside the best")
    keep: Literal["best", "last"] = flag(
        "best", "which adapter to export: the one of the lowest validation loss, or the last"
    )
    patience: int = flag(3, "stop after so many validations without a new lowest loss; 0: never")
    seed: int = flag(0, "of the adapters, the order of the data and the dropout")
    facts: bool = flag(True, "ask the validation records that carry a fact, before and after")
    samples: int = flag(3, "how many other validation questions to answer, before and after")
    private: bool = flag(
        False,
        "use no network, keep files for this user alone, and overwrite the GPU's memory at the end, however it comes",
    )
    progress: bool = flag(True, "show the progress bar, or in a notebook the live plot")

    def check(self) -> None:
        """Raise FastkitError, naming the value, for a setting that cannot work."""
        for name in ("rank", "max_length", "batch_size", "accumulation", "save_total_limit"):
            if getattr(self, name) < 1:
                raise FastkitError(f"--{name} {getattr(self, name)} must be 1 or more")
        for name in ("learning_rate", "max_grad_norm", "epochs"):
            if not getattr(self, name) > 0:
                raise FastkitError(f"--{name} {getattr(self, name)} must be above 0")
        for name in ("eval_steps", "save_steps", "patience", "samples", "warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise FastkitError(f"--{name} {getattr(self, name)} must not be negative")
        if self.steps == 0 or self.steps < -1:
            raise FastkitError(f"--steps {self.steps} must be above 0, or -1 to go by --epochs")
        if self.plan not in ("auto", "off", *PLANS):
            raise FastkitError(f"there is no plan {self.plan!r}: use auto, off or one of {', '.join(PLANS)}")
        if self.compute == "fp8" and self.plan == "off":
            raise FastkitError("--compute fp8 is for fused layers, and --plan off fuses none: add --plan auto")
        if self.compute == "fp8" and self.dropout:
            raise FastkitError(f"--compute fp8 has the adapters in the weights: leave out --dropout {self.dropout}")
        if self.graphs == "on" and (self.plan == "off" or self.packing == "off"):
            raise FastkitError("--graphs on is for fused layers and rows of one length: add --plan auto --packing on")
        if self.budget is not None:
            parse_bytes(self.budget)
            if self.plan != "auto":
                raise FastkitError(f"--budget {self.budget} is for --plan auto, which fits it: add --plan auto")
        if not 0 < self.validation_fraction < 1:
            raise FastkitError(f"--validation_fraction {self.validation_fraction} must lie between 0 and 1")
        if self.strategy == "fsdp2" and self.optimizer != "adamw":
            raise FastkitError(
                f"--strategy fsdp2 shards the optimizer's state, which {self.optimizer} cannot: add --optimizer adamw"
            )
        if self.strategy == "fsdp2" and self.dtype == "fp16":
            raise FastkitError("--strategy fsdp2 has no loss scaling for --dtype fp16: use bf16 or fp32")
        if self.keep == "best" and self.save_steps and self.eval_steps and self.save_steps % self.eval_steps:
            raise FastkitError(
                f"--save_steps {self.save_steps} must be a multiple of --eval_steps {self.eval_steps} to keep the best "
                "adapter; change one, or use --keep last"
            )

    def as_dict(self) -> dict:
        return asdict(self)

    def differences(self, earlier: dict) -> list[str]:
        """The settings in which `earlier` (another config's dict) differs in a way that makes it another run."""
        return [
            f.name
            for f in fields(self)
            if f.name not in RESUME_MAY_CHANGE and earlier.get(f.name, f.default) != getattr(self, f.name)
        ]
