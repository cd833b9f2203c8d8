"""What the compiler makes of the rungs: the accesses that they are named for, and nothing that a card cannot hold."""

import dataclasses

import pytest
import torch

from fastkit.kernels.ladders import copy, matmul, softmax, transpose
from fastkit.kernels.ladders import rung as rungs
from fastkit.lab.compiling import ARCHITECTURES, compile_launch
from fastkit.lab.launches import catch
from fastkit.lab.portability import misfit
from fastkit.lab.tracer import trace_launches

pytest.importorskip("triton")


def tensors(ladder, dtype=torch.float32, size=1024):
    """What a rung of `ladder` takes, at a size that all tiles divide."""
    if ladder is matmul:
        return tuple(torch.empty(size, size, dtype=torch.float16) for _ in range(3))
    return tuple(torch.empty(size, size, dtype=dtype) for _ in range(2))


def compiled(ladder, name, arch, *arguments, **tiling):
    """The rung, compiled for `arch` as it would be launched there."""
    rung = next(rung for rung in ladder.RUNGS if rung.name == name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rungs, "architecture", lambda device: arch)
        patch.setattr(matmul, "architecture", lambda device: arch)
        (launch,) = catch(lambda: rung.launcher(*(arguments or tensors(ladder)), **tiling))
    return compile_launch(launch, arch)


def runs_on(rung, arch, monkeypatch):
    monkeypatch.setattr(rungs, "INTERPRETED", False)
    monkeypatch.setattr(rungs, "GLUON_MISSING", "")
    monkeypatch.setattr(rungs, "architecture", lambda device: arch)
    return not rung.lacking(torch.device("cpu"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("ladder", [copy, transpose, softmax, matmul], ids=["copy", "transpose", "softmax", "matmul"])
def test_every_rung_fits_the_architectures_that_it_claims(ladder, arch, monkeypatch):
    """No spills, no more shared memory or threads than a program may have. What does not fit has to say so: `needs`."""
    for rung in ladder.RUNGS:
        if not runs_on(rung, arch, monkeypatch):
            continue
        made = compiled(ladder, rung.name, arch)
        assert not misfit(made), f"{rung.name} on {arch}: {misfit(made)}"
        stack = 8 if (arch, rung.name) == ("sm_120", "persistent") else 0  # triton 3.6's; ptxas -v says no spill
        assert made.spilled_bytes <= stack, f"{rung.name} on {arch} spills {made.spilled_bytes} bytes"


@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_longest_rows_fit(dtype, arch):
    x = torch.empty(8, softmax.MAX_N, dtype=torch.float16 if arch == "sm_75" else dtype)
    for name in ("fused", "persistent"):
        made = compiled(softmax, name, arch, x, x)
        assert made.spilled_bytes == 0 and not misfit(made)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("name", "bits", "count", "sectors"), [("strided", 32, 1, 32), ("coalesced", 32, 1, 4), ("vectorised", 128, 4, 16)]
)
def test_copies_differ_in_what_reaches_memory(name, bits, count, sectors, arch):
    made = compiled(copy, name, arch)
    moves = {key: n for key, n in made.instructions.items() if "global" in key}
    assert moves == {f"ld.global.{bits}": count, f"st.global.{bits}": count}
    x = torch.zeros(2**14)
    (trace,) = trace_launches(lambda: getattr(copy, f"launch_{name}")(x, torch.empty_like(x)), arch=arch)
    assert trace.sectors_per_request("load") == trace.sectors_per_request("store") == sectors
    assert trace.bytes_moved("load") == x.nbytes * (8 if name == "strided" else 1)


@pytest.mark.parametrize(("name", "load", "store"), [("naive", 4, 32), ("automatic", 16, 16)])
def test_transposes_sectors(name, load, store):
    x = torch.zeros(128, 256)
    (trace,) = trace_launches(lambda: getattr(transpose, f"launch_{name}")(x, torch.empty(256, 128)), arch="sm_90")
    assert trace.sectors_per_request("load") == load and trace.sectors_per_request("store") == store


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_gluon_transposes_access_widths(arch):
    for name in ("shared", "swizzled", "padded"):
        made = compiled(transpose, name, arch).instructions
        assert made["ld.global.32"] == made["st.global.32"] == made["ld.shared.32"] == 8
    made = compiled(transpose, "vectorised", arch).instructions
    assert made["ld.global.128"] == made["st.global.128"] == made["st.shared.128"] == 8 and made["ld.shared.32"] == 32


def conflicts_by_triton(kind, itemsize, BLOCK_M, BLOCK_N, num_warps=4):
    """(store, load): conflicts a request, as Triton's own count has it. It cannot count padded layouts."""
    from triton._C.libtriton import gluon_ir, ir

    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    module = builder.create_module()
    module.context = context
    module.set_attr("ttg.target", builder.get_string_attr("cuda:80"))
    for key, value in (("num-warps", num_warps), ("num-ctas", 1), ("threads-per-warp", 32)):
        module.set_attr(f"ttg.{key}", builder.get_int32_attr(value))
    function = builder.get_or_insert_function(module, "f", builder.get_function_ty([], []), "public", False)
    module.push_back(function)
    builder.set_insertion_point_to_start(function.add_entry_block())
    x_layout, y_layout, tile = transpose.layouts(kind, itemsize, BLOCK_M, BLOCK_N, num_warps).values()
    transposed = dataclasses.replace(tile, order=tile.order[::-1])
    return tuple(
        builder.get_shared_bank_conflicts(lanes._to_ir(builder), shared._to_ir(builder), shape, 8 * itemsize)
        for lanes, shared, shape in ((x_layout, tile, [BLOCK_M, BLOCK_N]), (y_layout, transposed, [BLOCK_N, BLOCK_M]))
    )


@pytest.mark.parametrize("BLOCK_M_BLOCK_N", [(32, 32), (64, 64), (32, 64), (128, 64)])
def test_bank_conflicts_by_tritons_count(BLOCK_M_BLOCK_N):
    for itemsize in (2, 4):
        half_a_row_of_banks = itemsize == 2 and BLOCK_M_BLOCK_N[1] == 32
        assert conflicts_by_triton("shared", itemsize, *BLOCK_M_BLOCK_N) == (0, 15 if half_a_row_of_banks else 31)
        for kind in ("swizzled", "vectorised"):
            assert conflicts_by_triton(kind, itemsize, *BLOCK_M_BLOCK_N) == (0, 0)


@pytest.mark.parametrize(("name", "turns"), [("shared", 32), ("swizzled", 1), ("padded", 1), ("vectorised", 1)])
def test_bank_conflicts_of_the_compiled_code(name, turns):
    """All layouts, counted bank by bank over the lanes' addresses: turns for each that would do."""
    from fastkit.lab.bank_conflicts import shared_accesses

    for dtype in (torch.float32, torch.float16):
        made = compiled(transpose, name, "sm_80", *tensors(transpose, dtype))
        degrees = {access.kind: access.degree for access in shared_accesses(made, lambda place: (0, ""))}
        turns_here = turns // 2 if dtype == torch.float16 and name == "shared" else turns
        assert degrees == {"store": 1, "load": turns_here}


def test_persistent_softmax_loads_ahead():
    assert compiled(softmax, "fused", "sm_90").instructions["cp.async.128"] == 0
    made = compiled(softmax, "persistent", "sm_90").instructions
    assert made["cp.async.128"] > 0 and made["ld.global.128"] == 0 and made["st.global.128"] > 0


MATRIX = {"HMMA", "WGMMA", "TCGEN05"}


def test_matmuls_differ_in_what_multiplies_and_what_loads():
    made = {rung.name: compiled(matmul, rung.name, "sm_90").instructions for rung in matmul.RUNGS}
    assert {name for name, instructions in made.items() if MATRIX & set(instructions)} == set(list(made)[3:])
    assert made["naive"]["ld.global.16"] == 2 and not any("shared" in key for key in made["naive"])
    assert made["tiled"] == made["grouped"]  # they differ in the order of the programs alone
    assert made["tensor_cores"]["ld.global.128"] and not made["tensor_cores"]["cp.async.128"]
    assert made["pipelined"]["cp.async.128"] and not made["pipelined"]["TMA load"]
    assert made["persistent"]["TMA load"] and not any(key.startswith(("ld.g", "cp.")) for key in made["persistent"])
    older = {name: compiled(matmul, name, "sm_80").instructions for name in list(made)[:5]}
    assert {name for name, instructions in older.items() if "HMMA" in instructions} == {"tensor_cores", "pipelined"}


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
def test_persistent_matmul_takes_every_layout_as_it_lies(layout, halves):
    a, b, c = tensors(matmul)
    a, b = (x.T if letter == "t" else x for x, letter in zip((a, b), layout, strict=True))
    made = compiled(matmul, "persistent", "sm_90", a, b, c, HALVES=halves, num_stages=3)
    assert made.spilled_bytes == 0 and made.instructions["WGMMA"] and made.instructions["TMA load"]
