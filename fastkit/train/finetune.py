"""A QLoRA fine-tune from one call, or step by step as the notebook does it."""

import time
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed

from fastkit.errors import FastkitError
from fastkit.lab.device import card, has_triton, peak_gib, reset_peak, versions
from fastkit.models import add_lora, budget, graphs, load
from fastkit.models.attend import is_torchs
from fastkit.models.chat import answer
from fastkit.models.estimate import estimate, parse_bytes
from fastkit.models.load import resolve_device, resolve_dtype
from fastkit.train import data, facts, packing, private, processes, run_folder, sharding
from fastkit.train import trainer as trainer_
from fastkit.train.callbacks import Bar, LivePlot, Rehearsal, Spent, curves, in_notebook
from fastkit.train.config import FinetuneConfig
from fastkit.train.memory import growing_segments
from fastkit.train.model_card import write_card

FEW = 10  # answers to validate on, below which a warning says so


def finetune(**settings) -> dict:
    """Fine-tune in one call; `settings` are those of FinetuneConfig. Returns what `metrics.json` holds."""
    with FineTune(**settings) as run:
        run.prepare()
        run.train()
        run.save()
    return run.metrics


class FineTune:
    """One fine-tune: `prepare`, then `train`, then `save`; `metrics` grows along the way.

    Attributes after `prepare`: `model` (peft), `tokenizer`, `train_set`, `validation_set` (tokenized), `asked` (the
    questions that carry a fact), `samples` (the first questions that carry none), `trainer`, `folder`.

    With `private` all three belong into `with FineTune(...) as run:` (see `private.private`), at whose end `model` and
    `trainer` are gone; else `with` does nothing.

    Raises FastkitError for every bad setting, file or model, before anything is written but the run's own folder.
    """

    def __init__(self, **settings):
        try:
            self.config = FinetuneConfig(**settings)
        except TypeError as error:
            raise FastkitError(f"unknown setting: {error}") from error
        self.config.check()
        self.metrics = {"config": self.config.as_dict()}
        self._ending, self._finished = ExitStack(), False

    def __enter__(self) -> "FineTune":
        if self.config.private:
            self._ending.enter_context(private.private(self.config.output, self._let_go))
        return self

    def __exit__(self, *error) -> None:
        self._ending.__exit__(*error)

    def _let_go(self) -> tuple:
        model, trainer = (vars(self).pop(name, None) for name in ("model", "trainer"))
        return model, getattr(trainer, "optimizer", None)

    def prepare(self) -> "FineTune":
        """Load and check everything; evaluate the model as it is."""
        config = self.config
        if config.private:
            private.check(config.model)
        else:  # what goes back to the driver is known of whole segments
            growing_segments()
        device = resolve_device(processes.device_of(config.device))
        processes.join(device)
        self.dtype = resolve_dtype(config.dtype, device)
        use_kernels = self._use_kernels(device)
        if config.compute == "fp8":
            self._check_fp8(use_kernels, device)
        if not use_kernels and (config.plan not in ("auto", "off") or config.budget):
            self._say_unused(device)
        self._settle_packing(use_kernels and device.type == "cuda")
        train_records, validation_records = data.load_splits(
            config.data, config.validation_fraction, config.seed, config.validation
        )
        processes.by_first(lambda: run_folder.check(config))
        set_seed(config.seed)
        base, self.tokenizer = load(
            config.model,
            random_weights=config.random_weights,
            device=str(device),
            dtype=config.dtype,
            seed=config.seed,
        )
        context = getattr(base.config, "max_position_embeddings", None)
        tokenize = dict(max_length=config.max_length, on_long=config.on_long, context=context)
        self.train_set = data.tokenize_records(train_records, self.tokenizer, **tokenize)
        self.validation_set = data.tokenize_records(validation_records, self.tokenizer, **tokenize)
        if len(self.validation_set) < FEW and (answers := data.count_answers(self.validation_set)) < FEW:
            warnings.warn(
                f"the validation loss rests on {answers} answer{'s' * (answers > 1)}: add records, or give more by "
                "--validation or --validation_fraction",
                stacklevel=2,
            )
        self.asked = facts.questions(validation_records) if config.facts else []
        self.samples = facts.samples(validation_records, config.samples)
        self.model = add_lora(base, rank=config.rank, alpha=config.alpha, dropout=config.dropout, seed=config.seed)
        self.device = device
        if use_kernels:
            self._patch()
        captured = self._captures()
        self.folder = processes.by_first(lambda: run_folder.claim(config))
        columns = ["input_ids", "labels"]
        self.trainer = trainer_.build(
            config,
            self.model,
            self.train_set.select_columns(columns),
            self.validation_set.select_columns(columns),
            self._collator(captured),
            self.dtype,
            captured,
        )
        if config.packing == "on" and processes.is_first():
            print(self.trainer.order)
        self.metrics |= {
            "card": card(device),
            "processes": processes.count(),
            "versions": versions(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "graphs": captured,
            "data": {"train": data.describe(self.train_set), "validation": data.describe(self.validation_set)},
            "parameters": self._parameters(),
            "before": self.evaluate(),
        }
        return self

    def train(self) -> dict:
        """Train, from the last checkpoint if `resume`; returns the metrics so far.

        Of a run that has come to its end nothing is trained: `model` and `metrics` become what it left.
        """
        steps = self.trainer.args.max_steps
        if self.config.resume and (left := processes.by_first(lambda: run_folder.finished(self.folder, steps))):
            self.metrics, weights = left
            print(f"already finished: {self.metrics['steps']} steps")
            self.model.load_adapter(str(weights), self.model.active_adapter, is_trainable=True)
            self._finished = True
            return self.metrics
        checkpoint = run_folder.last_checkpoint(self.folder) if self.config.resume else None
        if self.config.resume:
            print(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting from step 0")
        reset_peak(self.device)
        self.trainer.tokens_seen.zero_()
        self.trainer.places_seen.zero_()
        if self.device.type == "cuda" and processes.count() == 1:
            self.trainer.add_callback(Rehearsal(self.trainer.rehearse))
        timer = StepTimer()
        self.trainer.add_callback(timer)
        if self.config.progress and processes.is_first():
            before = self.metrics["before"]["validation_loss"]
            self.trainer.add_callback(LivePlot(before) if in_notebook() else Bar())
        seen = (self.trainer.tokens_seen, self.trainer.places_seen)
        spent = Spent(lambda: tuple(int(processes.total(of)) for of in seen))
        self.trainer.add_callback(spent)
        with self._out_of_memory():
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.trainer.graphs = None  # and the memory that they hold
        state = self.trainer.state
        took, (tokens, _) = spent.total(), spent.count()
        training, validation = curves(state.log_history)
        self.metrics |= {
            "steps": state.global_step,
            "resumed_from": checkpoint.name if checkpoint else None,
            "stopped_early": state.global_step < state.max_steps,
            "exported_step": state.best_global_step if self.config.keep == "best" else state.global_step,
            "seconds": round(took["seconds"], 2),
            "tokens": took["tokens"],  # as the seconds, with those of the parts before --resume
            "padding": round(1 - took["tokens"] / took["places"], 4) if took["places"] else None,  # a part of all
            "tokens_per_second": timer.rate(tokens),  # of this part
            "peak_memory_gib": round(peak_gib(self.device), 3),
            "plans_switched": self.trainer.retry.switched,
            "losses": training,
            "validation_losses": validation,
        }
        known = dict(validation).get(self.metrics["exported_step"])  # of the very weights that are exported
        self.metrics["after"] = self.evaluate(known)
        return self.metrics

    def save(self) -> Path:
        """Write the adapter (safetensors, adapter_config.json, tokenizer) and metrics.json; returns its folder.

        What a run that had come to its end left is not written again.
        """
        target = self.folder / "adapter"
        if self._finished and processes.by_first(target.is_dir):
            return target
        weights = sharding.adapters(self.model) if self.trainer.sharded else None  # from all processes
        if processes.is_first():
            with run_folder.staged(target) as staging:
                self.model.save_pretrained(staging, state_dict=weights, safe_serialization=True)
                self.tokenizer.save_pretrained(staging)
                write_card(staging, "adapter", self.config, self.metrics)
            if not self._finished:
                run_folder.write_json(self.folder / "metrics.json", self.metrics)
        processes.wait()
        return target

    def evaluate(self, validation_loss: float | None = None) -> dict:
        """Validation loss (computed unless it is known), known facts, and the answers to the sample questions."""
        with self._out_of_memory():
            if validation_loss is None:  # not Trainer.evaluate: it would log a point into the run's curve
                loop = self.trainer.evaluation_loop(self.trainer.get_eval_dataloader(), "evaluation")
                validation_loss = loop.metrics["eval_loss"]
            result = {"validation_loss": validation_loss}
            if self.asked:
                result["facts"] = facts.score(self.model, self.tokenizer, self.asked)
            if self.samples:
                texts = answer(self.model, self.tokenizer, self.samples, max_new_tokens=96)
                questions = [chat[-1]["content"] for chat in self.samples]
                result["samples"] = [{"question": q, "answer": a} for q, a in zip(questions, texts, strict=True)]
        return result

    def _use_kernels(self, device: torch.device) -> bool:
        wanted = self.config.kernels
        if wanted == "off" or (wanted == "auto" and device.type == "cpu"):
            return False
        if device.type == "cuda" and not has_triton():
            if wanted == "on":
                raise FastkitError("--kernels on needs triton, which does not import: pip install triton, or leave it")
            warnings.warn("triton does not import: the model runs on torch's slower operations", stacklevel=3)
            return False
        return True

    def _say_unused(self, device: torch.device) -> None:
        config = self.config
        given = f"--plan {config.plan}" + (f" and --budget {config.budget} are" if config.budget else " is")
        why = f"kernels are off{' on the CPU' if device.type == 'cpu' else ''} (--kernels {config.kernels})"
        warnings.warn(f"{given} not used: {why}", stacklevel=3)

    def _check_fp8(self, use_kernels: bool, device: torch.device) -> None:
        if not use_kernels:
            raise FastkitError("--compute fp8 is for fused layers, and this run has none: add --kernels on")
        if device.type == "cuda" and self.dtype != torch.bfloat16:
            dtype = str(self.dtype).removeprefix("torch.")
            raise FastkitError(f"--compute fp8 gives bfloat16, and this run is in {dtype}: add --dtype bf16")

    def _settle_packing(self, kernels_on_gpu: bool) -> None:
        """Decide what --packing auto is, and keep that as the setting: a resumed run must pack as it did."""
        if self.config.packing == "auto":
            self.config.packing = "on" if kernels_on_gpu and self.config.plan != "off" else "off"
        self.metrics["config"]["packing"] = self.config.packing

    def _captures(self) -> bool:
        """Whether passes are launched as CUDA graphs. Raises FastkitError where they should be and cannot."""
        config, wanted = self.config, self.config.graphs
        if wanted == "off":
            return False
        why = graphs.lacking(self.model)
        if not why and config.packing == "off":
            why = "its batches are of several lengths, without --packing on"
        if not why and config.gradient_checkpointing:
            why = "leave --gradient_checkpointing to its plan"
        if not why and config.private:
            why = "--private overwrites memory that a graph holds on to"
        if not why and self.dtype == torch.float16:
            why = "its losses are scaled by what changes from step to step, in fp16"
        if not why and is_torchs(self.device, self.dtype):
            dtype = str(self.dtype).removeprefix("torch.")
            why = f"attention in {dtype} is torch's on this card, which is told by the host where packed records end"
        if why and wanted == "on":
            raise FastkitError(f"--graphs on: a step of this model cannot be captured: {why}")
        tokens, parameters = config.batch_size * config.max_length, self.model.get_base_model().num_parameters()
        small = graphs.SMALL * (2 if config.compute == "fp8" else 1)  # which works half as long on what is launched
        return not why and (wanted == "on" or tokens * parameters <= small)

    def _collator(self, captured: bool) -> data.Collator:
        pad = self.tokenizer.pad_token_id
        if self.config.packing == "off":
            return data.Collator(pad)
        return packing.RowCollator(pad, self.config.max_length if captured else None)

    def _patch(self) -> None:
        """Let the model learn through the kernels, its layers under the plan that the settings ask for."""
        from fastkit.models.patch import fused_layers, patch, set_plan

        config, plan = self.config, self.config.plan
        its_plan = None if plan in ("auto", "off") else plan
        report = patch(self.model, plan=its_plan, layers=plan != "off", compute=config.compute)
        self.metrics["kernels"] = report.as_dict()
        if plan == "off":
            return
        for why, names in report.left_by_reason():
            warnings.warn(f"{names} runs through transformers: {why}", stacklevel=3)
        if not (layers := fused_layers(self.model)) or report.left:
            return  # an estimate would be of another model
        size = dict(batch=config.batch_size, length=config.max_length, optimizer=config.optimizer)
        size |= dict(dtype=self.dtype, compute=config.compute)
        size |= dict(captured=self._captures(), buffered=processes.count() > 1, accumulated=config.accumulation > 1)
        if plan == "auto":
            chosen = budget.choose(self.model, self._budget(), rates=budget.rates(self.device, self.dtype), **size)
            set_plan(self.model, chosen.plans)
        else:
            chosen = estimate(self.model, [layer.plan for layer in layers], **size)
        if processes.is_first():
            print(chosen)
        self.metrics["memory"] = chosen.as_dict()

    def _budget(self) -> int:
        """Bytes that the run may take; what --budget says is the process's limit from here on."""
        on_gpu, wanted = self.device.type == "cuda", self.config.budget
        if not on_gpu:
            return parse_bytes(wanted or "1000GiB")
        free, total = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device)
        if wanted is None:
            return free
        if (limit := parse_bytes(wanted)) > free:
            raise FastkitError(f"--budget {wanted} is more than the {free / 2**30:.1f} GiB that are free on the GPU")
        torch.cuda.set_per_process_memory_fraction(limit / total, self.device)
        return limit

    def _parameters(self) -> dict:
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {
            "base": self.model.get_base_model().num_parameters() - trainable,
            "adapters": trainable,
            "base_gib": round(self.model.get_memory_footprint() / 2**30, 3),
        }

    @contextmanager
    def _out_of_memory(self):
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            config = self.config
            raise FastkitError(
                f"out of GPU memory at batch_size {config.batch_size}, max_length {config.max_length} (peak "
                f"{peak_gib(self.device):.1f} GiB): halve --batch_size and double --accumulation, or shorten "
                f"--max_length{', or leave out --plan off' if config.plan == 'off' else ''}; checkpoints are kept"
            ) from error


class StepTimer(TrainerCallback):
    """Seconds spent in optimizer steps alone: validation and checkpoints are left out."""

    def __init__(self):
        self.seconds, self.began = [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:  # the loss was read back, so the step's work on the device is done
            self.seconds.append(time.perf_counter() - self.began)

    def rate(self, tokens: int) -> float | None:
        """Tokens a second: the mean tokens of a step over its median time."""
        if not self.seconds:
            return None
        ordered = sorted(self.seconds)
        return round(tokens / len(ordered) / ordered[len(ordered) // 2], 1)
