"""The command line: `fastkit finetune`, `generate`, `export`, `warmup`, `doctor`, `bench`, `compile`, `prove`.

A flag of a command is a field of its dataclass and so an argument in Python. Bad input prints one line and exits 2.
"""

import argparse
import difflib
import gc
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from fastkit import __version__
from fastkit.errors import FastkitError, show_plain_warnings

USAGE = """\
usage: fastkit COMMAND [flags]      (fastkit COMMAND --help lists the flags)

  finetune   fine-tune a model with QLoRA: smollm2 on the packaged data, or yours
  generate   ask a model, with or without an adapter
  export     an adapter and its base as one model: 16-bit safetensors, or GGUF for llama.cpp and its kin
  warmup     compile and tune every kernel for this card and a model's shapes, so that no training step waits for it
  doctor     this machine's card, versions and lane; what is missing, and the command that mends it
  bench      time our kernels beside torch's and others' on this machine's GPU: fastkit bench rms_norm softmax;
             a step of training beside others': fastkit bench train; whether it learns the same: fastkit bench learning
  compile    compile our kernels for GPUs that need not be here, and say which fit: fastkit compile --arch sm_75 sm_89
  prove      count what our kernels do to memory, with Nsight Compute, beside what the tracer predicts
"""


@dataclass
class GenerateConfig:
    """Settings of `fastkit generate`."""

    prompt: str = field(metadata={"help": "the question; - reads it from standard input"})
    adapter: str | None = field(default=None, metadata={"help": "folder of a LoRA adapter; its base is the model"})
    model: str | None = field(
        default=None, metadata={"help": "as in finetune; default: the adapter's base, or smollm2"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "longest answer in tokens"})
    temperature: float = field(default=0.0, metadata={"help": "0 for the likeliest answer, above 0 to sample"})
    seed: int = field(default=0, metadata={"help": "of the sampling"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N"})


@dataclass
class WarmupConfig:
    """Settings of `fastkit warmup`."""

    model: str = field(default="smollm2", metadata={"help": "as in finetune, or a named shape such as mistral-7b"})
    batch: int = field(default=4, metadata={"help": "sequences a forward pass"})
    seq: int = field(default=2048, metadata={"help": "tokens of the longest sequence"})
    rank: int = field(default=16, metadata={"help": "rank of the LoRA adapters"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapters' input"})
    plan: list[str] = field(
        default_factory=lambda: ["all"], metadata={"help": "what layers keep, as in finetune; all for every plan"}
    )
    compute: Literal["auto", "fp8"] = field(default="auto", metadata={"help": "of fused layers, as in finetune"})
    every_length: bool = field(
        default=True, metadata={"help": "also for shorter sequences and batches, as a fine-tune has them"}
    )
    device: str = field(default="auto", metadata={"help": "auto, cuda or cuda:N"})
    dtype: str = field(default="auto", metadata={"help": "auto, bf16, fp16 or fp32, as in finetune"})


@dataclass
class ExportConfig:
    """Settings of `fastkit export`."""

    adapter: str = field(metadata={"help": "folder of a LoRA adapter; with --to gguf also of a merged model"})
    output: str = field(metadata={"help": "new folder (merged) or file (gguf)"})
    to: Literal["merged", "gguf"] = field(
        default="merged", metadata={"help": "a transformers checkpoint, or one file for llama.cpp and its kin"}
    )
    type: Literal["f16", "q8_0"] = field(default="f16", metadata={"help": "of the matrices in a gguf"})
    dtype: Literal["bf16", "fp16", "fp32"] = field(default="bf16", metadata={"help": "of a merged checkpoint"})
    model: str | None = field(default=None, metadata={"help": "the base; default: the one that the adapter names"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N; best as in training"})
    quantize: bool = field(default=True, metadata={"help": "--no_quantize: it was trained on the dense base"})


@dataclass
class DoctorConfig:
    """Settings of `fastkit doctor`."""

    json: bool = field(default=False, metadata={"help": "print the report as JSON"})


@dataclass
class BenchConfig:
    """Settings of `fastkit bench`; the benchmarks' names come before them, none for all."""

    record: str | None = field(default=None, metadata={"help": "write the rows to data/results under this name"})
    json: bool = field(default=False, metadata={"help": "print rows and notes as JSON"})


@dataclass
class CompileConfig:
    """Settings of `fastkit compile`; the kernel files' names come before them, none for all."""

    arch: list[str] = field(default_factory=list, metadata={"help": "architectures such as sm_89; none for all"})
    json: bool = field(default=False, metadata={"help": "print the rows as JSON"})


@dataclass
class ProveConfig:
    """Settings of `fastkit prove`."""

    record: str | None = field(default=None, metadata={"help": "write the rows to data/results under this name"})
    json: bool = field(default=False, metadata={"help": "print the rows as JSON"})


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "finetune": _finetune,
        "generate": _generate,
        "export": _export,
        "warmup": _warmup,
        "doctor": _doctor,
        "bench": _bench,
        "compile": _compile,
        "prove": _prove,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] == "--version":
        print(f"fastkit {__version__}")
        return 0
    if argv[0] not in commands:
        print(f"fastkit: no command {argv[0]!r}: use {', '.join(commands)}", file=sys.stderr)
        return 2
    show_plain_warnings()
    logging.getLogger("huggingface_hub.utils._http").addFilter(_is_news)
    try:
        return commands[argv[0]](argv[1:])
    except FastkitError as error:
        print(f"fastkit: {error}", file=sys.stderr)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)  # torchrun's last words then name it, and whose it was
        return 2
    except KeyboardInterrupt:
        kept = "; checkpoints are kept, go on with --resume" if argv[0] == "finetune" else ""
        print(f"fastkit: interrupted{kept}", file=sys.stderr)
        return 130


@contextmanager
def _loading() -> Iterator[None]:
    """Within, Python does not search for garbage, of which there is none: 1.0 of the 4.1 s that a trainer's imports
    take."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the hub's log is more than a failed attempt: the error that ends them says enough of those."""
    return not re.search(r"thrown while requesting|^Retrying in", record.getMessage())


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default where there is one, and what is required."""

    def _get_help_string(self, action):
        if action.required:
            return f"{action.help} (required)"
        says_none = action.default in (None, []) or isinstance(action, argparse._StoreFalseAction)
        return action.help if says_none else super()._get_help_string(action)


def _parser(config_class, command: str, **texts):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import HfArgumentParser

    def refuse(message: str):  # in one line, where argparse would print all of the usage first
        message = re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)
        message = re.sub(r"(invalid \w+ value): ", r"\1 ", message)
        raise FastkitError(f"{message.rstrip('.')}; fastkit {command} --help lists all")

    parser = HfArgumentParser(config_class, prog=f"fastkit {command}", formatter_class=_Help, **texts)
    parser.error = refuse
    for action in parser._actions:
        if isinstance(action, argparse._StoreFalseAction):
            action.help = f"the same as --{action.dest} false"
    return parser


def _parse(config_class, command: str, argv: list[str], **texts):
    parser = _parser(config_class, command, **texts)
    config, *_, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        near = difflib.get_close_matches(unknown[0], parser._option_string_actions, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        parser.error(f"unknown {'flag' if unknown[0].startswith('-') else 'word'} {unknown[0]!r}{hint}")
    return config


def _given(config_class, command: str, argv: list[str]) -> set[str]:
    """The settings that `argv` names, whatever their values."""
    parser, nothing = _parser(config_class, command), object()
    blank = argparse.Namespace(**{action.dest: nothing for action in parser._actions})
    return {name for name, value in vars(parser.parse_known_args(argv, blank)[0]).items() if value is not nothing}


def _finetune(argv: list[str]) -> int:
    from fastkit.train.config import FinetuneConfig

    config = _parse(FinetuneConfig, "finetune", argv)
    if config.resume:
        from fastkit.train.run_folder import as_begun

        config = as_begun(config, _given(FinetuneConfig, "finetune", argv))
    config.check()
    with _loading():
        from fastkit.train import processes
        from fastkit.train.finetune import FineTune

    with FineTune(**config.as_dict()) as run:
        run.prepare()
        shape, records = run.metrics["parameters"], run.metrics["data"]
        print(
            f"{config.model}: {shape['base'] / 1e6:,.0f} M parameters in {shape['base_gib']:.2f} GiB, "
            f"{shape['adapters'] / 1e6:.1f} M trained in {run.metrics['dtype']} on {run.metrics['card']['name']}; "
            f"{records['train']['records']} to train, {records['validation']['records']} to validate"
        )
        metrics = run.train()
        adapter = run.save()
    before, after = metrics["before"], metrics["after"]
    print(
        f"validation loss {before['validation_loss']:.4f} -> {after['validation_loss']:.4f} in {metrics['steps']} steps"
        f"{' (stopped early)' if metrics['stopped_early'] else ''}, {metrics['seconds']:.0f} s"
    )
    if "facts" in after:
        asked = after["facts"]
        print(f"facts known: {before['facts']['right']} -> {asked['right']} of {asked['of']}")
    rate = f"{metrics['tokens_per_second']:,.0f} tokens/s, " if metrics["tokens_per_second"] else ""
    print(f"{rate}peak memory {metrics['peak_memory_gib']:.2f} GiB")
    print(f"adapter: {adapter}")
    del run
    processes.leave()
    return 0


def _generate(argv: list[str]) -> int:
    config = _parse(GenerateConfig, "generate", argv)
    prompt = sys.stdin.read().strip() if config.prompt == "-" else config.prompt
    if not prompt:
        raise FastkitError("the prompt is empty: give a question, or - and a question on standard input")
    with _loading():
        from fastkit.models.chat import answer
        from fastkit.models.lora import load_adapter

    model, tokenizer = load_adapter(config.adapter, model=config.model, device=config.device)
    print(
        answer(
            model,
            tokenizer,
            [prompt],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
        )[0]
    )
    return 0


def _warmup(argv: list[str]) -> int:
    config = _parse(WarmupConfig, "warmup", argv)
    with _loading():
        import torch

    if config.device == "auto" and not torch.cuda.is_available():
        raise FastkitError("there is no GPU here to compile for: kernels are compiled by the machine that runs them")
    with _loading():
        from fastkit.models.warmup import ALL, warm_up

    settings = {name: value for name, value in vars(config).items() if name not in ("model", "plan")}
    print(warm_up(config.model, plans=ALL if config.plan == ["all"] else config.plan, **settings))
    return 0


def _export(argv: list[str]) -> int:
    config = _parse(ExportConfig, "export", argv)
    shared = dict(model=config.model, device=config.device, quantize=config.quantize)
    if config.to == "gguf":
        with _loading():
            from fastkit.train.gguf_file import to_gguf

        output = to_gguf(config.adapter, config.output, type=config.type, **shared)
    else:
        with _loading():
            from fastkit.train.export import merge

        output = merge(config.adapter, config.output, dtype=config.dtype, **shared)
    files = [path for path in (output, *output.rglob("*")) if path.is_file()]
    print(f"{config.to}: {output}, {sum(path.stat().st_size for path in files):,} bytes")
    return 0


def _doctor(argv: list[str]) -> int:
    config = _parse(DoctorConfig, "doctor", argv)
    from fastkit.doctor import report, show

    found = report()
    show(found, as_json=config.json)
    return 0


def _bench(argv: list[str]) -> int:
    if argv[:1] in (["train"], ["learning"]):
        return _bench_model(argv)
    from fastkit.lab.bench import groups, run

    names, flags = _names_first(argv)
    known = [name for group, members in groups().items() for name in (group, *members)]
    usage = (
        f"fastkit bench [{' '.join(known)}] [--record NAME] [--json]\n"
        "       fastkit bench train [flags]\n       fastkit bench learning [flags]"
    )
    models = (
        "train times a step of training beside others', learning compares its losses with transformers' own; each has "
        "flags of its own: fastkit bench train --help, fastkit bench learning --help"
    )
    config = _parse(BenchConfig, "bench", flags, usage=usage, description=models)
    return run(names, record_as=config.record, as_json=config.json)


def _bench_model(argv: list[str]) -> int:
    command = " ".join(["fastkit bench", *argv])
    if argv[0] == "train":
        with _loading():
            from fastkit.train import bench_train

        return bench_train.run(_parse(bench_train.TrainBenchConfig, "bench train", argv[1:]), command)
    with _loading():
        from fastkit.train import same_learning

    return same_learning.run(_parse(same_learning.SameLearningConfig, "bench learning", argv[1:]), command)


def _compile(argv: list[str]) -> int:
    from fastkit.lab.portability import kernel_files, run

    names, flags = _names_first(argv)
    usage = f"fastkit compile [{' '.join(kernel_files())}] [--arch ARCH ...] [--json]"
    config = _parse(CompileConfig, "compile", flags, usage=usage)
    return run(names, config.arch, as_json=config.json)


def _prove(argv: list[str]) -> int:
    config = _parse(ProveConfig, "prove", argv)
    from fastkit.lab.proof import run

    return run(record_as=config.record, as_json=config.json)


def _names_first(argv: list[str]) -> tuple[list[str], list[str]]:
    """(names, flags) of a command whose names come before its flags."""
    flags = next((at for at, word in enumerate(argv) if word.startswith("-")), len(argv))
    return argv[:flags], argv[flags:]


if __name__ == "__main__":
    sys.exit(main())
