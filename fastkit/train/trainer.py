"""transformers' Trainer with a few things changed: atomic checkpoints, a loss over tokens, batches of like length."""

from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from fastkit.train.callbacks import Watch
from fastkit.train.config import FinetuneConfig
from fastkit.train.order import LengthGrouped
from fastkit.train.run_folder import staged

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw8bit": "paged_adamw_8bit",
}


class QLoRATrainer(Trainer):
    """Trains the adapters of a peft model; everything that is not said here is transformers' Trainer.

    * A checkpoint is written to a staging folder and takes its name in one rename, so a `checkpoint-N` is whole.
    * Validation loss is the mean over target tokens, not over batches: it does not depend on the batch size.
    * A batch holds records of like length (see `LengthGrouped`).
    * `tokens_seen` counts the tokens of the sequences (padding left out) that went through forward and backward.
    """

    _staging: Path | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens_seen = torch.zeros((), dtype=torch.int64, device=self.args.device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.tokens_seen += inputs["attention_mask"].sum().to(self.tokens_seen.device)  # stays on the device: no sync
        return super().training_step(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        was_training = self.model.training
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        targets = torch.zeros((), dtype=torch.int64, device=self.args.device)
        one = torch.ones((), device=self.args.device)
        try:
            for inputs in dataloader:
                inputs = self._prepare_inputs(inputs)
                with self.compute_loss_context_manager():
                    total += self.model(**inputs, num_items_in_batch=one).loss.double()  # a sum: divided by one
                targets += (inputs["labels"][:, 1:] != -100).sum()
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        finally:
            self.model.train(was_training)
        total, targets = self.accelerator.reduce(total), self.accelerator.reduce(targets)
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": (total / targets).item()},
            num_samples=self.num_examples(dataloader),
        )

    def _get_train_sampler(self, train_dataset=None):
        lengths = _lengths(self.train_dataset if train_dataset is None else train_dataset)
        per_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return LengthGrouped(lengths, per_step, self.args.data_seed)  # so accumulating changes no step's records

    def _get_output_dir(self, trial):
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        name = f"checkpoint-{self.state.global_step}"
        folder = Path(self.args.output_dir)
        best = self.state.best_model_checkpoint
        with staged(folder / name) as staging:
            if self.state.best_global_step:
                best = str(folder / f"checkpoint-{self.state.best_global_step}")
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.state.best_model_checkpoint = best
            written = staging / name
            self.state.save_to_json(str(written / "trainer_state.json"))
            for path in written.iterdir():
                path.rename(staging / path.name)
            written.rmdir()
        rotate_checkpoints(str(folder), self.args.save_total_limit, best)


def by_length(dataset):
    """`dataset` in the order of its records' lengths."""
    return dataset.select(sorted(range(len(dataset)), key=_lengths(dataset).__getitem__))


def _lengths(dataset) -> list[int]:
    return [len(ids) for ids in dataset["input_ids"]]


def build(config: FinetuneConfig, model, train, validation, collator, dtype: torch.dtype) -> QLoRATrainer:
    """The trainer of `config` over tokenized datasets."""
    device = model.device
    per_step = config.batch_size * config.accumulation
    steps = config.steps if config.steps > 0 else max(1, int(-(-len(train) // per_step) * config.epochs))
    eval_steps = config.eval_steps or max(1, steps // 8)
    checkpointing = config.gradient_checkpointing
    if checkpointing is None:
        checkpointing = model.base_model.model.num_parameters() > 1e9
    known = TrainingArguments.__dataclass_fields__  # transformers 5.23 renamed gradient_ to activation_checkpointing
    prefix = "activation" if "activation_checkpointing" in known else "gradient"
    args = TrainingArguments(
        output_dir=config.output,
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        **{f"{prefix}_checkpointing": checkpointing, f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}},
        learning_rate=config.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
        warmup_steps=round(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=OPTIMIZERS[config.optimizer],
        bf16=dtype == torch.bfloat16 and device.type == "cuda",
        fp16=dtype == torch.float16,  # with loss scaling
        use_cpu=device.type == "cpu",
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps or eval_steps,
        save_total_limit=config.save_total_limit,
        load_best_model_at_end=config.keep == "best",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type == "cuda",
    )
    trainer = QLoRATrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=by_length(validation),  # less padding; their order changes no loss
        data_collator=collator,
        callbacks=[Watch(config.patience)],
    )
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    return trainer
