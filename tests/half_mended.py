"""Mends of the capstone's faults that stop half way, and others that break the step: (part, text, what is told).

Each text is a stored solution or a planted part with lines changed.
"""

import inspect
import re

from fastkit.lab import capstone
from fastkit.lab.exercises.catalog import MENDS


def solved(fault: str, *changes: tuple[str, str]) -> str:
    return _changed(MENDS[f"capstone.{fault}"].solution, changes)


def planted(part: str, *changes: tuple[str, str]) -> str:
    """The planted part and its kernel with its imports, changed."""
    whole = inspect.getsource(capstone)
    names = {"norm": ("_norm_kernel",), "multiply": ("_multiply_kernel",), "gate": ("_gate_kernel",)}.get(part, ())
    blocks = [re.search(rf"(?:@triton\.jit\n)?def {name}\(.*?(?=\n\n\n)", whole, re.S)[0] for name in (*names, part)]
    head = (
        "import torch\nimport triton\nimport triton.language as tl\nfrom fastkit.lab.capstone import *\n"
        "from fastkit.kernels.common import fp32\nfrom fastkit.kernels.ladders.rung import gl\n"
        "from fastkit.lab.capstone import _turn_kernel\n\n\n"
    )
    return _changed(head + "\n\n\n".join(blocks) + "\n", changes)


def _changed(text: str, changes) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


FLOAT32 = ".to(tl.float32)"
LOAD = "cols = {}\n        x = tl.load(x_ptr + row + cols, mask=cols < N, other=0.0).to(tl.float32)\n        squares"
STRIDED, COALESCED = "lanes * STEPS + step", "step * LANES + lanes"
STORED = "(x * rstd * weight).to(tl.float16), mask=cols < N)"
STORED_STRIDED = """(
            tl.load(x_ptr + row + there, mask=there < N, other=0.0).to(tl.float32)
            * rstd
            * tl.load(weight_ptr + there, mask=there < N, other=0.0).to(tl.float32)
        ).to(tl.float16), mask=there < N)"""
SWIZZLE = "gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=32, order=[1, 0])"
SCALED = "return dw.mul_((MOST / norm).clamp(max=1.0))"


def padded(interval: int, numbers: int) -> tuple[str, str]:
    return SWIZZLE, f"gl.PaddedSharedLayout.with_identity_for([[{interval}, {numbers}]], [32, 32], [1, 0])"


LEFT_TO_THE_COMPILER = """import torch
from fastkit.kernels.ladders import transpose


def turn(x):
    y = torch.empty(x.shape[::-1], dtype=x.dtype, device=x.device)
    transpose.launch_automatic(x, y)
    return y
"""

HALF = {
    "strided_access": {
        "first loop only": (
            planted("norm", (LOAD.format(STRIDED), LOAD.format(COALESCED))),
            "norm: a load of x_ptr moves 16 bytes",
        ),
        "the store left": (
            solved(
                "strided_access",
                ("tl.store(y_ptr + row + cols", f"there = {STRIDED}\n        tl.store(y_ptr + row + there"),
                (STORED, STORED_STRIDED),
            ),
            "moves 16 bytes for each that it asks for",
        ),
        "runs of two": (
            solved("strided_access", (COALESCED, "step // 2 * 2 * LANES + lanes * 2 + step % 2")),
            "moves 2 bytes for each that it asks for",
        ),
        "the last numbers dropped": (
            solved("strided_access", ("STEPS=triton.cdiv(N, 128)", "STEPS=N // 128")),
            "numbers are wrong",
        ),
        "no mask": (solved("strided_access", ("mask=cols < N, other=0.0", "mask=cols >= 0, other=0.0")), "mask it"),
    },
    "bank_conflicts": {
        "8 rows swizzled": (solved("bank_conflicts", ("max_phase=32", "max_phase=8")), "has 96 bank conflicts"),
        "padded by a number": (solved("bank_conflicts", padded(32, 1)), "has 16 bank conflicts"),
        "padded by a row": (solved("bank_conflicts", padded(32, 32)), "has 992 bank conflicts"),
        "left to torch": ("def turn(x):\n    return x.T.contiguous()\n", "leaves it to torch (clone)"),
        "left to the compiler": (
            LEFT_TO_THE_COMPILER,
            "conflicts cannot be counted, for its layout is the compiler's own",
        ),
        "not turned": ("def turn(x):\n    return x.view(x.shape[::-1])\n", "numbers are wrong"),
    },
    "lost_tensor_cores": {
        "tf32": (planted("multiply", (', input_precision="ieee"', "")), "its factors are tf32"),
        "converted later": (
            planted("multiply", (FLOAT32, ""), ("tl.dot(a, b", f"tl.dot(a{FLOAT32}, b{FLOAT32}")),
            "plain FMAs",
        ),
        "16 rows": (
            solved("lost_tensor_cores", ("BLOCK_M=64", "BLOCK_M=16"), ("cdiv(M, 64)", "cdiv(M, 16)")),
            "HMMA is not all",
        ),
        "2 warps": (solved("lost_tensor_cores", ("num_warps=4", "num_warps=2")), "HMMA is not all"),
        "sums in fp16": (
            solved(
                "lost_tensor_cores",
                ("BLOCK_N], tl.float32)", "BLOCK_N], tl.float16)"),
                ("tl.dot(a, b, sums)", "tl.dot(a, b, sums, out_dtype=tl.float16)"),
            ),
            "its sums are f16",
        ),
        "left to torch": ("def multiply(a, b):\n    return a @ b\n", "launches no Triton kernel"),
        "k's tail dropped": (
            solved("lost_tensor_cores", ("range(0, K, BLOCK_K)", "range(0, K // BLOCK_K * BLOCK_K, BLOCK_K)")),
            "numbers are wrong",
        ),
    },
    "needless_copy": {
        "the output left": (planted("gate", ("hidden.float()", "hidden")), "to_copy"),
        "the input left": (planted("gate", ("dtype=torch.float32", "dtype=hidden.dtype")), "to_copy"),
        "an output in fp32": (
            solved("needless_copy", ("dtype=hidden.dtype", "dtype=torch.float32")),
            "a_ptr of _gate_kernel is float32",
        ),
        "copied in fp16": (solved("needless_copy", ("hidden.chunk(", "hidden.clone().chunk(")), "clone"),
        "computed in fp16": (
            planted(
                "gate",
                ("hidden.float()", "hidden"),
                ("dtype=torch.float32", "dtype=hidden.dtype"),
                (f"other=0.0){FLOAT32}", "other=0.0)"),
                ("tl.sigmoid(gate)", f"tl.sigmoid(gate{FLOAT32}).to(tl.float16)"),
            ),
            "numbers are wrong",
        ),
        "halves exchanged": (solved("needless_copy", ("gate, up = hidden", "up, gate = hidden")), "numbers are wrong"),
    },
    "synchronisation": {
        "item": (
            solved("synchronisation", (SCALED, "return dw.mul_(min(1.0, MOST / max(norm.item(), 1e-30)))")),
            "reads a number",
        ),
        "another if": (
            solved("synchronisation", (SCALED, f"if not torch.isfinite(norm):\n        return dw\n    {SCALED}")),
            "reads a number",
        ),
        "on the host": (
            solved("synchronisation", ("dtype=torch.float32)", "dtype=torch.float32).cpu()")),
            "copies to the host",
        ),
        "as a list": (solved("synchronisation", (SCALED, f"norm.tolist()\n    {SCALED}")), "the host waits"),
        "synchronised": (
            solved("synchronisation", (SCALED, f"torch.cuda.synchronize()\n    {SCALED}")),
            "synchronises",
        ),
        "always scaled": (solved("synchronisation", (".clamp(max=1.0)", "")), "numbers are wrong"),
        "never scaled": ("def clip(dw):\n    return dw\n", "numbers are wrong"),
    },
}
PART = {
    "strided_access": "norm",
    "bank_conflicts": "turn",
    "lost_tensor_cores": "multiply",
    "needless_copy": "gate",
    "synchronisation": "clip",
}
