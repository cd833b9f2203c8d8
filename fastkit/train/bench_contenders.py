"""The contenders of `fastkit bench train`: how each makes its model, and what it does with one batch.

Each runs in a process of its own (`main`), which reads its settings from a JSON file and writes what it measured to
another: contenders patch libraries, and memory that one took is no other's. All train the same weights on the same
tokens, with adapters of one rank on all seven projections, under autocast, by bitsandbytes' AdamW with 8-bit state;
gradients are not clipped.

    hf         transformers + peft + bitsandbytes, as peft's guide prepares a 4-bit model; activations recomputed
    liger      the same, of Liger's RMSNorm, RoPE, SwiGLU and loss
    unsloth    Unsloth's own model, with its default recompute, which offloads to the host
    ours       transformers' model after `patch`, under a recompute plan

and hf-keep, liger-keep and unsloth-keep, which recompute nothing.
"""

import importlib.util
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastkit.errors import FastkitError
from fastkit.models import add_lora, load
from fastkit.models.bnb import bnb
from fastkit.models.load import first_line, resolve_device, resolve_dtype
from fastkit.models.lora import PROJECTIONS
from fastkit.models.shapes import SHAPES
from fastkit.train import processes, sharding
from fastkit.train.flat import Flat

LEARNING_RATE = 2e-4
PROFILED = 3  # steps


@dataclass(frozen=True)
class Settings:
    """What one contender's process is told.

    who         of CONTENDERS, "card" or "checkpoint"
    plan        ours: of `patch`, or "auto"
    compute     "auto", "bf16", or for ours "fp8"
    shape       of SHAPES, or a model's folder
    limit_gib   what torch may take of the GPU's memory, None: all
    budget_gib  ours: what plan "auto" may take of the GPU's memory, None: what is free
    checkpoint  a folder with the weights, for contenders that load them by themselves
    processes   ours: each on a GPU of its own with `batch` sequences a step, started by torchrun
    strategy    of several processes: "ddp", or "fsdp2" with AdamW in fp32
    """

    who: str
    shape: str
    batch: int
    seq: int
    rank: int
    steps: int
    warmup: int
    device: str
    seed: int
    plan: str | None = None
    compute: str = "auto"
    budget_gib: float | None = None
    limit_gib: float | None = None
    checkpoint: str | None = None
    processes: int = 1
    strategy: str = "ddp"

    @property
    def random(self) -> bool:
        return self.shape in SHAPES


@dataclass(frozen=True)
class Contender:
    """make: gives the model, and what else its row tells. package: what it needs beside the project's own requirements.
    first: what must be imported before all else."""

    make: Callable[[Settings, torch.dtype], tuple[torch.nn.Module, dict]]
    package: str | None = None
    first: str = ""

    def lacking(self) -> str:
        """Why it cannot enter here; "" if it can."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"not installed: pip install {self.package.replace('_', '-')}"
        return ""


def _loaded(settings: Settings):
    model, _ = load(settings.shape, random_weights=settings.random, device=settings.device, seed=settings.seed)
    model.config.use_cache = False
    return model


def _stock(settings: Settings, dtype: torch.dtype, recompute: bool):
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(
        _loaded(settings),
        use_gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
    )
    return add_lora(model, rank=settings.rank, seed=settings.seed), {}


def _liger(settings: Settings, dtype: torch.dtype, recompute: bool):
    from liger_kernel import transformers as liger
    from transformers import AutoConfig

    shape = settings.shape
    arch = SHAPES[shape]["model_type"] if settings.random else AutoConfig.from_pretrained(shape).model_type
    getattr(liger, f"apply_liger_kernel_to_{arch}")()  # replaces transformers' classes, so before the model is made
    return _stock(settings, dtype, recompute)


def _unsloth(settings: Settings, dtype: torch.dtype, recompute: str | bool):
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        settings.checkpoint or settings.shape, max_seq_length=settings.seq, dtype=dtype, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings.rank,
        lora_alpha=settings.rank,
        lora_dropout=0,
        bias="none",
        target_modules=list(PROJECTIONS),
        use_gradient_checkpointing=recompute,
        random_state=settings.seed,
    )
    FastLanguageModel.for_training(model)
    return model, {}


def _ours(settings: Settings, dtype: torch.dtype):
    from fastkit.models.estimate import describe
    from fastkit.models.patch import patch

    model = add_lora(_loaded(settings), rank=settings.rank, seed=settings.seed)
    expected = _estimate(settings, model, dtype)
    asked = {"compute": "fp8"} if settings.compute == "fp8" else {}
    report = patch(model, expected.plans, **asked)
    if report.left or not report.layers:
        raise FastkitError(f"not all of {settings.shape} is fused: {report}")
    return model, {"layers": describe(expected.plans), "estimated_gib": expected.peak / 2**30}


def _estimate(settings: Settings, model, dtype: torch.dtype):
    """The memory of a step, and the plan of each layer: the one that is asked for, or the fastest that fit."""
    from fastkit.models.budget import choose
    from fastkit.models.estimate import estimate
    from fastkit.models.plans import plan_of

    step = settings.batch, settings.seq, "adamw8bit", dtype
    if settings.plan != "auto":
        return estimate(model, [plan_of(settings.plan)] * model.config.num_hidden_layers, *step)
    room = settings.budget_gib or settings.limit_gib
    if room is None:
        device = resolve_device(settings.device)
        if device.type == "cpu":
            raise FastkitError("--plan auto on a CPU needs a --budget")
        room = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 2**30
    return choose(model, int(room * 2**30), *step)


CONTENDERS = {
    "hf": Contender(lambda s, dtype: _stock(s, dtype, True)),
    "hf-keep": Contender(lambda s, dtype: _stock(s, dtype, False)),
    "liger": Contender(lambda s, dtype: _liger(s, dtype, True), "liger_kernel"),
    "liger-keep": Contender(lambda s, dtype: _liger(s, dtype, False), "liger_kernel"),
    "unsloth": Contender(lambda s, dtype: _unsloth(s, dtype, "unsloth"), "unsloth", "import unsloth"),
    "unsloth-keep": Contender(lambda s, dtype: _unsloth(s, dtype, False), "unsloth", "import unsloth"),
    "ours": Contender(_ours),
}


class Run:
    """A contender's model, ready for its steps."""

    def __init__(self, settings: Settings):
        self.settings, self.device = settings, resolve_device(settings.device)
        processes.join(self.device)
        self.dtype = resolve_dtype("auto", self.device)
        model, self.told = CONTENDERS[settings.who].make(settings, self.dtype)
        self.vocabulary = model.config.vocab_size
        self.model = model.train()
        if self._is_sharded():
            sharding.shard(self.model)
            self.told["estimated_gib"] = None  # which is of a whole model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self._optimizer()
        if settings.processes > 1 and not self._is_sharded():
            self.model = DistributedDataParallel(self.model)
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=self.device.type == "cuda")

    def _is_sharded(self) -> bool:
        return self.settings.processes > 1 and self.settings.strategy == "fsdp2"

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.settings.who != "ours":
            return bnb.optim.AdamW8bit(self.trained, lr=LEARNING_RATE, weight_decay=0.0)
        if self._is_sharded():
            return torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        flat = Flat(self.trained)  # as in our trainer
        return flat.attach(bnb.optim.AdamW8bit([flat.parameter], lr=LEARNING_RATE, weight_decay=0.0))

    def batches(self) -> Iterator[torch.Tensor]:
        """Token ids [batch, seq], without end, the same for every contender; other ones in each process."""
        generator = torch.Generator().manual_seed(self.settings.seed + processes.number())
        size = self.settings.batch, self.settings.seq
        while True:
            yield torch.randint(self.vocabulary, size, generator=generator).to(self.device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of a batch."""
        with self.autocast:
            return self.model(input_ids=ids, labels=ids).loss

    def update(self) -> None:
        """The optimizer's part of a step."""
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """(seconds by the wall clock between two waits for the device, the loss) of a step."""
        self.synchronize()
        start = time.perf_counter()
        loss = self.forward(ids)
        loss.backward()
        self.update()
        self.synchronize()
        return time.perf_counter() - start, loss.item()

    def link(self) -> dict:
        """What joins several GPUs, and how fast they add up 256 MiB: GB/s that each sends (NCCL's bus bandwidth)."""
        if self.settings.processes == 1 or self.device.type != "cuda":
            return {}
        from fastkit.lab.monitor import link

        x = torch.ones(2**26, device=self.device)
        dist.all_reduce(x)
        self.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            dist.all_reduce(x)
        self.synchronize()
        seconds, n = (time.perf_counter() - start) / 20, self.settings.processes
        return {"link": link(0, 1), "all_reduce_gbps": 2 * (n - 1) / n * x.nbytes / seconds / 1e9}

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(settings: Settings) -> dict:
    """{"row": times of a contender's steps, its losses and its memory, "stages": for ours, where a step's time goes}.

    Memory is torch's peak from the first step on, the warm-up's included; the allocator starts empty but for the model.
    CUDA's own context is not in it. Where the stages cannot be had, a text says why.
    """
    from fastkit.lab.monitor import Monitor
    from fastkit.train.bench_stages import stages

    run = Run(settings)
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
        loaded_gib = torch.cuda.memory_allocated(run.device) / 2**30
    batches = run.batches()
    first = [run.step(next(batches)) for _ in range(settings.warmup)]
    with Monitor(interval_s=0.25) as monitor:
        timed = [run.step(next(batches)) for _ in range(settings.steps)]
    seconds, losses = [spent for spent, _ in timed], [loss for _, loss in first + timed]
    tokens = settings.batch * settings.seq * settings.processes
    row = {
        "median_ms": 1e3 * statistics.median(seconds),
        "fastest_ms": 1e3 * min(seconds),
        "slowest_ms": 1e3 * max(seconds),
        "tokens_per_second": tokens / statistics.median(seconds),
        "loaded_gib": loaded_gib if cuda else None,
        "peak_allocated_gib": torch.cuda.max_memory_allocated(run.device) / 2**30 if cuda else None,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(run.device) / 2**30 if cuda else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "trained": sum(p.numel() for p in run.trained),
        "dtype": str(run.dtype).removeprefix("torch."),
        "watched": str(monitor),
        **run.told,
        **run.link(),
    }
    try:
        alone = settings.who == "ours" and settings.processes == 1
        found = stages(run, batches, PROFILED) if alone else None
    except (RuntimeError, FastkitError) as error:  # a GPU that may not be profiled, memory that does not suffice
        found = first_line(error)
    return {"row": row, "stages": found}


def save_checkpoint(settings: Settings) -> dict:
    """Write the random weights, as the others have them, to `settings.checkpoint`, with a tokenizer of as many words.

    In 4 bits: 4.2 GB for Mistral-7B.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = _loaded(settings)
    model.config.use_cache = True
    model.save_pretrained(settings.checkpoint)
    words = ["<unk>", "<s>", "</s>", *(f"t{n}" for n in range(3, model.config.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(settings.checkpoint)
    return {}


def carry_out(settings: Settings) -> dict:
    """What the process of `settings` was started for; {"failed": why} if it cannot be done."""
    from fastkit.train.bench_stages import card_facts

    settings = replace(settings, device=processes.device_of(settings.device))
    device = resolve_device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if settings.limit_gib and settings.who in CONTENDERS:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, settings.limit_gib * 2**30 / total), device)
    task = {"card": card_facts, "checkpoint": save_checkpoint}.get(settings.who, measure)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*not fused.*")  # what is then timed would be transformers
            return task(settings)
    except torch.cuda.OutOfMemoryError as error:
        return {"failed": f"out of memory: {first_line(error)}"}
    except FastkitError as error:
        return {"failed": f"out of memory: {error}" if _from_memory(error) else str(error)}
    except Exception as error:  # whatever a peer raises is its result
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def _from_memory(error: BaseException) -> bool:
    return isinstance(error.__cause__, torch.cuda.OutOfMemoryError)


def command(settings: Settings, given: Path, answer: Path) -> list[str]:
    """What starts the process of `settings`."""
    given.write_text(json.dumps(asdict(settings)))
    if settings.processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(settings.processes)]
        return [sys.executable, *torchrun, "-m", "fastkit.train.bench_contenders", str(given), str(answer)]
    first = CONTENDERS[settings.who].first if settings.who in CONTENDERS else ""
    text = f"{first}\nfrom fastkit.train.bench_contenders import main\nmain()"
    return [sys.executable, "-c", text, str(given), str(answer)]


def environment(scratch: Path) -> dict[str, str]:
    """What a contender's process finds set: kernels are compiled, not interpreted; nothing is sent or fetched; and what
    Unsloth generates is not left behind."""
    return {
        "TRITON_INTERPRET": "0",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(scratch / "unsloth"),
    }


def main() -> None:
    given, answer = map(Path, sys.argv[1:])
    found = carry_out(Settings(**json.loads(given.read_text())))
    if not processes.is_first():
        return
    staging = answer.with_suffix(".part")
    staging.write_text(json.dumps(found))
    staging.replace(answer)


if __name__ == "__main__":
    main()
