"""A model in GGUF, the one-file format of llama.cpp, Ollama and LM Studio, through their own package `gguf`.

Names, metadata and layout are those of llama.cpp's `convert_hf_to_gguf.py`. Its Llama rotates neighbouring numbers of a
head where transformers rotates its two halves, so the rows of q and k are put in that order: row i of the first half
beside row i of the second. Qwen's are left as they are, for which llama.cpp rotates halves too.
"""

import logging
import os
import tempfile
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import torch
from tqdm import tqdm

from fastkit.errors import FastkitError
from fastkit.models.shapes import head_dim
from fastkit.train.export import room_for
from fastkit.train.gguf_tokenizer import add_tokenizer
from fastkit.train.merged_weights import Merged
from fastkit.train.run_folder import STAGING

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
F32 = gguf.GGMLQuantizationType.F32
TYPES = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
DTYPES = {F32: torch.float32, gguf.GGMLQuantizationType.F16: torch.float16}  # others are quantized from fp32
ASSUMED = {"beta_fast": 32, "beta_slow": 1, "partial_rotary_factor": 1}  # of RoPE, by llama.cpp
ROPE_FREQS = "rope_freqs.weight"


def to_gguf(
    source: str | Path,
    output: str | Path,
    *,
    type: str = "f16",
    model: str | None = None,
    device: str = "auto",
    quantize: bool = True,
) -> Path:
    """Write the model in the folder `source`, a LoRA adapter or a merged checkpoint, to the new file `output`.

    Args:
        type: of the matrices: "f16", or "q8_0", 8 bits and an fp16 scale for each 32 numbers. What has one dimension
            (norms, biases) is fp32; rows that are no multiple of 32 long are f16.
        model, device, quantize: of an adapter, as in `merge`.

    Returns `output`, which appears whole or not at all. It holds the tokenizer with its chat template too. A model
    whose attention slides is said to have a context of one window, since llama.cpp's Llama and Qwen look at all of it.

    Raises FastkitError as `merge` does, and for what the format cannot say: an unknown tokenizer or scaling of RoPE.
    """
    if type not in TYPES:
        raise FastkitError(f"GGUF type {type!r} is unknown: use {', '.join(TYPES)}")
    merged, output = Merged(source, model=model, device=device, quantize=quantize), Path(output)
    kinds = {name: _kind(shape, TYPES[type][0]) for name, shape in merged.shapes.items()}
    size = sum(_nbytes(merged.shapes[name], kind) for name, kind in kinds.items())
    with room_for(output, size), tempfile.TemporaryDirectory(prefix=STAGING, dir=output.parent) as scratch:
        file = Path(scratch) / output.name
        logging.getLogger("gguf").setLevel(logging.ERROR)  # it tells of each token that it sets
        with closing(gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[merged.config.model_type]])) as writer:
            _add_metadata(writer, merged)
            writer.add_file_type(TYPES[type][1])
            add_tokenizer(writer, merged, Path(scratch))
            with tqdm(total=size, unit="B", unit_scale=True, desc=output.name, disable=None) as bar:
                _write(writer, merged, kinds, bar)
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.replace(output)
    return output


def _write(writer: gguf.GGUFWriter, merged: Merged, kinds: dict[str, gguf.GGMLQuantizationType], bar) -> None:
    """Write the file: first what it holds, then the tensors one by one."""
    name_map = gguf.get_tensor_name_map(ARCHITECTURES[merged.config.model_type], merged.config.num_hidden_layers)
    rope_factors = _rope_factors(merged.config)
    if rope_factors is not None:
        writer.add_tensor_info(ROPE_FREQS, rope_factors.shape, rope_factors.dtype, rope_factors.nbytes)
    for name, kind in kinds.items():
        shape = merged.shapes[name]
        in_bytes = gguf.quant_shape_to_byte_shape(shape, kind)  # which uint8 has it take for the shape
        new = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor_info(new, in_bytes, np.dtype(np.uint8), _nbytes(shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if rope_factors is not None:
        writer.write_tensor_data(rope_factors)
    for name, kind in kinds.items():
        data = _data(merged, name, kind)
        writer.write_tensor_data(data)
        bar.update(data.nbytes)


def _kind(shape: tuple[int, ...], matrix_type: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return F32
    fits = shape[-1] % gguf.GGML_QUANT_SIZES[matrix_type][0] == 0
    return matrix_type if fits else gguf.GGMLQuantizationType.F16


def _nbytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    return int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))


def _data(merged: Merged, name: str, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    weight, config = merged.read(name, DTYPES.get(kind, torch.float32)), merged.config
    if ARCHITECTURES[config.model_type] == gguf.MODEL_ARCH.LLAMA:
        if ".q_proj." in name:
            weight = interleave(weight, config.num_attention_heads)
        elif ".k_proj." in name:
            weight = interleave(weight, config.num_key_value_heads)
    return weight.numpy() if kind in DTYPES else gguf.quantize(weight.numpy(), kind)


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a projection [heads * d, ...] reordered: of each head 0, d/2, 1, d/2 + 1 and so on."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _add_metadata(writer: gguf.GGUFWriter, merged: Merged) -> None:
    config = merged.config
    if config.hidden_act not in ("silu", "swish"):
        raise FastkitError(f"{merged.base} computes {config.hidden_act} in its MLP: llama.cpp knows silu there")
    heads, D = config.num_attention_heads, head_dim(config)
    rope = config.rope_parameters
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(merged.base).name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 2**31))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(D)
    writer.add_value_length(D)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(D)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )


def _rope_factors(config) -> np.ndarray | None:
    """What llama.cpp divides each frequency by, fp32 [head_dim / 2], for Llama 3's scaling; None for others.

    Raises FastkitError for a scaling that the format cannot say.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope["rope_type"]
    said = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    if kind == "llama3":
        said |= {"low_freq_factor", "high_freq_factor"}
    unsaid = {key: value for key, value in rope.items() if key not in said and value not in (None, ASSUMED.get(key))}
    odd = [f"{key} {value}" for key, value in unsaid.items()]
    if kind not in ("default", "linear", "yarn", "llama3") or odd:
        raise FastkitError(f"RoPE scaled by {', '.join([kind, *odd])} has no place in GGUF: export it merged")
    if kind != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = head_dim(config)
    plain = rope["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return (plain / scaled).numpy()
