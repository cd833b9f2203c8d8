"""The command line: `fastkit finetune`, `fastkit generate`, `fastkit doctor`.

A flag of a command is a field of its dataclass and so an argument in Python. Bad input prints one line and exits 2.
"""

import argparse
import os
import sys
from dataclasses import dataclass, field

from fastkit import __version__
from fastkit.errors import FastkitError, show_plain_warnings

USAGE = """\
usage: fastkit COMMAND [flags]      (fastkit COMMAND --help lists the flags)

  finetune   fine-tune a model with QLoRA: smollm2 on the packaged data, or yours
  generate   ask a model, with or without an adapter
  doctor     this machine's card, versions and lane; what is missing, and the command that mends it
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
class DoctorConfig:
    """Settings of `fastkit doctor`."""

    json: bool = field(default=False, metadata={"help": "print the report as JSON"})


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"finetune": _finetune, "generate": _generate, "doctor": _doctor}
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
    try:
        return commands[argv[0]](argv[1:])
    except FastkitError as error:
        print(f"fastkit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastkit: interrupted; checkpoints are kept, go on with --resume", file=sys.stderr)
        return 130


def _parse(config_class, command: str, argv: list[str]):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        config_class, prog=f"fastkit {command}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    config, *_, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown flag {unknown[0]!r}: `fastkit {command} --help` lists them")
    return config


def _finetune(argv: list[str]) -> int:
    from fastkit.train.config import FinetuneConfig

    config = _parse(FinetuneConfig, "finetune", argv)
    config.check()
    from fastkit.train.finetune import FineTune

    run = FineTune(**config.as_dict()).prepare()
    before, shape = run.metrics["before"], run.metrics["parameters"]
    print(
        f"{config.model}: {shape['base'] / 1e6:,.0f} M parameters in {shape['base_gib']:.2f} GiB, "
        f"{shape['adapters'] / 1e6:.1f} M trained in {run.metrics['dtype']} on {run.metrics['card']['name']}; "
        f"{run.metrics['data']['train']['records']} records"
    )
    metrics = run.train()
    adapter = run.save()
    after = metrics["after"]
    print(
        f"validation loss {before['validation_loss']:.4f} -> {after['validation_loss']:.4f} in {metrics['steps']} steps"
        f"{' (stopped early)' if metrics['stopped_early'] else ''}, {metrics['seconds']:.0f} s"
    )
    if "facts" in after:
        asked = after["facts"]
        print(f"facts known: {before['facts']['right']} -> {asked['right']} of {asked['of']}")
    print(f"{metrics['tokens_per_second'] or 0:,.0f} tokens/s, peak memory {metrics['peak_memory_gib']:.2f} GiB")
    print(f"adapter: {adapter}")
    return 0


def _generate(argv: list[str]) -> int:
    config = _parse(GenerateConfig, "generate", argv)
    prompt = sys.stdin.read().strip() if config.prompt == "-" else config.prompt
    if not prompt:
        raise FastkitError("the prompt is empty: give a question, or - and a question on standard input")
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


def _doctor(argv: list[str]) -> int:
    config = _parse(DoctorConfig, "doctor", argv)
    from fastkit.doctor import report, show

    found = report()
    show(found, as_json=config.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
