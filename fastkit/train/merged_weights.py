"""The weights of a base model with a LoRA adapter added, each made when it is asked for: never the whole model at once.

    W = dequantize(base weight in NF4) + scaling * B @ A

in fp32, rounded once. The base is quantized anew, weight by weight and as in training, because the adapter has learned
to go with what NF4 holds and not with the weight that it came from.
"""

import copy
import functools
import json
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fastkit.errors import FastkitError
from fastkit.models import smollm2
from fastkit.models.bnb import bnb, nf4_config
from fastkit.models.load import config_for, first_line, read_tokenizer, resolve_device, resolve_dtype
from fastkit.models.lora import base_of
from fastkit.models.shapes import SHAPES

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"  # of every supported architecture
# Of peft's settings, those that leave W as it stands above; any other that is on makes another W.
PLAIN = (
    "peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "runtime_config", "revision",
    "base_model_name_or_path", "megatron_core", "qalora_group_size", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "bias", "r", "rank_pattern", "lora_alpha", "alpha_pattern",
    "lora_dropout", "use_rslora", "init_lora_weights", "eva_config",
)  # fmt: skip
INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the base's weights as well


class Merged:
    """The weights of a base and its adapter, or of a folder without an adapter, each made when it is read.

    config      of transformers, unquantized, its head tied to the embedding or not as in the result
    tokenizer   the adapter's own where it has one
    shapes      of the weights, by name
    """

    def __init__(self, source: str | Path, *, model: str | None = None, device: str = "auto", quantize: bool = True):
        source = Path(source)
        adapter = Adapter(source) if (source / "adapter_config.json").is_file() else None
        self.base = str(source) if adapter is None else model or adapter.base
        if not self.base:
            raise FastkitError(f"{source}/adapter_config.json names no base model: name it with model")
        if self.base in SHAPES:
            raise FastkitError(f"{source} was trained on random weights of {self.base}: there is nothing to export")
        self.adapter, self.device = adapter, resolve_device(device)
        self.config = copy.deepcopy(config_for(self.base))
        if self.base == "smollm2":
            self.base = str(smollm2.ensure())
        has_tokenizer = adapter is not None and (source / "tokenizer_config.json").is_file()
        self.tokenizer = read_tokenizer(source if has_tokenizer else self.base)
        self._files = _weight_files(self.base)
        self._beside = {}  # what bitsandbytes has stored beside a weight in 4 bits
        for key in self._files:
            module, weight, _ = key.partition(".weight.")
            if weight:
                self._beside.setdefault(f"{module}.weight", []).append(key)
        self._dtype = _trained_dtype(source, self.device)
        already = getattr(self.config, "quantization_config", None) is not None
        if already:
            del self.config.quantization_config
        self.shapes, linears = _layout(self.config)
        self._quantized = linears if adapter is not None and quantize and not already else set()
        self._stored = {name: name for name in self.shapes}
        if self.config.tie_word_embeddings:
            self._tie()
        if adapter is not None:
            self._stored |= adapter.whole
            self._files |= dict.fromkeys(adapter.whole.values(), adapter.file)
        self._check()

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The weight on the CPU, in `dtype`. Raises FastkitError when it overflows that."""
        weight = self._base(name)
        if self.adapter is not None and name in self.adapter.weights:
            A, B, scaling = self.adapter.read(name, self.device)
            # a copy, which is written into: what is read from a file may be the file's own pages
            weight = weight.to(self.device, torch.float32, copy=True).addmm_(B, A, alpha=scaling)
        weight = weight.to("cpu", dtype)
        if not weight.isfinite().all():
            raise FastkitError(
                f"{name} has numbers beyond the range of {dtype}, or none: use another dtype, or mend it"
            )
        return weight

    def save_about(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write what goes beside the weights: config.json, generation_config.json, the tokenizer."""
        from transformers import GenerationConfig
        from transformers.utils import cached_file

        config = copy.deepcopy(self.config)
        config.dtype = dtype
        config.save_pretrained(folder)
        # copied as it is: some that are on the hub do not pass the check when saved
        if known := cached_file(self.base, "generation_config.json", _raise_exceptions_for_missing_entries=False):
            shutil.copyfile(known, folder / "generation_config.json")
        else:
            GenerationConfig.from_model_config(config).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _base(self, name: str) -> torch.Tensor:
        """The base's weight: as it is stored, or in fp32 what its NF4 holds."""
        stored = self._stored[name]
        if stored in self._beside:
            state = {key: self._tensor(key) for key in self._beside[stored]}
            weight = bnb.nn.Params4bit.from_prequantized(self._tensor(stored), state, device=self.device)
        elif name in self._quantized:
            weight = self._tensor(stored).to(self._dtype)
            weight = bnb.nn.Params4bit(weight, False, quant_type="nf4", compress_statistics=True).to(self.device)
        else:
            return self._tensor(stored)
        weight.quant_state.dtype = torch.float32  # of what it is dequantized to: not rounded before the sum
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)

    def _tensor(self, name: str) -> torch.Tensor:
        try:
            with safe_open(self._files[name], "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise FastkitError(f"cannot read {self._files[name]}: {first_line(error)}; download it anew") from error

    def _tie(self) -> None:
        """As transformers ties when it loads: to the one that is stored, and not at all where both are and differ."""
        stored = [name for name in (EMBEDDING, HEAD) if name in self._files]
        apart = len(stored) == 2 and not torch.equal(self._tensor(HEAD), self._tensor(EMBEDDING))
        if len(stored) == 1:
            self._stored |= {EMBEDDING: stored[0], HEAD: stored[0]}
        if apart or (self.adapter is not None and HEAD in self.adapter.weights):
            self.config.tie_word_embeddings = False
        else:
            del self.shapes[HEAD]

    def _check(self) -> None:
        """Raise FastkitError unless the files hold every weight in its shape, and the adapter fits them."""
        for name, shape in self.shapes.items():
            stored = self._stored[name]
            if stored not in self._files:
                raise FastkitError(f"{self.base} lacks the weight {stored}: download or save it anew")
            if stored not in self._beside and (found := self._shape(stored)) != shape:
                raise FastkitError(f"{self.base}: {stored} is {found}, by its config.json {shape}: download it anew")
        for name in () if self.adapter is None else self.adapter.weights:
            shape, fits = self.shapes.get(name), self.adapter.shape(name)
            if shape != fits:
                raise FastkitError(
                    f"the adapter {self.adapter.folder} does not fit {self.base}: it changes {name} of shape {fits}, "
                    f"which there is {shape or 'absent'}; name its base with model"
                )

    def _shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._files[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())


class Adapter:
    """A folder with a LoRA adapter of peft's.

    base     the name of its base model, or None
    weights  the names of those that it adds to
    whole    the keys of those that it holds whole, by name: peft saves the embeddings with an adapter of the head

    Raises FastkitError for a folder that holds none, or one that is no plain LoRA.
    """

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "adapter_model.safetensors"
        if not self.file.is_file():
            raise FastkitError(f"{folder} has no adapter_model.safetensors: pickle adapters are not loaded")
        try:
            self.about = json.loads((folder / "adapter_config.json").read_text())
            with safe_open(self.file, "pt") as file:
                self._shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (ValueError, OSError, SafetensorError) as error:
            raise FastkitError(f"cannot read the adapter {folder}: {first_line(error)}; save it anew") from error
        self.base = base_of(self.about)
        self._refuse_variants()
        modules, self.whole = {}, {}
        for key in self._shapes:
            if match := re.fullmatch(r"base_model\.model\.(lm_head|model\.embed_tokens)(\.base_layer)?\.weight", key):
                self.whole[f"{match[1]}.weight"] = key
                continue
            if not (match := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)):
                raise FastkitError(f"{folder} holds {key}, which is no LoRA matrix of a linear layer: it has no merge")
            modules.setdefault(match[1], set()).add(match[2])
        if half := next((name for name, sides in modules.items() if len(sides) < 2), None):
            raise FastkitError(f"{folder} holds half of the adapter of {half}: save it anew")
        self.weights = {f"{name}.weight": name for name in modules}

    def shape(self, name: str) -> tuple[int, int]:
        """[N, K] of the weight that the adapter can be added to."""
        return self._shapes[self._key(name, "B")][0], self._shapes[self._key(name, "A")][1]

    def read(self, name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(A [r, K], B [N, r], scaling), in fp32 on `device`."""
        from peft.utils.other import get_pattern_key

        with safe_open(self.file, "pt") as file:
            A, B = (file.get_tensor(self._key(name, side)).to(device, torch.float32) for side in "AB")
        patterns = self.about.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(patterns, self.weights[name]), self.about["lora_alpha"])
        return A, B, alpha / (math.sqrt(A.shape[0]) if self.about.get("use_rslora") else A.shape[0])

    def _key(self, name: str, side: str) -> str:
        return f"base_model.model.{self.weights[name]}.lora_{side}.weight"

    def _refuse_variants(self) -> None:
        about = self.about
        on = [key for key, value in about.items() if value and key not in PLAIN]
        if about.get("peft_type") != "LORA":
            on = [f"peft_type {about.get('peft_type')}"]
        elif about.get("bias", "none") != "none":
            on.append(f"bias {about['bias']}")
        elif about.get("init_lora_weights") not in INITIALIZATIONS:
            on.append(f"init_lora_weights {about['init_lora_weights']}")
        if on:
            raise FastkitError(f"{self.folder} is no plain LoRA adapter ({', '.join(on)}): merge it with peft")


def _layout(config) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """(the shapes of a model's weights by name, the names of those that are put into NF4), without the model."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    quantizer = AutoHfQuantizer.from_config(nf4_config(torch.float32), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=torch.float32)
    linears = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    return shapes, linears


def _weight_files(base: str) -> dict[str, Path]:
    """Which file holds which weight, of a folder or hub id."""
    from transformers.utils import cached_file

    find = functools.partial(cached_file, base, _raise_exceptions_for_missing_entries=False)
    try:
        if index := find("model.safetensors.index.json"):
            files = json.loads(Path(index).read_text())["weight_map"]
            paths = {file: find(file) for file in set(files.values())}
            if absent := next((file for file, path in paths.items() if path is None), None):
                raise FastkitError(f"{base} has no {absent}, which its index names: download it anew")
            return {name: Path(paths[file]) for name, file in files.items()}
        if path := find("model.safetensors"):
            with safe_open(path, "pt") as file:
                return dict.fromkeys(file.keys(), Path(path))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise FastkitError(f"cannot read the weights of {base}: {first_line(error)}; download it anew") from error
    raise FastkitError(f"{base} has no model.safetensors: pass a transformers checkpoint in safetensors")


def _trained_dtype(adapter: Path, device: torch.device) -> torch.dtype:
    """The dtype in which the base was when it was quantized: as the run's metrics say, else `load`'s own choice."""
    try:
        return getattr(torch, json.loads((adapter.parent / "metrics.json").read_text())["dtype"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return resolve_dtype("auto", device)
