"""Other people's kernels that `fastkit bench` times beside ours, where they are installed. None is needed."""

import importlib
import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

import torch


def peers(op: str, *fixed) -> tuple[dict[str, Callable], dict[str, str]]:
    """Others' kernels that are installed, and why the rest is absent. `fixed`: what an operation has beside inputs."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it reports to its makers otherwise
    found, absent = {}, {}
    for who, package, make in PEERS.get(op, ()):
        if importlib.util.find_spec(package) is None:
            absent[who] = "not installed"
            continue
        try:
            with _left_alone():
                importlib.import_module(package)
                found[who] = make(*fixed)
        except Exception as error:  # a peer that this torch or Triton breaks must not end the benchmark
            absent[who] = f"does not import: {said(error)}"
    return found, absent


@contextmanager
def _left_alone() -> Iterator[None]:
    """Import within, with no warnings about their sources; with nothing said of what unsloth would patch in
    transformers, which is not timed here; afterwards the environment, but for unsloth's own variables, is what it was:
    unsloth sets some that Triton and torch read, such as TRITON_DISABLE_LINE_INFO."""
    before = dict(os.environ)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        for kind in (SyntaxWarning, DeprecationWarning):  # of escapes: in Python 3.12, and before
            warnings.simplefilter("ignore", kind)
        warnings.filterwarnings("ignore", message=r"\s*WARNING: Unsloth should be imported before")
        try:
            yield
        finally:
            for name in {*before, *os.environ}:
                if name.startswith("UNSLOTH"):
                    continue
                if name in before:
                    os.environ[name] = before[name]
                else:
                    del os.environ[name]


def said(error: Exception) -> str:
    """What a peer raised, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _liger_rms_norm(weight, eps):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    weight = torch.nn.Parameter(weight.clone())  # its backward computes the weight's gradient in any case
    return lambda x: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _liger_add_rms_norm(weight, eps):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    weight = torch.nn.Parameter(weight.clone())
    return lambda x, residual: LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)


def _liger_swiglu():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def _liger_geglu():
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply


def _liger_rope(cos, sin):
    from liger_kernel.ops.rope import LigerRopeFunction

    return lambda q, k: LigerRopeFunction.apply(q, k, cos, sin)


def _liger_cross_entropy(labels):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return lambda logits: LigerCrossEntropyFunction.apply(logits, labels)[0]


def _liger_linear_cross_entropy(weight, labels):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda hidden: LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)[0]


def _unsloth_rms_norm(weight, eps):
    from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm

    return lambda x: Fast_RMS_Layernorm.apply(x, weight, eps, False)


def _unsloth_swiglu():
    from unsloth.kernels.swiglu import swiglu_fg_kernel

    return lambda gate, up: swiglu_fg_kernel(gate.detach()[None], up.detach()[None])[0]


def _unsloth_linear_cross_entropy(weight, labels):
    from unsloth.kernels.cross_entropy_loss import fast_cross_entropy_loss

    return lambda hidden: fast_cross_entropy_loss((hidden @ weight.T)[None], labels[None])


def _apple_linear_cross_entropy(weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden: linear_cross_entropy(hidden, weight, labels)


def _bitsandbytes_dequantize(dense):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    return lambda: dequantize_4bit(packed, state)


def _unsloth_dequantize(dense):
    from bitsandbytes.functional import quantize_4bit
    from unsloth.kernels.utils import fast_dequantize

    packed, state = quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    return lambda: fast_dequantize(packed, state)


def _bitsandbytes_matvec(dense):
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)


def _bitsandbytes_adamw():
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


PEERS = {  # operation: (who, package, what makes its function)
    "rms_norm": [("Liger", "liger_kernel", _liger_rms_norm), ("Unsloth", "unsloth", _unsloth_rms_norm)],
    "add_rms_norm": [("Liger", "liger_kernel", _liger_add_rms_norm)],
    "swiglu": [("Liger", "liger_kernel", _liger_swiglu), ("Unsloth", "unsloth", _unsloth_swiglu)],
    "geglu": [("Liger", "liger_kernel", _liger_geglu)],
    "rope in place": [("Liger", "liger_kernel", _liger_rope)],
    "cross_entropy": [("Liger", "liger_kernel", _liger_cross_entropy)],
    "linear_cross_entropy": [
        ("Liger", "liger_kernel", _liger_linear_cross_entropy),
        ("Unsloth", "unsloth", _unsloth_linear_cross_entropy),
        ("Apple CCE", "cut_cross_entropy", _apple_linear_cross_entropy),
    ],
    "nf4": [
        ("bitsandbytes", "bitsandbytes", _bitsandbytes_dequantize),
        ("Unsloth", "unsloth", _unsloth_dequantize),
    ],
    "nf4_matvec": [("bitsandbytes", "bitsandbytes", _bitsandbytes_matvec)],
    "adamw": [("bitsandbytes", "bitsandbytes", _bitsandbytes_adamw)],
}
NAMES = {who for entries in PEERS.values() for who, *_ in entries}
