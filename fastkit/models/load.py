"""Load a causal language model in NF4 with double quantization, from the hub, a folder, or an exact shape."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError

from fastkit.errors import FastkitError
from fastkit.models import random_weights as random_weights_
from fastkit.models import smollm2
from fastkit.models.bnb import keep_differentiable, nf4_config
from fastkit.models.shapes import SHAPES, SUPPORTED, config_of


def load(
    model: str = "smollm2",
    *,
    random_weights: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    quantize: bool = True,
    seed: int = 0,
):
    """Load a Llama, Mistral, Qwen2, Qwen2.5 or Qwen3 model and its tokenizer, ready for LoRA.

    Args:
        model: `"smollm2"` (SmolLM2-135M-Instruct, downloaded once and cached), a local folder, a hub id
            (the only case that asks a hub), or with `random_weights` one of "mistral-7b", "llama2-7b",
            "llama2-13b", "llama2-70b", "qwen2.5-7b".
        random_weights: draw the weights of that exact shape, quantized layer by layer; no network, no quality.
        device: "auto" (the first GPU, else the CPU), "cpu", "cuda" or "cuda:N".
        dtype: of activations and of the weights that stay unquantized (embeddings, norms, head): "auto" (bf16 where
            the card has it, fp16 on older cards, fp32 on the CPU), "bf16", "fp16" or "fp32".
        quantize: False keeps the linears dense in `dtype` (for comparisons).
        seed: of the random weights.

    Returns:
        (model, tokenizer): a transformers model in eval mode with every decoder linear a `bnb.nn.Linear4bit`,
        and a tokenizer that has a pad token.

    Raises:
        FastkitError: unknown name, no weights in the folder, pickle weights, unsupported architecture or
            quantization, no GPU for device "cuda", a hub that cannot be reached, not enough memory.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    if random_weights:
        return _load_random(model, device, dtype, quantize, seed)
    source, is_hub = _resolve_source(model)
    config = _read_config(source, is_hub)
    _check_config(config, source)
    prequantized = getattr(config, "quantization_config", None) is not None

    from transformers import AutoModelForCausalLM

    options = {"quantization_config": nf4_config(dtype)} if quantize and not prequantized else {}
    tokenizer = read_tokenizer(source)
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map={"": device},
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise _out_of_memory(model, device, error) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise FastkitError(f"cannot load {model}: {first_line(error)}; download or save it anew") from error
    if wrong := _misfits(loaded, report):
        raise FastkitError(
            f"{model}: its weights do not fit its config.json, {len(wrong)} are missing or of another shape, first "
            f"{wrong[0]}; download or save it anew"
        )
    return _ready(loaded, tokenizer)


def config_for(model: str):
    """The transformers config of whatever `load` takes, without its weights. Raises as `load` does."""
    if model in SHAPES:
        return config_of(model)
    source, is_hub = _resolve_source(model)
    config = _read_config(source, is_hub)
    _check_config(config, source)
    return config


def resolve_device(device: str = "auto") -> torch.device:
    """The torch device of "auto", "cpu", "cuda" or "cuda:N"; FastkitError when there is no such GPU."""
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise FastkitError(f"device {device!r} is unknown: use auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = resolved.index or 0
        if index >= count:
            raise FastkitError(
                f"device {device!r} was asked for, but torch {torch.__version__} sees {count} GPUs: use --device cpu, "
                "or install a GPU driver and a CUDA build of torch (`fastkit doctor` says more)"
            )
        return torch.device("cuda", index)
    if resolved.type != "cpu":
        raise FastkitError(f"device {device!r} is not supported: use auto, cpu, cuda or cuda:N")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """bf16 where the card computes in it, fp16 on older cards, fp32 on the CPU; or the one named."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if dtype not in names:
        raise FastkitError(f"dtype {dtype!r} is unknown: use auto, bf16, fp16 or fp32")
    if dtype == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise FastkitError(f"{torch.cuda.get_device_name(device)} does not compute in bf16: use --dtype fp16")
    return names[dtype]


def _load_random(name: str, device, dtype, quantize: bool, seed: int):
    if name not in SHAPES:
        raise FastkitError(f"no shape named {name!r} for random weights: use one of {', '.join(SHAPES)}")
    if not quantize:
        raise FastkitError("random weights come quantized: leave out quantize=False")
    config = config_of(name)
    try:
        loaded = random_weights_.build(config, dtype, device, seed)
    except torch.cuda.OutOfMemoryError as error:
        raise _out_of_memory(name, device, error) from error
    loaded.config._name_or_path = name
    return _ready(loaded, random_weights_.byte_tokenizer())


def _resolve_source(model: str) -> tuple[str, bool]:
    if model == "smollm2":
        return str(smollm2.ensure()), False
    if Path(model).exists():
        _check_folder(Path(model))
        return model, False
    if model in SHAPES:
        raise FastkitError(f"{model!r} is a shape without weights: add --random-weights, or name a hub id or a folder")
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return model, True
    raise FastkitError(f"model {model!r} is no folder, hub id (owner/name) or known name: smollm2, {', '.join(SHAPES)}")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FastkitError(f"{folder} is a file: pass the folder that holds config.json and *.safetensors")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise FastkitError(f"{folder} holds a LoRA adapter, not a model: pass it as the adapter, and its base as model")
    if not (folder / "config.json").is_file():
        raise FastkitError(f"{folder} has no config.json: pass the folder of a transformers checkpoint")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        if pickles:
            raise FastkitError(
                f"{folder} has pickle weights only ({pickles[0]}), which can run code when loaded: convert them to "
                "safetensors (model.save_pretrained) first"
            )
        raise FastkitError(f"{folder} has no weights, no *.safetensors beside config.json: download it anew")


def _read_config(source: str, is_hub: bool):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if is_hub:
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
            raise FastkitError(
                f"cannot read {source!r} from the hub{offline}: {first_line(error)}; check the name and the network, "
                "or use a local folder or smollm2"
            ) from error
        raise FastkitError(f"cannot read {source}/config.json: {first_line(error)}") from error


def read_tokenizer(source: str | Path):
    """The tokenizer of a folder or hub id, with a pad token; FastkitError when there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FastkitError(
            f"cannot read a tokenizer from {source}: {first_line(error)}; use a checkpoint "
            "that holds tokenizer.json and tokenizer_config.json"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked by attention_mask and labels, never by its id
    return tokenizer


def _check_config(config, source: str) -> None:
    if config.model_type not in SUPPORTED:
        raise FastkitError(f"{source} is of architecture {config.model_type!r}: use one of {', '.join(SUPPORTED)}")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method", "an unnamed method")
        if method != "bitsandbytes" or not quantization.get("load_in_4bit"):
            raise FastkitError(
                f"{source} is quantized with {method}{' in 8 bits' * bool(quantization.get('load_in_8bit'))}: use an "
                "unquantized checkpoint, or one of bitsandbytes in 4 bits"
            )


def _misfits(model, report: dict) -> list[str]:
    """The weights that the files lack, which transformers draws at random, or hold in another shape, which it may
    draw too or, with quantization, take as they are."""
    wrong = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shape = (module.out_features, module.in_features)
        elif isinstance(module, torch.nn.Embedding):
            shape = (module.num_embeddings, module.embedding_dim)
        else:
            continue
        if getattr(module.weight, "quant_state", module.weight).shape != shape:
            wrong.add(f"{name}.weight")
    return sorted(wrong)


def _ready(model, tokenizer):
    model.config.use_cache = True
    return keep_differentiable(model.eval()), tokenizer


def _out_of_memory(model: str, device: torch.device, error: Exception) -> FastkitError:
    free, total = torch.cuda.mem_get_info(device)
    return FastkitError(
        f"{model} does not fit {torch.cuda.get_device_name(device)}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are "
        f"free ({first_line(error)}); close other programs or load a smaller model"
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)
