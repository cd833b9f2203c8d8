"""That torch.compile takes nf4, merged dequantization, the 4-bit product and LoRA's gradients in one graph each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CHILD = """
import torch, torch.utils._triton
torch.utils._triton.has_triton = lambda *a: True  # no GPU, but what would be traced with one
from fastkit.kernels import lora, merged_dequantize, nf4, nf4_matvec
for module in (lora, merged_dequantize, nf4, nf4_matvec):
    module.on_triton = lambda *a: True
    module.architecture = torch.compiler.assume_constant_result(lambda device: "sm_90")

class Traced(BaseException):
    pass

def backend(graph, inputs):
    print(sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))
    raise Traced

def trace(function, *arguments):
    try:
        torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    except Traced:
        pass

weight = nf4.empty_nf4((64, 128), torch.bfloat16, device="cpu")
x, A, B = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((5, 128), (4, 128), (64, 4)))
trace(lambda: nf4.dequantize_nf4(weight))
trace(lambda x: nf4_matvec.nf4_matvec(x, weight), x[:1])
trace(lambda x: nf4_matvec.nf4_matvec(x, weight), x)
trace(lambda A, B: merged_dequantize.merged_dequantize(weight, A, B, 2.0), A, B)
trace(lambda A, B: merged_dequantize.merged_dequantize_fp8(weight, torch.ones(64), A, B, 2.0), A, B)
trace(lora.lora_gradients, x, [x[:, :64]], [A], [B], [2.0])
trace(lambda rstd: lora.lora_gradients(x, [x[:, :64]], [A], [B], [2.0], rstd=rstd, weight=x[0]), torch.ones(5))
"""


def test_one_graph_each():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert child.stdout.split() == ["1", "1", "1", "1", "1", "5", "5"], child.stderr
