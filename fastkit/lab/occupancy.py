"""What one multiprocessor of each architecture holds, and how much of it a kernel fills."""

from dataclasses import dataclass

from fastkit.errors import FastkitError


@dataclass(frozen=True)
class Limits:
    """Limits of a multiprocessor (SM on NVIDIA; compute unit on gfx942, work-group processor on gfx1100).

    Registers are counted as the hardware hands them out: each of `partitions` schedulers owns `registers_partition`
    32-bit registers and gives them to whole warps, in steps of `register_step`.
    """

    warp_size: int
    warps: int  # resident on a multiprocessor
    blocks: int  # likewise
    partitions: int
    registers_partition: int
    register_step: int  # registers a warp
    registers_thread: int  # the most one thread can have; beyond it the compiler spills
    shared_kib_sm: int
    shared_kib: int  # the most one block may take (on NVIDIA by opting in, which Triton does)
    shared_reserved: int  # bytes that the system takes of each block's allocation
    shared_step: int  # bytes
    fp32_lanes: int  # FP32 FMAs a clock


def _nvidia(warps, blocks, shared_kib_sm, fp32_lanes, reserved=1024, step=128) -> Limits:
    return Limits(
        warp_size=32,
        warps=warps,
        blocks=blocks,
        partitions=4,
        registers_partition=16384,
        register_step=256,
        registers_thread=255,
        shared_kib_sm=shared_kib_sm,
        shared_kib=shared_kib_sm - reserved // 1024,
        shared_reserved=reserved,
        shared_step=step,
        fp32_lanes=fp32_lanes,
    )


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; steps: cuda_occupancy.h.
# AMD: LLVM's AMDGPUBaseInfo.cpp (VGPRs and their granules, waves, work-groups); the CDNA 3 and RDNA 3 white papers.
LIMITS = {
    "sm_75": _nvidia(32, 16, 64, 64, reserved=0, step=256),
    "sm_80": _nvidia(64, 32, 164, 64),
    "sm_86": _nvidia(48, 16, 100, 128),
    "sm_89": _nvidia(48, 24, 100, 128),
    "sm_90": _nvidia(64, 32, 228, 128),
    "sm_100": _nvidia(64, 32, 228, 128),
    "sm_120": _nvidia(48, 24, 100, 128),
    "gfx942": Limits(64, 32, 16, 4, 512 * 64, 8 * 64, 512, 64, 64, 0, 512, 128),
    "gfx1100": Limits(32, 64, 32, 4, 1536 * 32, 24 * 32, 256, 128, 64, 0, 512, 256),
}


def limits(arch: str) -> Limits:
    """The limits of an architecture such as "sm_89". Raises FastkitError for one that is not in LIMITS."""
    if arch not in LIMITS:
        raise FastkitError(f"no limits known for architecture {arch!r}: use one of {', '.join(LIMITS)}")
    return LIMITS[arch]


def occupancy(arch: str, registers: int, shared_bytes: int, num_warps: int) -> tuple[float, str]:
    """Resident warps as a fraction of the most that a multiprocessor holds, and what stops there being more.

    Arguments and errors are those of `resident_blocks`.
    """
    blocks, limiter = resident_blocks(arch, registers, shared_bytes, num_warps)
    return blocks * num_warps / limits(arch).warps, limiter


def resident_blocks(arch: str, registers: int, shared_bytes: int, num_warps: int) -> tuple[int, str]:
    """How many blocks of a kernel a multiprocessor holds, by the rules of NVIDIA's occupancy calculator, and what
    limits them: "warps", "blocks", "registers" or "shared memory". 0 blocks: the launch fails for that limit.

    registers     32-bit registers a thread (VGPRs on AMD), as the compiler reports them
    shared_bytes  shared memory of one block
    num_warps     warps of one block, of the architecture's warp size

    Raises FastkitError for an unknown architecture, ValueError for numbers that no kernel has.
    """
    limit = limits(arch)
    if not (registers >= 0 and shared_bytes >= 0 and num_warps >= 1):
        raise ValueError(f"resident_blocks: registers {registers}, shared_bytes {shared_bytes}, num_warps {num_warps}")
    registers_warp = _round_up(registers * limit.warp_size, limit.register_step)
    warps_by_registers = (
        limit.registers_partition // registers_warp * limit.partitions if registers_warp else limit.warps
    )
    # A launch is checked as though every partition got as many warps as the fullest
    fits = registers_warp * _round_up(num_warps, limit.partitions) <= limit.registers_partition * limit.partitions
    if registers > limit.registers_thread or not fits:
        warps_by_registers = 0
    shared = _round_up(shared_bytes + limit.shared_reserved, limit.shared_step)
    by_shared = limit.shared_kib_sm * 1024 // shared if shared else limit.warps
    if shared_bytes > limit.shared_kib * 1024:
        by_shared = 0
    most = {
        "warps": limit.warps // num_warps if num_warps * limit.warp_size <= 1024 else 0,
        # AMD counts barriers, of which a block of one warp needs none
        "blocks": limit.warps if arch.startswith("gfx") and num_warps == 1 else limit.blocks,
        "registers": warps_by_registers // num_warps,
        "shared memory": by_shared,
    }
    limiter = min(most, key=most.get)  # the first of equals
    return most[limiter], limiter


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
