"""The roofline's arithmetic, and that it says so where it does not know."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastkit.errors import FastkitError
from fastkit.kernels import rms_norm, swiglu
from fastkit.kernels.common import Cost
from fastkit.kernels.ladders import matmul, softmax
from fastkit.lab.cards import KNOWN, Card
from fastkit.lab.measure import Measured, measure
from fastkit.lab.results import recorded
from fastkit.lab.roofline import COPY_FRACTION, MATRIX_FRACTION, predict, rates, roofline

H100 = KNOWN["H100 SXM"]
HERE = Measured(H100, copy_gbps=3000, matrix_tflops={"bfloat16": 700}, empty_us=2, launch_us=8)
SHAPE = {"M": 8192, "N": 4096}


def test_memory_bound():
    forward, backward = roofline(rms_norm, SHAPE, "NVIDIA H100 80GB HBM3")
    moved = rms_norm.cost(**SHAPE)[0].bytes_moved
    assert forward.memory_ms == pytest.approx(moved / (0.9 * 3352e9) * 1e3)
    assert forward.time_ms == forward.memory_ms < backward.time_ms and forward.limit == backward.limit == "memory"
    assert forward.card == "H100 SXM" and forward.basis == "0.90 of the peak bandwidth"
    assert forward.launch_ms is None  # that host is not here


def test_tensor_cores_where_the_file_calls_tl_dot():
    shape = {"M": 8192, "N": 8192, "K": 8192}
    found = roofline(matmul, shape, "H100")
    assert found.limit == "tensor cores" and found.compute_ms == pytest.approx(2 * 8192**3 / (0.72 * 989.4e12) * 1e3)
    plain = roofline(matmul, shape, "H100", tensor=False)
    assert plain.limit == "arithmetic" and plain.compute_ms == pytest.approx(2 * 8192**3 / 66.9e12 * 1e3)
    assert roofline(softmax, SHAPE, "H100").limit == "memory"
    assert roofline(matmul, shape, "H100", torch.float32).compute_ms == pytest.approx(2 * found.compute_ms, rel=1e-3)


def test_this_machine_as_measured():
    found = roofline(Cost(3_000_000_000, 1), card=HERE)
    assert found.memory_ms == pytest.approx(1) and found.launch_ms == 0.002
    assert found.time_ms == pytest.approx(1.002) and found.basis == "measured"
    assert roofline(Cost(7, 7), card=HERE).limit == "launch"
    assert roofline(Cost(0, 10**15), card=HERE, tensor=True).compute_ms == pytest.approx(1e6 / 700)


def test_measured_beside_the_peaks():
    rows = {row["what"]: row for row in HERE.rows()}
    assert rows["copy, GB/s"] == {"what": "copy, GB/s", "measured": 3000, "peak": 3352, "of_peak": 3000 / 3352}
    assert rows["matmul bfloat16, TFLOP/s"]["of_peak"] == 700 / 989.4
    assert rows["an empty kernel, us"]["measured"] == 2 and rows["an empty kernel, us"]["peak"] is None
    bare = Card("Some card", "sm_89", 24, 8, None, None, None, None, {}, None, "the driver")
    assert {row["of_peak"] for row in Measured(bare, 200, {"float16": 50}, 3, 9).rows()} == {None}


@given(bytes_moved=st.integers(1, 10**13), flops=st.integers(0, 10**17), tensor=st.booleans())
def test_one_of_the_three_is_the_limit(bytes_moved, flops, tensor):
    reached = rates(HERE, torch.bfloat16, tensor)
    found = predict(Cost(bytes_moved, flops), reached)
    parts = {"memory": found.memory_ms, reached.unit: found.compute_ms, "launch": found.launch_ms}
    assert parts[found.limit] == max(parts.values())
    assert found.time_ms == pytest.approx(found.launch_ms + max(found.memory_ms, found.compute_ms))
    attained = flops / max(found.memory_ms, found.compute_ms) / 1e9
    assert attained == pytest.approx(reached.attainable_tflops(found.intensity))
    if found.limit != "launch":
        assert (found.limit == "memory") == (found.intensity <= reached.ridge)


def test_fractions_are_those_of_the_h100():
    assert pytest.approx(3020 / H100.bandwidth_gbps, abs=0.005) == COPY_FRACTION
    assert pytest.approx(715 / H100.tensor_tflops["bfloat16"], abs=0.005) == MATRIX_FRACTION


@pytest.mark.parametrize(
    ("name", "best"),
    [("02_add", "grid"), ("02_add_norm", "fused"), ("03_copy", "vectorised"), ("03_weight_update", "soa")],
)
def test_a_memory_bound_kernel_took_what_was_foreseen(name, best):
    """Within 15%, of tensors beyond 64 MiB, at the speed of a copy that the same run measured."""
    rows = {row["who"]: row for row in recorded(name)["rows"]}
    foreseen_ms = rows[best].get("predicted_ms") or rows[best]["floor_ms"]
    assert rows[best]["limit"] == "memory" and rows[best]["median_ms"] == pytest.approx(foreseen_ms, rel=0.15)


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_card_predicts(name):
    dtype = torch.float16
    forward, _ = roofline(swiglu, {"M": 8192, "N": 14336}, name, dtype)
    assert forward.limit == "memory" and forward.time_ms > 0
    assert roofline(matmul, {"M": 8192, "N": 8192, "K": 8192}, name, dtype).limit == "tensor cores"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: roofline(swiglu, SHAPE, "RTX 4060 Laptop GPU"),
            "no card 'RTX 4060 Laptop GPU' in the table; near it: RTX 4060",
        ),
        (lambda: roofline(matmul, {"M": 1, "N": 1, "K": 1}, "T4"), "T4 has no tensor-core rate for bfloat16: there is"),
        (lambda: roofline(matmul, SHAPE, "H100"), r"do not fit .*matmul\.cost\(M, N, K, dtype\): missing"),
        (lambda: roofline(torch, SHAPE, "H100"), "'torch' declares no cost"),
        (lambda: roofline(Cost(1, 1), SHAPE, "H100"), "a Cost has its shapes in it"),
    ],
)
def test_errors(call, message):
    with pytest.raises(FastkitError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_an_unknown_figure_is_never_a_number():
    bare = Card("Some card", "sm_89", 24, 8, None, None, None, None, {}, None, "the driver")
    with pytest.raises(FastkitError, match="bandwidth of Some card is unknown"):
        roofline(Cost(1, 1), card=bare)
    measured = Measured(bare, 200, {}, 3, 9)
    with pytest.raises(FastkitError, match="FP32 rate of Some card is unknown"):
        roofline(Cost(1, 1), card=measured)
    with pytest.raises(FastkitError, match="no tensor-core rate for bfloat16: there is none known"):
        roofline(Cost(1, 1), card=measured, tensor=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_and_no_card_named():
    with pytest.raises(FastkitError, match="measuring needs a GPU: name a card"):
        roofline(swiglu, SHAPE)


@pytest.mark.gpu
def test_measured_speeds_are_possible():
    found = measure()
    assert found is measure()  # once a process
    peak = found.card.bandwidth_gbps
    assert found.copy_gbps > 0 and (peak is None or found.copy_gbps <= peak)
    assert found.empty_us > 0 and found.launch_us > 0
    assert "float16" in found.matrix_tflops
    for dtype, tflops in found.matrix_tflops.items():
        assert 0 < tflops < 1.05 * found.card.tensor_tflops.get(dtype, float("inf"))
    forward, backward = roofline(swiglu, {"M": 8192, "N": 14336})
    assert forward.basis == "measured" and forward.limit == backward.limit == "memory"
