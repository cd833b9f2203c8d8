"""Loading, quantizing, random weights, LoRA and the patch, on models so small that the CPU does."""

import gc
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from probe import gradients, linears, logits
from tiny import ARCHITECTURES, SHAPE, tiny_model

from fastkit.errors import FastkitError
from fastkit.models import add_lora, load, random_weights
from fastkit.models.bnb import bnb, keep_differentiable, nf4_config
from fastkit.models.load import resolve_device, resolve_dtype
from fastkit.models.lora import PROJECTIONS
from fastkit.models.shapes import SHAPES, config_of

PARAMETERS = {
    "mistral-7b": 7_241_732_096,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "qwen2.5-7b": 7_615_616_512,
}


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of the tiny Llama's folder, to be damaged."""
    return shutil.copytree(folders["llama"], tmp_path / "copy")


def check_quantized(model):
    for name, module in linears(model).items():
        if name == "lm_head":
            assert type(module) is torch.nn.Linear
            continue
        assert isinstance(module, bnb.nn.Linear4bit), name
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
        assert (
            module.weight.dtype == torch.uint8 and module.weight.numel() * 2 == module.in_features * module.out_features
        )
    assert {name.rpartition(".")[2] for name in linears(model)} == {*PROJECTIONS, "lm_head"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_load(folders, arch):
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(str(folders[arch]), device="cpu")
    assert model.config.model_type == arch and not model.training and model.dtype == torch.float32
    assert tokenizer.pad_token_id is not None
    check_quantized(model)

    # Stock transformers, the same quantization. On a CPU with AVX512-BF16 its first forward in eval mode would repack
    # the weights for a kernel that multiplies in bf16; `load` keeps that off, so the stock model must have it off too.
    stock = AutoModelForCausalLM.from_pretrained(
        folders[arch], dtype=torch.float32, quantization_config=nf4_config(torch.float32), device_map="cpu"
    )
    torch.testing.assert_close(logits(model), logits(keep_differentiable(stock)), atol=1e-5, rtol=0)

    dense, _ = load(str(folders[arch]), device="cpu", quantize=False)
    original = AutoModelForCausalLM.from_pretrained(folders[arch]).state_dict()
    assert dense.state_dict().keys() == original.keys()
    for name, weight in dense.state_dict().items():
        assert torch.equal(weight, original[name]), name


def test_a_quantized_checkpoint(folders, llama, tmp_path):
    model, tokenizer = llama
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(str(tmp_path), device="cpu")
    check_quantized(again)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)


def test_tied_embeddings_lack_nothing(tmp_path):
    model, _ = load(str(tiny_model(tmp_path, tie_word_embeddings=True)), device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_quantized(model)


def test_a_tokenizer_without_a_pad_token_pads_with_eos(copied):
    config = copied / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "pad_token"}))
    _, tokenizer = load(str(copied), device="cpu")
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_dtype(folders):
    model, _ = load(str(folders["llama"]), device="cpu", dtype="bf16")
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


# --- random weights


@pytest.fixture(params=SHAPES)
def reduced(request, monkeypatch):
    """The name of each shape, cut down to tiny widths; what makes the architecture stays."""
    shape = SHAPES[request.param]
    heads = SHAPE["num_attention_heads"]
    small = {
        **{name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        "intermediate_size": 192,
        "num_key_value_heads": heads if shape["num_key_value_heads"] == shape["num_attention_heads"] else 2,
    }
    monkeypatch.setitem(SHAPES, request.param, {**shape, **small})
    return request.param


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_known_numbers_of_parameters(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_random_weights(reduced):
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(reduced, random_weights=True, device="cpu")
    check_quantized(model)
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(model.config)
    shapes = {name: getattr(p, "quant_state", p).shape for name, p in model.named_parameters()}
    assert shapes == {name: p.shape for name, p in real.named_parameters()}
    biases = [name for name in shapes if name.endswith(".bias")]
    assert len(biases) == (3 * SHAPE["num_hidden_layers"] if model.config.model_type == "qwen2" else 0)
    assert logits(model).isfinite().all()
    assert max(tokenizer("é")["input_ids"]) < model.config.vocab_size
    for name, gradient in gradients(add_lora(model, rank=2)).items():
        assert gradient.isfinite().all()
        assert gradient.any() == ("lora_B" in name)  # B is zero, so nothing comes through it to A yet


def test_random_weights_are_quantized_one_by_one(reduced, monkeypatch):
    dense, quantize = [], bnb.nn.Params4bit

    def watch(weight, **settings):
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type == "cpu"]
        matrices = [t for t in tensors if t.dim() == 2 and t.is_floating_point() and SHAPE["vocab_size"] not in t.shape]
        dense.append({t.untyped_storage().data_ptr() for t in matrices})
        return quantize(weight, **settings)

    monkeypatch.setattr(random_weights.bnb.nn, "Params4bit", watch)
    gc.collect()
    gc.freeze()  # what exists already is not looked at
    load(reduced, random_weights=True, device="cpu")
    gc.unfreeze()
    assert [len(alive) for alive in dense] == [1] * 7 * SHAPE["num_hidden_layers"]


def test_random_weights_follow_the_seed(reduced):
    one, again, other = (logits(load(reduced, random_weights=True, device="cpu", seed=s)[0]) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


# --- what is refused


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


GPTQ = {"quant_method": "gptq", "bits": 4}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def to_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def to_adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "{f} has no config.json: pass"),
        (lambda f: (f / "config.json").write_text("{"), "cannot read {f}/config.json: .*not a valid JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "{f} has no weights, no .*safetensors.*: download"),
        (to_pickle, r"{f} has pickle weights only \(pytorch_model.bin\).*: convert them"),
        (to_adapter, "{f} holds a LoRA adapter, not a model: pass"),
        (truncate, "cannot load {f}: .*; download or save it anew"),
        (lambda f: (f / "tokenizer.json").unlink(), "cannot read a tokenizer from {f}: .*; use a checkpoint"),
        (lambda f: change_config(f, model_type="gpt2"), "{f} is of architecture 'gpt2': use one of llama, mistral"),
        (lambda f: change_config(f, model_type="nosuch"), "cannot read {f}/config.json: .*nosuch"),
        (lambda f: change_config(f, quantization_config=GPTQ), "{f} is quantized with gptq: use an unquantized"),
        (lambda f: change_config(f, quantization_config=INT8), "{f} is quantized with bitsandbytes in 8 bits: use an"),
        (lambda f: change_config(f, num_hidden_layers=3), r"{f}: .* 9 are missing .*layers\.2\..*; download"),
        (lambda f: change_config(f, vocab_size=301), r"{f}: .* 2 are missing or of another shape.*lm_head"),
        (lambda f: change_config(f, intermediate_size=64), r"{f}: .* 6 are missing or of another shape.*down_proj"),
    ],
)  # fmt: skip
def test_a_damaged_folder(copied, damage, message):
    damage(copied)
    check_refused(message.format(f=copied), str(copied), device="cpu")


def check_refused(message: str, *args, **settings):
    with pytest.raises(FastkitError, match=message) as caught:
        load(*args, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("nosuch", {}, "model 'nosuch' is no folder, hub id .* or known name: smollm2, mistral-7b"),
        ("/no/such/folder", {}, "model '/no/such/folder' is no folder"),
        (__file__, {}, f"{__file__} is a file: pass the folder"),
        ("mistral-7b", {}, "'mistral-7b' is a shape without weights: add --random-weights"),
        ("smollm2", {"random_weights": True}, "no shape named 'smollm2' .*: use one of mistral-7b"),
        ("mistral-7b", {"random_weights": True, "quantize": False}, "random weights come quantized: leave out"),
        ("smollm2", {"device": "gpu"}, "device 'gpu' is unknown: use auto, cpu"),
        ("smollm2", {"device": "meta"}, "device 'meta' is not supported: use auto, cpu"),
        ("smollm2", {"dtype": "int8"}, "dtype 'int8' is unknown: use auto, bf16"),
    ],
)
def test_a_bad_argument(model, settings, message):
    check_refused(message, model, **{"device": "cpu", **settings})


def test_devices_and_dtypes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    check_refused(r"device 'cuda' was asked for, but torch .* sees 0 GPUs: use --device cpu", "smollm2", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:0")
    check_refused("device 'cuda:1' was asked for, but torch .* sees 1 GPUs", "smollm2", device="cuda:1")
    assert resolve_dtype("auto", torch.device("cuda:0")) == torch.float16
    check_refused("Tesla T4 does not compute in bf16: use --dtype fp16", "smollm2", device="cuda", dtype="bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert resolve_dtype("auto", torch.device("cuda:0")) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.slow
def test_a_hub_id_offline(tmp_path):
    code = "from fastkit.models import load\nload('nobody/no-model', device='cpu')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot read 'nobody/no-model' from the hub (HF_HUB_OFFLINE is set): " in last
    assert last.endswith("or use a local folder or smollm2")
