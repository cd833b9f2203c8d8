"""transformers' Trainer with a few things changed: atomic checkpoints, a loss over tokens, batches of like length."""

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from fastkit.models.graphs import Graphs
from fastkit.train import packing, processes, sharding
from fastkit.train.callbacks import Watch
from fastkit.train.config import FinetuneConfig
from fastkit.train.flat import Flat, can_be_flat
from fastkit.train.memory import Retry
from fastkit.train.order import LengthGrouped, filled
from fastkit.train.run_folder import staged_by_all

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
    * A batch holds records of like length (see `LengthGrouped`), or rows of packed ones (see `PackedOrder`).
    * `tokens_seen` counts the tokens of the sequences (padding left out) that went through forward and backward here,
      `places_seen` those with padding.
    * Several processes see the records that one would with batches as large as theirs together; each record once.
    * A step that runs out of GPU memory begins again under leaner plans (see `Retry`).
    * With `graphs` passes are launched as CUDA graphs (see `models/graphs.py`), which add the gradients themselves.
    * With `sharded` the model is in parts (see `sharding`) from the start of training; checkpoints are whole.
    """

    _staging: Path | None = None

    def __init__(self, *args, order: Sampler, sharded: bool, graphs: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.order, self.sharded = order, sharded
        if sharded:  # the model comes wrapped already: accelerate leaves out DDP
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True, device_placement=False)
        self.retry = Retry(self.accelerator.unwrap_model(self.model))
        self.graphs = Graphs(self.accelerator.unwrap_model(self.model)) if graphs else None
        self.tokens_seen, self.places_seen = torch.zeros(2, dtype=torch.int64, device=self.args.device)

    def train(self, *args, **kwargs):
        with _settled_heap(), nullcontext() if processes.count() > 1 else _quick_zero_grad(self.model):
            return super().train(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.tokens_seen += _tokens(inputs).to(self.tokens_seen.device)  # without a sync
        self.places_seen += inputs["input_ids"].numel()
        one_pass = functools.partial(self._one_pass, model, num_items_in_batch=num_items_in_batch)
        if processes.count() > 1:  # a step that one process alone began anew would leave the others waiting
            return one_pass(inputs)
        return self.retry.run(self.state.global_step, one_pass, inputs)

    def rehearse(self) -> None:
        """Two passes before the first step, of which nothing stays but what a process does once: of a batch with the
        longest record or row and of the first batch; of the first alone where graphs are captured, for they have one
        length, and the second pass of a kind is captured.

        Binaries are loaded to the GPU and libraries begun, the host memory is pinned that plans offload to, a pass is
        captured; and if memory does not suffice, that shows (see `Retry`). By one process alone; once `train` has set
        up everything.
        """
        size = self.args.per_device_train_batch_size
        passes = self.state.max_steps * self.args.gradient_accumulation_steps
        order = list(self.order)[: passes * size]
        longest = max(range(len(order)), key=lambda at: self.order.tokens(order[at])) // size * size
        begins = (longest, 0) if self.graphs is None else (0, 0)
        one_pass = functools.partial(self._one_pass, self.model_wrapped, num_items_in_batch=torch.tensor(1))
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            for begin in begins:
                batch = [self.train_dataset[n] for n in order[begin : begin + size]]
                self.retry.run(0, one_pass, self.data_collator(batch))
        self.model.zero_grad()
        self.retry.step = None  # whose passes these were

    def _one_pass(self, model, inputs, num_items_in_batch):
        if self.graphs is not None:
            return self._captured_step(model, inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def _captured_step(self, model, inputs, num_items_in_batch):
        """`training_step`, by `graphs`."""
        if not model.training:  # else it would ask every module, each step
            model.train()
        items = torch.as_tensor(num_items_in_batch, device=self.args.device).reshape(())

        def compute(inputs):
            inputs = dict(inputs)
            with self.compute_loss_context_manager():
                return self.compute_loss(model, inputs, num_items_in_batch=inputs.pop("items"))

        return self.graphs.run(compute, self._prepare_inputs(inputs) | {"items": items})

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
        return self.order

    def create_optimizer(self, *args, **kwargs):
        if self.sharded and self.optimizer is None:  # here, when a checkpoint's adapters are loaded already
            sharding.shard(self.model)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        flat = can_be_flat(parameters) and not self.args.fp16  # which unscales one by one
        if self.optimizer is not None or not (flat or self.sharded):
            return super().create_optimizer(*args, **kwargs)
        optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        settings["weight_decay"] = self.args.weight_decay
        if self.sharded:
            self.optimizer = optimizer(parameters, **settings)
        else:
            flat = Flat(parameters)
            self.optimizer = flat.attach(optimizer([flat.parameter], **settings))
        return self.optimizer

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.sharded:
            return super().save_model(output_dir, _internal_call)
        return self._save(output_dir, state_dict=sharding.adapters(self.model))

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = sharding.whole_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint):
        if processes.count() == 1 or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in ("optimizer.pt", "scheduler.pt")
        )
        if self.sharded:
            sharding.load_state(self.optimizer, state)
        else:  # transformers 5.17 loads it to a "cpu:1", which torch does not know
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_best_model(self):
        if not self.sharded:
            return super()._load_best_model()
        sharding.load_adapters(self.model, Path(self.state.best_model_checkpoint) / "adapter_model.safetensors")

    def _get_output_dir(self, trial):
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        name = f"checkpoint-{self.state.global_step}"
        folder = Path(self.args.output_dir)
        best = self.state.best_model_checkpoint
        with staged_by_all(folder / name) as staging:
            if self.state.best_global_step:
                best = str(folder / f"checkpoint-{self.state.best_global_step}")
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.state.best_model_checkpoint = best
            processes.wait()
            written = staging / name
            if processes.is_first():
                self.state.save_to_json(str(written / "trainer_state.json"))
                for path in written.iterdir():
                    path.rename(staging / path.name)
                written.rmdir()
        if processes.is_first():
            rotate_checkpoints(str(folder), self.args.save_total_limit, best)


@contextmanager
def _quick_zero_grad(model: nn.Module) -> Iterator[None]:
    """`zero_grad` of `model` asks the parameters that are trained now, and no modules: all 2,700 of a 7B model with
    adapters take 2 ms and more, between two steps, when the GPU has nothing else to do."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    model.zero_grad = zero_grad
    try:
        yield
    finally:
        del model.zero_grad


@contextmanager
def _settled_heap() -> Iterator[None]:
    """Python's garbage collector leaves out what lives already: to look through the half a million objects of the
    libraries, the model and the data takes it some tenths of a second, every now and then in the middle of a step."""
    if gc.get_freeze_count():  # somebody else's
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def by_length(dataset):
    """`dataset` in the order of its records' lengths."""
    return dataset.select(sorted(range(len(dataset)), key=_lengths(dataset).__getitem__))


def _lengths(dataset) -> list[int]:
    return [len(ids) for ids in dataset["input_ids"]]


def _tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many tokens of a batch are a record's: neither padding nor fillers."""
    if "position_ids" in inputs:  # of packed rows
        return (inputs["position_ids"] >= 0).sum()
    return (inputs["attention_mask"] * (inputs["labels"] != -100).any(1, keepdim=True)).sum()


def _ordered(config: FinetuneConfig, model, train, per_step: int):
    """(what is trained, the order in which it is): records of like length, or with --packing on rows of records.

    Both by the whole step, so that neither accumulating nor another number of processes changes its records.
    """
    lengths = _lengths(train)
    if config.packing == "on":
        sizes = (config.max_length, config.batch_size, per_step, processes.count(), model.config.hidden_size)
        order = packing.PackedOrder(lengths, *sizes, config.seed)
        return packing.Rows(train, order), order
    full = _evened(train, config)
    return full, LengthGrouped(lengths, per_step, config.seed, len(full) - len(train))


def _evened(dataset, config: FinetuneConfig):
    """`dataset` with fillers, so that every process has as many batches."""
    return dataset if processes.count() == 1 else filled(dataset, config.batch_size * processes.count())


def build(config: FinetuneConfig, model, train, validation, collator, dtype: torch.dtype, graphs: bool) -> QLoRATrainer:
    """The trainer of `config` over tokenized datasets; graphs: whether passes are launched as CUDA graphs."""
    device = model.device
    per_step = config.batch_size * config.accumulation * processes.count()
    train, order = _ordered(config, model, train, per_step)
    steps = config.steps if config.steps > 0 else max(1, int(-(-len(order) // per_step) * config.epochs))
    eval_steps = config.eval_steps or max(1, steps // 8)
    large = model.base_model.model.num_parameters() > 1e9
    checkpointing = (large and not graphs) if config.gradient_checkpointing is None else config.gradient_checkpointing
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
        use_cache=False,  # with one, transformers does not keep packed records apart
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
    )
    trainer = QLoRATrainer(
        model,
        args,
        collator,
        train_dataset=train,
        eval_dataset=_evened(by_length(validation), config),  # less padding; their order changes no loss
        order=order,
        sharded=config.strategy == "fsdp2" and processes.count() > 1,
        graphs=graphs,
        callbacks=[Watch(config.patience)],
    )
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    return trainer
