"""Whether our layers learn what transformers' do: the same fine-tune of both, loss beside loss.

    fastkit bench learning --steps 30 --dtype fp32 --plan keep recompute-all

The yardstick is transformers + peft + bitsandbytes; ours is the same model after `patch`, once for each plan and what
its products run in. All start from the same weights and adapters and see the same records in the same order, batched
alike; the same optimizer moves the adapters, their gradients clipped to the same norm, at a constant learning rate.

A step's loss is the mean over all its target tokens, into however many passes its records are split and whether they
are padded or packed: so runs of other --accumulation or --packed have the same losses too, but for rounding.

Validation is by transformers' own layers, in all: it compares what was learned.

In bf16 transformers rounds itself: peft adds an adapter's output to a projection's that is rounded already, and as long
as it is less than half a unit in the last place there, it is lost. Ours adds the adapter to the weight before the one
rounding. --truth runs transformers in fp32 as well, and says how far from that each of the others is.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from fastkit.errors import FastkitError
from fastkit.lab.device import card
from fastkit.lab.results import record
from fastkit.models import add_lora, load
from fastkit.models.bnb import bnb
from fastkit.models.load import resolve_device, resolve_dtype
from fastkit.models.patch import patch
from fastkit.models.plans import PLANS, plan_of
from fastkit.train import data
from fastkit.train.config import flag
from fastkit.train.order import LengthGrouped
from fastkit.train.packing import RowCollator

FIRST = 30  # steps in which fp32 stays together; later, rounding has grown by way of the optimizer
TRUTH = "transformers, fp32"
EVERY = 10  # lines of losses printed


@dataclass(frozen=True)
class Limits:
    """What ours may differ by. None: not judged.

    each        of the losses of the first FIRST steps, the largest difference
    mean        of all steps' differences, each as a part of transformers' loss
    validation  of the validation losses, as a part of transformers'
    """

    each: float | None = None
    mean: float | None = None
    validation: float | None = None


LIMITS = {"fp32": Limits(each=1e-4), "bf16": Limits(mean=0.006, validation=0.003), "fp8": Limits(validation=0.015)}


@dataclass
class SameLearningConfig:
    """Settings of `fastkit bench learning`."""

    plan: list[str] = field(
        default_factory=lambda: ["keep"], metadata={"help": "recompute plans of ours, a run each; all: every one"}
    )
    model: str = flag("smollm2", "smollm2, a local folder or a hub id")
    data: str = flag("gpu-instructions", "as in finetune")
    steps: int = flag(300, "optimizer steps")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "auto: bf16 on a GPU, fp32 on the CPU")
    compute: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={"help": "what our frozen weights' products run in: auto (--dtype), fp8; or both"},
    )
    rank: int = flag(16, "rank of the LoRA adapters; alpha is the same")
    learning_rate: float = flag(2e-4, "constant")
    optimizer: Literal["adamw8bit", "adamw"] = flag("adamw8bit", "bitsandbytes' AdamW with 8-bit state, or torch's")
    max_grad_norm: float = flag(1.0, "clip the gradient's norm to this")
    batch_size: int = flag(4, "records a step")
    accumulation: int = flag(1, "passes that a step's records are split into")
    packed: bool = flag(False, "a pass's records in one row, one behind the other, instead of padded")
    max_length: int = flag(512, "longest record in tokens; longer ones are cut")
    validation_records: int = flag(64, "records of the validation data to judge by")
    repeat_stock: bool = flag(False, "run transformers a second time: what differs from run to run anyway")
    truth: bool = flag(False, "run transformers in fp32 too: how far from what it learns are the others")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    seed: int = flag(0, "of the adapters and the order of the records")
    record: str | None = flag(None, "write the losses to data/results under this name")
    json: bool = flag(False, "print the result as JSON")

    def check(self) -> None:
        """Raise FastkitError, naming the value, for a setting that cannot work."""
        for name in ("steps", "rank", "batch_size", "accumulation", "validation_records"):
            if getattr(self, name) < 1:
                raise FastkitError(f"--{name} {getattr(self, name)} must be 1 or more")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise FastkitError(f"--{name} {getattr(self, name)} must be above 0")
        if self.batch_size % self.accumulation:
            raise FastkitError(
                f"--batch_size {self.batch_size} records do not split into --accumulation {self.accumulation} passes: "
                "take a multiple"
            )
        for compute in self.compute:
            if compute not in ("auto", "fp8"):
                raise FastkitError(f"--compute {compute!r} is unknown: use auto, fp8, or both")
        self.plan = list(PLANS) if self.plan == ["all"] else [plan_of(plan).name for plan in self.plan]


class Learned(NamedTuple):
    """One run: the loss of each step, and the validation loss after them."""

    losses: list[float]
    validation: float


class Steps:
    """The batches of a run, the same for every contender: for each step its passes, each with the step's targets."""

    def __init__(self, config: SameLearningConfig, tokenizer, context: int | None):
        train, validation = data.load_splits(config.data, seed=config.seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*longer than max_length.*")  # the help says that they are cut
            self.train, self.validation = (
                data.tokenize_records(records, tokenizer, config.max_length, context=context)
                for records in (train, validation.select(range(min(config.validation_records, len(validation)))))
            )
        if len(self.train) < config.batch_size:
            raise FastkitError(f"{len(self.train)} records do not make a step of --batch_size {config.batch_size}")
        self.config = config
        row, self.pad = RowCollator(tokenizer.pad_token_id), data.Collator(tokenizer.pad_token_id)
        self.collate = (lambda records: row([records])) if config.packed else self.pad

    def __iter__(self) -> Iterator[tuple[list[dict], torch.Tensor]]:
        """(passes, target tokens of all of them) for each step, in the trainer's order of records."""
        config, per_pass = self.config, self.config.batch_size // self.config.accumulation
        order = LengthGrouped([len(ids) for ids in self.train["input_ids"]], config.batch_size, config.seed)
        indices: list[int] = []
        for _ in range(config.steps):
            if len(indices) < config.batch_size:  # the last few of an epoch make no step
                indices = list(order)
                order.set_epoch(order.epoch + 1)
            step, indices = indices[: config.batch_size], indices[config.batch_size :]
            passes = [
                self.collate([self.train[i] for i in step[n : n + per_pass]]) for n in range(0, len(step), per_pass)
            ]
            yield passes, torch.tensor(sum(int((batch["shift_labels"] != data.IGNORE).sum()) for batch in passes))

    def validations(self) -> Iterator[dict]:
        """Padded batches of the validation records."""
        for start in range(0, len(self.validation), self.config.batch_size):
            stop = min(start + self.config.batch_size, len(self.validation))
            yield self.pad([self.validation[i] for i in range(start, stop)])


def learn(
    config: SameLearningConfig, plan: str | None, batches: Steps | None = None, compute: str = "auto"
) -> tuple[Learned, Steps]:
    """Fine-tune a fresh model: ours under `plan`, or transformers' for None. Returns the batches too, to pass on.

    Raises FastkitError if a layer is not fused, in part or for one batch: that would compare transformers with itself.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    model, tokenizer = load(config.model, device=config.device, dtype=config.dtype)
    batches = batches or Steps(config, tokenizer, getattr(model.config, "max_position_embeddings", None))
    model = add_lora(model, rank=config.rank, seed=config.seed).train()
    if plan is not None:
        report = patch(model, plan, compute=compute)
        if report.left or not report.layers:
            raise FastkitError(f"not all of {config.model} is fused: {report}")
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = bnb.optim.AdamW8bit if config.optimizer == "adamw8bit" else torch.optim.AdamW
    optimizer = adamw(trained, lr=config.learning_rate, weight_decay=0.0)
    autocast = torch.autocast(device.type, dtype, enabled=device.type == "cuda" and dtype != torch.float32)
    losses = []
    for passes, targets in batches:
        step = torch.zeros((), dtype=torch.float64, device=device)
        for batch in passes:
            with autocast, warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*not fused.*")
                loss = model(**_on(batch, device), use_cache=False, num_items_in_batch=targets.to(device)).loss
            loss.backward()
            step += loss.detach().double()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.item())
    return Learned(losses, _validate(model.eval(), batches, device, autocast)), batches


@torch.no_grad()
def _validate(model, batches: Steps, device: torch.device, autocast) -> float:
    total, targets, one = 0.0, 0, torch.ones((), device=device)
    for batch in batches.validations():
        with autocast:
            total += model(**_on(batch, device), use_cache=False, num_items_in_batch=one).loss.item()  # a sum
        targets += int((batch["shift_labels"] != data.IGNORE).sum())
    return total / targets


def _on(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def differences(stock: Learned, ours: Learned) -> dict[str, float]:
    """How far `ours` is from `stock`.

    Of the losses: max_drift over all steps, max_drift_first over the first FIRST, mean_drift, in nats;
    mean_relative_drift as a part of stock's. Of the validation losses: validation_drift, a part too, negative if ours
    is lower.
    """
    theirs = torch.tensor(stock.losses, dtype=torch.float64)
    drifts = (torch.tensor(ours.losses, dtype=torch.float64) - theirs).abs()  # one nan makes each of these nan
    return {
        "max_drift": drifts.max().item(),
        "max_drift_first": drifts[:FIRST].max().item(),
        "mean_drift": drifts.mean().item(),
        "mean_relative_drift": (drifts / theirs).mean().item(),
        "validation_drift": ours.validation / stock.validation - 1,
    }


def judge(found: dict[str, float], limits: Limits) -> list[str]:
    """What of `differences` is beyond `limits`; a number that is none is beyond all."""
    checks = (
        ("a loss of the first steps", found["max_drift_first"], limits.each),
        ("the mean of the losses, relative,", found["mean_relative_drift"], limits.mean),
        ("the validation loss, relative,", abs(found["validation_drift"]), limits.validation),
    )
    return [
        f"{what} differs by {value:.3g}, allowed is {limit:g}"
        for what, value, limit in checks
        if limit is not None and not value <= limit
    ]


def compare(config: SameLearningConfig, after_each: Callable[[dict], None] = lambda found: None) -> dict:
    """{"dtype": of the model, "runs": {who: Learned}, "rows": a summary of each run beside transformers'}; with `truth`
    each row has the differences from it too, their names ending in _from_fp32.

    after_each    called with what there is after each run
    """
    config.check()
    dtype = resolve_dtype(config.dtype, resolve_device(config.device))
    if dtype == torch.float16:
        raise FastkitError("this card computes in fp16, which needs loss scaling: take --dtype fp32")
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    contenders = {"transformers": (config, None, "auto")}
    if config.truth:
        contenders[TRUTH] = (replace(config, dtype="fp32"), None, "auto")
    if config.repeat_stock:
        contenders["transformers again"] = (config, None, "auto")
    for compute in config.compute:
        named = ", FP8" if compute == "fp8" else ""
        contenders |= {f"ours, {plan}{named}": (config, plan, compute) for plan in config.plan}
    limits = {
        who: LIMITS["fp8" if compute == "fp8" else kind]
        for who, (_, plan, compute) in contenders.items()
        if plan is not None
    }
    runs, batches = {}, None
    for who, (settings, plan, compute) in contenders.items():
        print(f"{who} ...", file=sys.stderr, flush=True)
        runs[who], batches = learn(settings, plan, batches, compute)
        drift = differences(runs["transformers"], runs[who])["mean_relative_drift"]
        print(f"  validation loss {runs[who].validation:.6f}, mean drift {drift:.4%}", file=sys.stderr, flush=True)
        found = {"dtype": kind, "runs": runs, "rows": _summary(runs, limits)}
        after_each(found)
    return found


def _summary(runs: dict[str, Learned], limits: dict[str, Limits]) -> list[dict]:
    """A row for each run; those of which there are limits say what is beyond them."""
    rows = []
    for who, run in runs.items():
        row = {"who": who, "validation_loss": run.validation, "first_loss": run.losses[0], "last_loss": run.losses[-1]}
        if who != "transformers":
            row |= differences(runs["transformers"], run)
        if TRUTH in runs and who != TRUTH:
            row |= {f"{name}_from_fp32": value for name, value in differences(runs[TRUTH], run).items()}
        if who in limits:
            row["beyond"] = "; ".join(judge(row, limits[who])) or None
        rows.append(row)
    return rows


def table(found: dict) -> str:
    """What `compare` gave, as text."""
    runs = found["runs"]
    steps = len(runs["transformers"].losses)
    shown = sorted({*range(0, steps, max(1, steps // EVERY)), steps - 1})
    lines = ["step".rjust(6) + "".join(f"{who:>26}" for who in runs)]
    lines += [f"{n + 1:6}" + "".join(f"{run.losses[n]:26.6f}" for run in runs.values()) for n in shown]
    lines += ["", f"beside transformers' {steps} steps (validation loss {runs['transformers'].validation:.6f}):"]
    for row in found["rows"][1:]:
        lines.append(
            f"  {row['who']}: drift at most {row['max_drift']:.2e} (first {FIRST} steps {row['max_drift_first']:.2e}), "
            f"mean {row['mean_drift']:.2e} ({row['mean_relative_drift']:.4%}); "
            f"validation {row['validation_loss']:.6f} ({row['validation_drift']:+.4%})"
        )
        if "beyond" in row:
            lines.append(f"    {'NOT the same: ' + row['beyond'] if row['beyond'] else 'the same, within limits'}")
    if TRUTH in runs:
        lines.append(f"\nbeside {TRUTH}, the mean of the losses and the validation loss:")
    for row in found["rows"]:
        if "mean_relative_drift_from_fp32" in row:
            mean, validation = row["mean_relative_drift_from_fp32"], row["validation_drift_from_fp32"]
            lines.append(f"  {row['who']}: {mean:.4%}, {validation:+.4%}")
    return "\n".join(lines)


def run(config: SameLearningConfig, command: str) -> int:
    """The command: prints a table or JSON, records if asked to; exit code 1 if ours is beyond the limits."""
    if config.record and resolve_device(config.device) != resolve_device():
        raise FastkitError(
            f"--record names the GPU of this machine, not --device {config.device}: leave out one of both"
        )
    recorded = None

    def keep(found: dict) -> None:
        nonlocal recorded
        if config.record:
            recorded = record(config.record, _as_rows(found), command)

    found = compare(config, after_each=keep)
    runs = found["runs"]
    if config.json:
        losses = {who: run.losses for who, run in runs.items()}
        print(json.dumps({"config": asdict(config), "card": card(), "rows": found["rows"], "losses": losses}))
    else:
        print(f"{card(resolve_device(config.device))['name']}, {found['dtype']}, {config.model}\n{table(found)}")
    if recorded and not config.json:
        print(f"\nrecorded in {recorded}")
    return int(any(row.get("beyond") for row in found["rows"]))


def _as_rows(found: dict) -> list[dict]:
    """What `compare` gave, to be recorded: a row for each run, one for each step."""
    runs = found["runs"]
    each_step = enumerate(zip(*(run.losses for run in runs.values()), strict=True), 1)
    rows = [{"what": "run", **row} for row in found["rows"]]
    return rows + [{"what": "loss", "step": n, **dict(zip(runs, losses, strict=True))} for n, losses in each_step]
