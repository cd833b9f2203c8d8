"""Occupancy against NVIDIA's own calculator: the blocks below are what its cuda_occupancy.h (CUDA 13.0) returns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkit.errors import FastkitError
from fastkit.lab.occupancy import LIMITS, limits, occupancy, resident_blocks

NVIDIA = [arch for arch in LIMITS if arch.startswith("sm_")]


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "num_warps", "blocks", "limiter"),
    [
        ("sm_75", 32, 0, 4, 8, "warps"),
        ("sm_75", 24, 0, 1, 16, "blocks"),
        ("sm_75", 33, 16384, 4, 4, "shared memory"),
        ("sm_75", 64, 65536, 4, 1, "shared memory"),
        ("sm_75", 96, 0, 32, 0, "registers"),
        ("sm_80", 64, 0, 8, 4, "registers"),
        ("sm_80", 40, 49152, 8, 3, "shared memory"),
        ("sm_80", 128, 166912, 8, 1, "shared memory"),
        ("sm_86", 24, 0, 1, 16, "blocks"),
        ("sm_86", 56, 33792, 12, 2, "shared memory"),
        ("sm_89", 24, 0, 1, 24, "blocks"),
        ("sm_89", 128, 0, 4, 4, "registers"),
        ("sm_89", 33, 16384, 4, 5, "shared memory"),
        ("sm_89", 128, 101376, 4, 1, "shared memory"),
        ("sm_89", 128, 101377, 4, 0, "shared memory"),
        ("sm_90", 32, 0, 3, 21, "warps"),
        ("sm_90", 33, 16384, 4, 12, "registers"),
        ("sm_90", 40, 49152, 8, 4, "shared memory"),
        ("sm_90", 90, 114688, 4, 2, "shared memory"),
        ("sm_90", 168, 232448, 8, 1, "registers"),
        ("sm_90", 168, 232449, 8, 0, "shared memory"),
        ("sm_90", 255, 0, 8, 1, "registers"),
        ("sm_90", 65, 0, 32, 0, "registers"),
        ("sm_100", 168, 65536, 8, 1, "registers"),
        ("sm_120", 24, 0, 1, 24, "blocks"),
        ("sm_120", 40, 49152, 8, 2, "shared memory"),
        # By LLVM's AMDGPUBaseInfo.cpp: 512 VGPRs a SIMD and lane in steps of 8, 8 waves; 1536 in steps of 24, 16 waves
        ("gfx942", 64, 0, 4, 8, "warps"),
        ("gfx942", 100, 0, 4, 4, "registers"),
        ("gfx942", 32, 0, 1, 32, "warps"),
        ("gfx942", 32, 40000, 4, 1, "shared memory"),
        ("gfx1100", 97, 0, 4, 12, "registers"),
        ("gfx1100", 96, 0, 4, 16, "warps"),
    ],
)
def test_known_values(arch, registers, shared_bytes, num_warps, blocks, limiter):
    assert resident_blocks(arch, registers, shared_bytes, num_warps) == (blocks, limiter)
    fraction, same = occupancy(arch, registers, shared_bytes, num_warps)
    assert fraction == blocks * num_warps / LIMITS[arch].warps and same == limiter


@given(
    arch=st.sampled_from(list(LIMITS)),
    registers=st.integers(0, 260),
    shared_bytes=st.integers(0, 300_000),
    num_warps=st.integers(1, 40),
)
def test_what_is_resident_fits_and_one_block_more_would_not(arch, registers, shared_bytes, num_warps):
    limit = LIMITS[arch]
    blocks, _ = resident_blocks(arch, registers, shared_bytes, num_warps)

    def fits(blocks):
        launches = registers <= limit.registers_thread and shared_bytes <= limit.shared_kib * 1024
        return (
            launches
            and num_warps * limit.warp_size <= 1024
            and blocks * num_warps <= limit.warps
            and blocks * num_warps * registers * limit.warp_size <= limit.partitions * limit.registers_partition
            and blocks * (shared_bytes + limit.shared_reserved) <= limit.shared_kib_sm * 1024
        )

    assert blocks == 0 or fits(blocks)
    for fewer in ((registers // 2, shared_bytes), (registers, shared_bytes // 2)):
        assert resident_blocks(arch, *fewer, num_warps)[0] >= blocks


def test_limits_hang_together():
    for arch, limit in LIMITS.items():
        assert limit.shared_kib <= limit.shared_kib_sm, arch
        assert limit.warps % limit.partitions == 0, arch
        assert limit.registers_partition % limit.register_step == 0, arch
    for arch in NVIDIA:
        assert LIMITS[arch].partitions * LIMITS[arch].registers_partition == 65536
    assert [LIMITS[arch].shared_kib for arch in NVIDIA] == [64, 163, 99, 99, 227, 227, 99]


def test_errors():
    with pytest.raises(FastkitError, match="'sm_70': use one of sm_75, "):
        limits("sm_70")
    with pytest.raises(ValueError, match="num_warps 0"):
        occupancy("sm_90", 32, 0, 0)
