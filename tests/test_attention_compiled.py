"""What the compiler makes of attention's kernels: no spills, 128-bit accesses, matrix units, for every architecture."""

import pytest
import torch
from compiled import compile_all

from fastkit.kernels import attention_backward, attention_backward_hopper, attention_forward, attention_hopper
from fastkit.lab.portability import misfit
from fastkit.lab.tracer import trace_launches

pytest.importorskip("triton")


def launches(arch, D=128, window=None, packed=False, H=4, H_k=2, T=256):
    """A function that launches the forward and the backward as on `arch`."""
    q, o, do, dq = (torch.empty(2, T, H, D, dtype=torch.float16).transpose(1, 2) for _ in range(4))
    k, v, dk, dv = (torch.empty(2, T, H_k, D, dtype=torch.float16).transpose(1, 2) for _ in range(4))
    lse, options = torch.empty(2, H, T), {"causal": True, "window": window, "scale": 0.1}
    if packed:
        q, o, do, dq, k, v, dk, dv = (x[:1] for x in (q, o, do, dq, k, v, dk, dv))
        cu = torch.tensor([0, 100, T], dtype=torch.int32)
        lse, options = lse[:1], options | {"cu_q": cu, "cu_k": cu, "max_q": 160, "max_k": 160}

    def launch():
        with pytest.MonkeyPatch.context() as patch:
            for module in (attention_forward, attention_backward):
                patch.setattr(module, "architecture", lambda device: arch)
            for module in (attention_hopper, attention_backward_hopper):  # which have tests of their own
                patch.setattr(module, "takes", lambda *args: False)
            attention_forward.launch_forward(q, k, v, o, lse, **options)
            attention_backward.launch_backward(do, q, k, v, o, lse, dq, dk, dv, **options)

    return launch


@pytest.mark.parametrize(
    ("arch", "D", "options"),
    [
        ("sm_86", 64, {}),
        ("sm_89", 128, {"packed": True}),
        ("sm_89", 256, {}),
        ("sm_90", 128, {}),
        ("sm_90", 16, {"T": 1}),
        ("sm_90", 128, {"packed": True}),
        ("sm_90", 128, {"window": 64}),
        ("sm_90", 256, {}),
        ("gfx942", 128, {}),
    ],
    ids=str,
)
def test_compiled_code(arch, D, options):
    made = compile_all(launches(arch, D, **options), arch)
    assert [compiled.kernel for compiled in made] == [
        "_forward_kernel", "_backward_dq_kernel", "_backward_dk_dv_kernel"
    ]  # fmt: skip
    unit = {"sm_90": "WGMMA", "gfx942": "MFMA"}.get(arch, "HMMA")
    for compiled in made:
        found = compiled.instructions
        small = arch == "sm_90" and D == 256 and "dk" in compiled.kernel  # tiles too low for wgmma, or TMA's own
        assert (unit in found or small) and not misfit(compiled) and compiled.spilled_bytes <= 16, compiled.kernel
        if arch.startswith("sm_"):
            assert found["ld.global.128"] and found["st.global.128"] and not found["st.global.16"]
        if arch == "sm_90":  # a causal forward is faster without
            by_tma = "backward" in compiled.kernel and not options.get("packed")
            assert bool(found["TMA load"]) == by_tma != bool(found["cp.async.128"])


@pytest.mark.parametrize(
    ("arch", "dtype"), [("sm_75", torch.float16), ("sm_90", torch.float32), ("gfx1100", torch.float16)]
)
def test_what_has_no_kernel_names_torch(arch, dtype, monkeypatch):
    monkeypatch.setattr(attention_forward, "architecture", lambda device: arch)
    x = torch.empty(1, 1, 8, 16, dtype=dtype)
    with pytest.raises(NotImplementedError, match=r": use torch\.nn\.functional\.scaled_dot_product_attention"):
        attention_forward.launch_forward(x, x, x, x, torch.empty(1, 1, 8), causal=True, window=None, scale=1.0)


def test_the_grid_visits_every_block_once_and_the_longest_first():
    """place(), in numbers: sections of heads, blocks from the last to the first."""
    import numpy as np

    from fastkit.kernels.common import tl, triton

    @triton.jit
    def record(out_ptr, heads, section_heads):
        block, head = attention_forward.place(heads, section_heads, True)
        tl.store(out_ptr + tl.program_id(0) * 2, block)
        tl.store(out_ptr + tl.program_id(0) * 2 + 1, head)

    for heads, section, blocks in ((6, 4, 3), (5, 9, 2), (3, 1, 4)):
        out = torch.zeros(heads * blocks, 2, dtype=torch.int32)
        record[(heads * blocks,)](out, heads, section)
        visited = [tuple(row) for row in out.tolist()]
        assert sorted(visited) == [(b, h) for b in range(blocks) for h in range(heads)]
        first = visited[: min(heads, section)]
        assert all(block == blocks - 1 for block, _ in first) and np.ptp([h for _, h in first]) < section


def test_the_forward_reads_what_it_must():
    """Each byte of q, k, v is wanted and none beyond: the tracer's count of distinct sectors."""
    q, k, v, o = (torch.zeros(1, 1, 128, 128, dtype=torch.float16) for _ in range(4))
    lse = torch.zeros(1, 1, 128)

    def launch():
        attention_forward.launch_forward(
            q, k, v, o, lse, causal=True, window=None, scale=0.1, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2
        )

    (trace,) = trace_launches(launch, arch="sm_80")
    assert trace.least_bytes == {"load": 3 * q.nbytes, "store": o.nbytes + lse.nbytes}
