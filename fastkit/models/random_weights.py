"""A model of random weights at an exact shape, quantized one matrix at a time.

Right for speed, memory and gradient parity; worthless for any claim about quality.
"""

import torch
from torch import nn

from fastkit.models.bnb import bnb, nf4_config


def build(config, dtype: torch.dtype, device: torch.device, seed: int = 0):
    """Build `config`'s causal language model with random weights, its decoder linears in NF4.

    The model is laid out without storage, then each matrix is drawn in `dtype` on `device`, quantized and
    dropped before the next: a 13B model's 26 GB of bf16 never exist at once.

    Returns the model in eval mode, marked as transformers marks a model that it quantized itself.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantizer = AutoHfQuantizer.from_config(nf4_config(dtype), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": device}, dtype=dtype)

    generator = torch.Generator(device).manual_seed(seed)
    std = config.initializer_range
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = torch.empty(module.weight.shape, dtype=dtype, device=device).normal_(0, std, generator=generator)
            # Params4bit quantizes on its way to a device
            module.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
            ).to(device)
            if module.bias is not None:
                module.bias = nn.Parameter(torch.zeros(module.bias.shape, dtype=dtype, device=device), False)
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(
                torch.empty(module.weight.shape, dtype=dtype, device=device).normal_(0, std, generator=generator), False
            )
        elif hasattr(module, "inv_freq"):  # the rotary cache: buffers that are computed, not stored
            model.set_submodule(name, type(module)(config).to(device))
        elif getattr(module, "weight", None) is not None and not any(module.children()):  # the norms
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=dtype, device=device), False)
    model.tie_weights()
    left = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if p.device.type == "meta"]
    if left:
        raise NotImplementedError(f"no rule to draw random weights for {left[:3]} of {type(model).__name__}")
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    return model.eval()


def byte_tokenizer():
    """A tokenizer for models without one: a token a byte, ChatML turns. Its 259 ids fit any vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    chatml = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chatml,
    )
