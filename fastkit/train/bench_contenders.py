"""The contenders of `fastkit bench train`: how each makes its model, and what it does with one batch.

Each runs in a process of its own (`main`), which reads its settings from a JSON file and writes what it measured to
another: contenders patch libraries, and memory that one took is no other's. All train the same weights on the same
tokens, with adapters of one rank on all seven projections, under autocast, by bitsandbytes' AdamW with 8-bit state;
gradients are not clipped.

    hf         transformers + peft + bitsandbytes, as peft's guide prepares a 4-bit model; activations recomputed
    liger      the same, of Liger's RMSNorm, RoPE, SwiGLU and loss
    unsloth    Unsloth's own model, with its default recompute, which offloads to the host
    ours       transformers' model after `patch`, under a recompute plan; torch's allocator as in our trainer

and hf-keep, liger-keep and unsloth-keep, which recompute nothing.
"""

import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from fastkit.errors import FastkitError
from fastkit.models import add_lora, load
from fastkit.models.load import first_line, resolve_device
from fastkit.models.lora import PROJECTIONS
from fastkit.models.shapes import SHAPES
from fastkit.train import processes
from fastkit.train.memory import growing_segments


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
    graphs      ours: whether forward and backward are launched as one CUDA graph (see `models/graphs.py`)
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
    graphs: bool = False

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
    report = patch(model, expected.plans, compute=_compute(settings))
    if report.left or not report.layers:
        raise FastkitError(f"not all of {settings.shape} is fused: {report}")
    return model, {"layers": describe(expected.plans), "estimated_gib": expected.peak / 2**30}


def _compute(settings: Settings) -> str:
    """Of `patch`; "bf16" has been found to be what the model computes in."""
    return "fp8" if settings.compute == "fp8" else "auto"


def _estimate(settings: Settings, model, dtype: torch.dtype):
    """The memory of a step, and the plan of each layer: the one that is asked for, or the fastest that fit."""
    from fastkit.models import budget
    from fastkit.models.estimate import estimate
    from fastkit.models.plans import plan_of

    step = settings.batch, settings.seq, "adamw8bit", dtype
    how = dict(compute=_compute(settings), captured=settings.graphs, buffered=settings.processes > 1)
    if settings.plan != "auto":
        return estimate(model, [plan_of(settings.plan)] * model.config.num_hidden_layers, *step, **how)
    device, room = resolve_device(settings.device), settings.budget_gib or settings.limit_gib
    if room is None:
        if device.type == "cpu":
            raise FastkitError("--plan auto on a CPU needs a --budget")
        room = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 2**30
    return budget.choose(model, int(room * 2**30), *step, rates=budget.rates(device, dtype), **how)


CONTENDERS = {
    "hf": Contender(lambda s, dtype: _stock(s, dtype, True)),
    "hf-keep": Contender(lambda s, dtype: _stock(s, dtype, False)),
    "liger": Contender(lambda s, dtype: _liger(s, dtype, True), "liger_kernel"),
    "liger-keep": Contender(lambda s, dtype: _liger(s, dtype, False), "liger_kernel"),
    "unsloth": Contender(lambda s, dtype: _unsloth(s, dtype, "unsloth"), "unsloth", "import unsloth"),
    "unsloth-keep": Contender(lambda s, dtype: _unsloth(s, dtype, False), "unsloth", "import unsloth"),
    "ours": Contender(_ours),
}


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
    from fastkit.train.bench_run import measure
    from fastkit.train.bench_stages import card_facts

    if settings.who == "ours":
        growing_segments()
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
    processes.leave()
    if not processes.is_first():
        return
    staging = answer.with_suffix(".part")
    staging.write_text(json.dumps(found))
    staging.replace(answer)


if __name__ == "__main__":
    main()
    processes.end(0)
