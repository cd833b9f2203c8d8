"""A LoRA adapter and its base as one model without adapters: 16-bit safetensors here, GGUF in `gguf_file.py`.

    W = dequantize(base weight in NF4) + scaling * B @ A

as `merged_weights.py` reads it. One weight is in memory at a time, and one file of the result.
"""

import json
import math
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from fastkit.errors import FastkitError
from fastkit.models.load import first_line
from fastkit.train import run_folder
from fastkit.train.merged_weights import Merged

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: str = "bf16",
    model: str | None = None,
    device: str = "auto",
    quantize: bool = True,
    shard_size: str | int = "1GB",
) -> Path:
    """Write the model that the LoRA adapter in the folder `adapter` makes of its base, to the new folder `output`.

    Args:
        dtype: of the result: "bf16", "fp16" or "fp32".
        model: the base; by default the one that the adapter names.
        device: where weights are quantized and merged; best the kind on which the adapter was trained, since the last
            bits of NF4's scales differ between CPU and GPU.
        quantize: False for an adapter that was trained on the dense base.
        shard_size: of a file of weights, in bytes or as "1GB"; so much is in memory at a time.

    Returns `output`, an ordinary transformers checkpoint: config.json, safetensors with an index where there are
    several, generation_config.json, the tokenizer. It appears whole or not at all.

    Raises FastkitError for an adapter that cannot be merged (another kind than plain LoRA), a base that it does not
    fit, missing or broken files, an output that exists, too little disk, a weight that overflows `dtype`.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    if dtype not in DTYPES:
        raise FastkitError(f"dtype {dtype!r} is unknown: use {', '.join(DTYPES)}")
    torch_dtype, output = DTYPES[dtype], Path(output)
    if output.suffix == ".gguf":
        raise FastkitError(
            f"{output} names a GGUF file, and a merged model is a folder: add --to gguf, or name another"
        )
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise FastkitError(f"{adapter} holds no adapter: it has no adapter_config.json")
    merged = Merged(adapter, model=model, device=device, quantize=quantize)
    shards = split_state_dict_into_shards_factory(
        merged.shapes,
        get_storage_size=lambda shape: math.prod(shape) * torch_dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    size = shards.metadata["total_size"]
    with room_for(output, size), run_folder.staged(output) as staging:
        merged.save_about(staging, torch_dtype)
        with tqdm(total=size, unit="B", unit_scale=True, desc=output.name, disable=None) as bar:
            for file, names in shards.filename_to_tensors.items():
                _write_shard(staging / file, names, merged, torch_dtype, bar)
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return output


def _write_shard(file: Path, names: list[str], merged: "Merged", dtype: torch.dtype, bar) -> None:
    tensors = {}
    for name in names:
        tensors[name] = merged.read(name, dtype)
        bar.update(tensors[name].nbytes)
    save_file(tensors, file, metadata={"format": "pt"})


@contextmanager
def room_for(output: Path, size: int):
    """Around the writing of `size` bytes to the new file or folder `output`, whose parent folder it makes.

    Raises FastkitError when `output` exists or the disk has no room, before and while it is written.
    """
    if output.exists():
        raise FastkitError(f"output {output} exists already: name another")
    needs = f"{output} needs {size:,} bytes"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(output.parent).free) < size:
            raise FastkitError(f"{needs} and the disk has {free:,} left: free some, or name a folder on another disk")
        yield
    except (OSError, SafetensorError, FastkitError) as error:
        if run_folder.is_disk_full(error):
            raise FastkitError(f"the disk is full: {needs}; nothing is left of it; free some space") from error
        if isinstance(error, FastkitError):
            raise
        raise FastkitError(f"cannot write {output}: {first_line(error)}") from error
