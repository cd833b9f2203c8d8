"""`fastkit bench train`: a QLoRA step of ours beside those of others, here, and where ours spends its time."""

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from fastkit.errors import FastkitError
from fastkit.lab.device import card, versions
from fastkit.lab.results import record
from fastkit.lab.sources import child_environment
from fastkit.models.estimate import parse_bytes
from fastkit.models.load import resolve_device, resolve_dtype
from fastkit.models.plans import PLANS
from fastkit.models.shapes import SHAPES
from fastkit.train.bench_contenders import CONTENDERS, Settings, command, environment
from fastkit.train.bench_stages import BESIDE, OTHER, breakdown, floors
from fastkit.train.config import flag

OTHERS = tuple(who for who in CONTENDERS if who != "ours")
SAME_LOSS = {"auto": 0.01, "bf16": 0.01, "fp8": 0.03}  # how far the first loss may be from another's, as a part of it
GRAPHS = "off", "on"
STAGE_HEADS = ("spent", "floor", "to win")


@dataclass
class TrainBenchConfig:
    """Settings of `fastkit bench train`."""

    vs: str = flag(",".join(OTHERS), f"contenders beside ours, with commas between, of {', '.join(OTHERS)}; or none")
    shape: str = flag("mistral-7b", f"random weights of {', '.join(SHAPES)}; or the folder of a model")
    batch: int = flag(4, "sequences a step")
    seq: int = flag(2048, "tokens a sequence")
    plan: list[str] = field(
        default_factory=lambda: list(PLANS),
        metadata={"help": "plans of ours, a contender each, such as keep or auto; none: none of ours"},
    )
    compute: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "what our frozen weights' products run in: auto (the card's 16-bit type), bf16, fp8; or several"
        },
    )
    rank: int = flag(16, "rank of the LoRA adapters on all seven projections")
    steps: int = flag(8, "steps timed")
    warmup: int = flag(3, "steps before these: kernels are compiled and memory is found")
    budget: list[str] = field(
        default_factory=list,
        metadata={
            "help": "what plan auto may take of the GPU's memory, such as 8GiB, a contender each; none: what is free"
        },
    )
    processes: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "processes of ours under torchrun, a GPU and --batch sequences each; or several"},
    )
    strategy: Literal["ddp", "fsdp2"] = flag("ddp", "of several processes, as in finetune; fsdp2 with AdamW in fp32")
    graphs: list[str] = field(
        default_factory=lambda: ["off"],
        metadata={"help": "off: ours launched kernel by kernel; on: forward and backward as one CUDA graph; or both"},
    )
    limit: str | None = flag(
        None,
        "what torch may take of the GPU's memory in each process, such as 7.2GiB; budget: what --budget says",
    )
    time_limit: float = flag(900.0, "seconds that one contender may take")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    seed: int = flag(0, "of the weights, the adapters and the tokens")
    record: str | None = flag(None, "write the rows to data/results under this name")
    json: bool = flag(False, "print rows and notes as JSON")

    def check(self) -> None:
        """Raise FastkitError, naming the value, for a setting that cannot work."""
        for name in ("batch", "seq", "rank", "steps"):
            if getattr(self, name) < 1:
                raise FastkitError(f"--{name} {getattr(self, name)} must be 1 or more")
        for count in self.processes:
            if count < 1:
                raise FastkitError(f"--processes {count} must be 1 or more")
            if count > 1 and self.device == "auto" and torch.cuda.is_available() and count > torch.cuda.device_count():
                raise FastkitError(f"--processes {count} need a GPU each, and there are {torch.cuda.device_count()}")
        if self.warmup < 0:
            raise FastkitError(f"--warmup {self.warmup} must not be negative")
        for who in self.others():
            if who not in OTHERS:
                raise FastkitError(f"--vs {who!r} is no contender: there are {', '.join(OTHERS)}")
        for plan in self.plans():
            if plan not in PLANS and plan != "auto":
                raise FastkitError(f"--plan {plan!r} is unknown: use auto, {', '.join(PLANS)}, or none")
        for compute in self.compute:
            if compute not in SAME_LOSS:
                raise FastkitError(f"--compute {compute!r} is unknown: use {', '.join(SAME_LOSS)}")
        for graphs in self.graphs:
            if graphs not in GRAPHS:
                raise FastkitError(f"--graphs {graphs!r} is unknown: use {', '.join(GRAPHS)}, or both")
        if not self.others() and not self.plans():
            raise FastkitError("--vs none --plan none leaves nothing to time")
        if self.limit == "budget" and not self.budget:
            raise FastkitError("--limit budget needs a --budget")
        for size in self.budget:
            gib(size)
        self.limit_gib()
        device = resolve_device(self.device)
        if "bf16" in self.compute and (dtype := resolve_dtype("auto", device)) != torch.bfloat16:
            raise FastkitError(f"--compute bf16: the model here is in {str(dtype).removeprefix('torch.')}; use auto")
        if device.type == "cpu" and self.limit:
            raise FastkitError(f"--limit {self.limit} is for a GPU: leave it out with --device {self.device}")
        if device.type == "cpu" and self.shape in SHAPES:
            raise FastkitError(f"--shape {self.shape} needs a GPU: on a CPU name the folder of a small model")
        if self.shape not in SHAPES and not Path(self.shape).is_dir():
            raise FastkitError(f"--shape {self.shape!r} is neither a folder nor one of {', '.join(SHAPES)}")
        if self.record and device != resolve_device():
            raise FastkitError(f"--record names the first GPU here, not --device {self.device}: leave out one of both")

    def others(self) -> list[str]:
        return [] if self.vs == "none" else self.vs.split(",")

    def plans(self) -> list[str]:
        return [] if self.plan == ["none"] else self.plan

    def limit_gib(self) -> float | None:
        """Of every contender; None: each has another, or none."""
        return None if self.limit in (None, "budget") else gib(self.limit)

    def settings(self) -> list[Settings]:
        """Of each contender's process, in their order."""
        shared = {
            name: getattr(self, name) for name in ("shape", "batch", "seq", "rank", "steps", "warmup", "device", "seed")
        }
        shared |= {"limit_gib": self.limit_gib(), "strategy": self.strategy}
        others = [Settings(who, **shared) for who in self.others()]
        ours = [
            Settings("ours", **shared, plan=plan, compute=compute, budget_gib=budget, processes=count, graphs=graphs)
            for graphs in (each == "on" for each in self.graphs)
            for count in self.processes
            for compute in self.compute
            for plan in self.plans()
            for budget in (map(gib, self.budget) if plan == "auto" and self.budget else [None])
        ]
        if self.limit == "budget":
            ours = [replace(settings, limit_gib=settings.budget_gib) for settings in ours]
        return others + ours


def gib(size: str) -> float:
    """The GiB of a size as `parse_bytes` takes it, which see."""
    return parse_bytes(size) / 2**30


class Bench:
    """What the contenders of `config` gave so far, each after `contend`.

    rows        a row each contender: who, plan, compute, what bench_run.measure says, and failed: None, or why there is
                nothing else in it
    stage_rows  a row each part of each stage of ours
    recorded    the file that they were written to, if they were
    """

    def __init__(self, config: TrainBenchConfig, scratch: Path):
        self.config, self.scratch = config, scratch
        device = resolve_device(config.device)
        self.dtype, self.cuda = resolve_dtype("auto", device), device.type == "cuda"
        self.rows, self.stage_rows = [], []
        self.facts = self.checkpoint = self.recorded = None

    def contend(self, settings: Settings) -> None:
        """Run one contender, in a process of its own."""
        row = {name: getattr(settings, name) for name in ("plan", "compute", "processes")}
        row = {"who": label(settings), **row, "failed": None}
        self.rows.append(row)
        print(f"{row['who']} ...", file=sys.stderr)
        if lacking := CONTENDERS[settings.who].lacking():
            row["failed"] = lacking
            return
        if settings.who.startswith("unsloth") and settings.random:
            if self.checkpoint is None:
                self.checkpoint = self._start(_as(settings, "checkpoint", self.scratch / "model"))
            settings = _as(settings, settings.who, self.scratch / "model")
            if "failed" in self.checkpoint:
                row["failed"] = f"no checkpoint to load: {self.checkpoint['failed']}"
                return
        found = self._start(settings)
        row |= found.get("row", found)
        print(f"  {row['failed'] or format(row['tokens_per_second'], ',.0f') + ' tokens/s'}", file=sys.stderr)
        if isinstance(found.get("stages"), list):
            if self.cuda and self.facts is None:
                self.facts = self._start(_as(settings, "card", None))
            known = self.facts if self.facts and "failed" not in self.facts else None
            median_ms = row["median_ms"] if self.cuda else None
            parts = breakdown(found["stages"], floors(settings, self.dtype, known), median_ms)
            self.stage_rows += [{"who": row["who"], **part} for part in parts]
        elif found.get("stages"):
            row["stages"] = found["stages"]

    def notes(self) -> list[str]:
        """The card's rates, what has no stages, and who has another first loss than the first: it computes something
        else."""
        return _notes(self.rows, self.facts)

    def record(self, command: str) -> None:
        """Write what there is."""
        every = [{"what": "step", **row} for row in self.rows] + [{"what": "stage", **row} for row in self.stage_rows]
        every += [{"what": "note", "text": note} for note in self.notes()]
        self.recorded = record(self.config.record, every, command)

    def _start(self, settings: Settings) -> dict:
        return _start(settings, self.scratch, self.config)


def bench(config: TrainBenchConfig, command: str = "") -> Bench:
    """All contenders, one after the other; with `config.record`, each is recorded when it is done.

    Raises FastkitError for a setting that cannot work.
    """
    config.check()
    with tempfile.TemporaryDirectory(prefix="fastkit-bench-") as folder:
        found = Bench(config, Path(folder))
        for settings in config.settings():
            found.contend(settings)
            if config.record:
                found.record(command)
    return found


def label(settings: Settings) -> str:
    """A contender's name in tables."""
    if settings.who != "ours":
        return settings.who
    told = [settings.plan + (f" {settings.budget_gib:g} GiB" if settings.budget_gib else "")]
    told += ["fp8"] * (settings.compute == "fp8")
    told += [f"{settings.processes} x {settings.strategy}"] * (settings.processes > 1) + ["graph"] * settings.graphs
    return ", ".join(["ours", *told])


def _as(settings: Settings, who: str, checkpoint: Path | None) -> Settings:
    return replace(settings, who=who, checkpoint=str(checkpoint) if checkpoint else None)


def _start(settings: Settings, scratch: Path, config: TrainBenchConfig) -> dict:
    """What the process of `settings` answered; {"failed": why} where it died or took too long."""
    given, answer, said = (scratch / name for name in ("settings.json", "answer.json", "said.txt"))
    answer.unlink(missing_ok=True)
    with said.open("wb") as output:
        try:
            code = subprocess.run(
                command(settings, given, answer),
                env=child_environment(**environment(scratch)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=config.time_limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after --time_limit {config.time_limit:g} s"}
    if answer.is_file():
        return json.loads(answer.read_text())
    last = next((line for line in reversed(said.read_text(errors="replace").splitlines()) if line.strip()), "")
    return {"failed": f"its process ended with exit code {code}: {last.strip()[:200] or 'it said nothing'}"}


def _notes(rows: list[dict], facts: dict | None) -> list[str]:
    notes = [f"{row['who']}: no stages: {row['stages']}" for row in rows if row.get("stages")]
    if facts and "failed" in facts:
        notes.append(f"no floor: {facts['failed']}")
    elif facts:
        rates = ", ".join(f"{rate:,.0f} TFLOP/s in {dtype}" for dtype, rate in facts["tflops"].items())
        notes.append(f"floor: {rates}, {facts['gbps']:,.0f} GB/s, attention by {facts['attention_by']}")
    ran = [row for row in rows if row["failed"] is None]
    for row in ran:
        expected, found = ran[0]["first_loss"], row["first_loss"]
        if not abs(found - expected) <= SAME_LOSS[row["compute"]] * expected:
            notes.append(
                f"{row['who']} is WRONG: its first loss is {found:.4f}, that of {ran[0]['who']} {expected:.4f}"
            )
        elif not math.isfinite(row["last_loss"]):
            notes.append(f"{row['who']} is WRONG: its last loss is {row['last_loss']}")
    return notes


def table(rows: list[dict], stage_rows: list[dict]) -> str:
    """The rows as text: contenders, then the stages of each of ours beside their floor."""
    wide = max(len(row["who"]) for row in rows)
    first = next((row for row in rows if row["failed"] is None), None)
    times = f"x {first['who']}" if first else ""
    heads = ("ms", "fastest", "slowest", "tokens/s", times, "allocated", "estimated", "reserved", "first loss")
    lines = [" " * (wide + 2) + "".join(map(_cell, heads))]
    for row in rows:
        if row["failed"] is not None:
            lines.append(f"  {row['who']:{wide}}  {row['failed']}")
            continue
        rate = row["tokens_per_second"]
        cells = [_cell(row[key], 1) for key in ("median_ms", "fastest_ms", "slowest_ms")]
        cells += [_cell(rate, 0), _cell(rate / first["tokens_per_second"])]
        cells += [_cell(row.get(f"{key}_gib", "")) for key in ("peak_allocated", "estimated", "peak_reserved")]
        lines.append(f"  {row['who']:{wide}}" + "".join(cells) + _cell(row["first_loss"], 4))
    for who in dict.fromkeys(row["who"] for row in stage_rows):
        own = [row for row in stage_rows if row["who"] == who]
        lines += ["", f"{who}: where a step's time goes, in ms", f"  {'':24}" + "".join(map(_cell, STAGE_HEADS))]
        counted = [row for row in own if row["stage"] != BESIDE]
        known = all(row["floor_ms"] is not None for row in own)
        in_all = {"stage": "in all", "part": OTHER, "ms": sum(row["ms"] for row in counted)}
        in_all["floor_ms"] = sum(row["floor_ms"] for row in counted) if known else None
        for row in [*counted, in_all, *own[len(counted) :]]:
            name, floor = f"{row['stage']} {row['part'] if row['part'] != OTHER else ''}", row["floor_ms"]
            left = None if floor is None else row["ms"] - floor
            lines.append(f"  {name:24}{_cell(row['ms'])}{_cell(floor)}{_cell(left)}")
    return "\n".join(lines)


def _cell(value: float | str | None, digits: int = 2) -> str:
    if isinstance(value, str):
        return f"{value:>11}"
    return f"{'unknown' if value is None else f'{value:,.{digits}f}':>11}"


def run(config: TrainBenchConfig, command: str) -> int:
    """The command: prints a table or JSON, records if asked to.

    Exit code 1 if a result is wrong, or one of ours failed otherwise than for want of memory.
    """
    found, device = bench(config, command), resolve_device(config.device)
    rows, stage_rows, notes = found.rows, found.stage_rows, found.notes()
    if config.json:
        every = {"card": card(device), "versions": versions(), "rows": rows, "stages": stage_rows, "notes": notes}
        print(json.dumps(every))
    else:
        print(
            f"{card(device)['name']}, {config.shape}, {config.batch} x {config.seq} tokens, rank {config.rank}: median "
            f"of {config.steps} steps by the wall clock, the device waited for; memory in GiB\n"
        )
        print(table(rows, stage_rows))
        print("".join(f"\n{note}" for note in notes))
    if found.recorded and not config.json:
        print(f"\nrecorded in {found.recorded}")
    broken = [row for row in rows if row["plan"] and row["failed"] and not row["failed"].startswith("out of memory")]
    return int(bool(broken) or any("WRONG" in note for note in notes))
