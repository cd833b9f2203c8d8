"""Cards: what each can do at most, by its maker's documents, for predictions also where no card is present.

A peak is a bound, not a speed: `fastkit.lab.roofline` says which fraction of it kernels reach, `fastkit.lab.measure`
measures the card that is here.
"""

import difflib
import re
from dataclasses import dataclass

from fastkit.errors import FastkitError
from fastkit.lab.device import architecture
from fastkit.lab.occupancy import LIMITS, Limits

TURING = "https://images.nvidia.com/aem-dam/en-zz/Solutions/design-visualization/technologies/turing-architecture/NVIDIA-Turing-Architecture-Whitepaper.pdf"
T4_SHEET = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf"
GA100 = "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"
A100_SHEET = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf"
GA102 = "https://images.nvidia.com/aem-dam/en-zz/Solutions/geforce/ampere/pdf/NVIDIA-ampere-GA102-GPU-Architecture-Whitepaper-V1.pdf"
RTX_3060 = "https://www.nvidia.com/en-us/geforce/graphics-cards/30-series/rtx-3060-3060ti/"
A10_SHEET = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf"
ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
RTX_4060 = "https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/rtx-4060-4060ti/"
RTX_4070 = "https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/rtx-4070-family/"
H100 = "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"
H200_SHEET = "https://www.nvidia.com/en-us/data-center/h200/"
BLACKWELL = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
MI300X_SHEET = (
    "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf"
)
RX_7900 = "https://www.amd.com/en/products/graphics/desktops/radeon/7000-series/amd-radeon-rx-7900xtx.html"


@dataclass(frozen=True)
class Card:
    """One card. None stands for what its maker does not publish.

    bandwidth_gbps   peak of its memory, 1e9 bytes/s
    l2_mib           L2 cache
    clock_mhz        boost
    fp32_tflops      peak of the plain arithmetic units at that clock, an FMA counting as two
    tensor_tflops    dense peaks of the matrix units with FP32 accumulation, by "float16", "bfloat16", "tf32", "float8".
                     GeForce cards have half the rate there that they have with FP16 accumulation.
    power_w          board power
    source           where the figures come from
    """

    name: str
    arch: str
    sms: int
    memory_gib: float
    bandwidth_gbps: float | None
    l2_mib: float | None
    clock_mhz: int | None
    fp32_tflops: float | None
    tensor_tflops: dict[str, float]
    power_w: int | None
    source: str

    @property
    def limits(self) -> Limits | None:
        """What one multiprocessor holds: shared memory, registers, warps, blocks."""
        return LIMITS.get(self.arch)


def _tensor(float16: float, tf32: float | None = None, float8: float | None = None, bf16: bool = True) -> dict:
    found = {"float16": float16, "bfloat16": float16 if bf16 else None, "tf32": tf32, "float8": float8}
    return {dtype: peak for dtype, peak in found.items() if peak is not None}


def _geforce_ampere(float16: float) -> dict:
    return _tensor(float16, tf32=float16 / 2)


def _geforce_ada(float16: float) -> dict:  # GeForce 50 has the same ratios
    return _tensor(float16, tf32=float16 / 2, float8=2 * float16)


_CARDS = [
    # name, arch, SMs, GiB, GB/s, L2 MiB, boost MHz, FP32 TFLOP/s, matrix TFLOP/s, W
    Card("T4", "sm_75", 40, 16, 320, 4, 1590, 8.1, _tensor(65, bf16=False), 70, T4_SHEET),
    Card("RTX 2080 Ti", "sm_75", 68, 11, 616, 5.5, 1545, 13.4, _tensor(53.8, bf16=False), 250, TURING),
    Card("RTX 3060", "sm_86", 28, 12, 360, 3, 1777, 12.7, _geforce_ampere(25.5), 170, RTX_3060),
    Card("RTX 3070", "sm_86", 46, 8, 448, 4, 1725, 20.3, _geforce_ampere(40.6), 220, GA102),
    Card("RTX 3080", "sm_86", 68, 10, 760, 5, 1710, 29.8, _geforce_ampere(59.5), 320, GA102),
    Card("RTX 3090", "sm_86", 82, 24, 936, 6, 1695, 35.6, _geforce_ampere(71), 350, GA102),
    Card("RTX 4060", "sm_89", 24, 8, 272, 24, 2460, 15.1, _geforce_ada(30.2), 115, RTX_4060),
    Card("RTX 4060 Ti", "sm_89", 34, 8, 288, 32, 2535, 22.1, _geforce_ada(44.1), 160, RTX_4060),
    Card("RTX 4070", "sm_89", 46, 12, 504, 36, 2475, 29.1, _geforce_ada(58.3), 200, RTX_4070),
    Card("RTX 4070 Ti", "sm_89", 60, 12, 504, 48, 2610, 40.1, _geforce_ada(80.2), 285, ADA),
    Card("RTX 4080", "sm_89", 76, 16, 716.8, 64, 2505, 48.7, _geforce_ada(97.5), 320, ADA),
    Card("RTX 4090", "sm_89", 128, 24, 1008, 72, 2520, 82.6, _geforce_ada(165.2), 450, ADA),
    Card("RTX 5070", "sm_120", 48, 12, 672, 48, 2512, 30.9, _geforce_ada(61.7), 250, BLACKWELL),
    Card("RTX 5070 Ti", "sm_120", 70, 16, 896, 48, 2452, 43.9, _geforce_ada(87.9), 300, BLACKWELL),
    Card("RTX 5080", "sm_120", 84, 16, 960, 64, 2617, 56.3, _geforce_ada(112.6), 360, BLACKWELL),
    Card("RTX 5090", "sm_120", 170, 32, 1792, 96, 2407, 104.8, _geforce_ada(209.5), 575, BLACKWELL),
    Card("A10", "sm_86", 72, 24, 600, 6, 1695, 31.2, _tensor(125, 62.5), 150, A10_SHEET),
    Card("L4", "sm_89", 58, 24, 300, 48, 2040, 30.3, _tensor(121, 60, 242), 72, ADA),
    Card("L40S", "sm_89", 142, 48, 864, 96, 2520, 91.6, _tensor(362, 183, 733), 350, ADA),
    Card("A100 SXM4 40GB", "sm_80", 108, 40, 1555, 40, 1410, 19.5, _tensor(312, 156), 400, GA100),
    Card("A100 PCIe 40GB", "sm_80", 108, 40, 1555, 40, 1410, 19.5, _tensor(312, 156), 250, A100_SHEET),
    Card("A100 SXM4 80GB", "sm_80", 108, 80, 2039, 40, 1410, 19.5, _tensor(312, 156), 400, A100_SHEET),
    Card("A100 PCIe 80GB", "sm_80", 108, 80, 1935, 40, 1410, 19.5, _tensor(312, 156), 300, A100_SHEET),
    Card("H100 SXM", "sm_90", 132, 80, 3352, 50, 1980, 66.9, _tensor(989.4, 494.7, 1978.9), 700, H100),
    Card("H100 PCIe", "sm_90", 114, 80, 2000, 50, 1755, 51.2, _tensor(756, 378, 1513), 350, H100),
    Card("H200", "sm_90", 132, 141, 4800, None, 1980, 66.9, _tensor(989.4, 494.7, 1978.9), 700, H200_SHEET),
    Card("MI300X", "gfx942", 304, 192, 5325, 32, 2100, 163.4, _tensor(1307.4, 653.7, 2614.9), 750, MI300X_SHEET),
    Card("RX 7900 XTX", "gfx1100", 48, 24, 960, 6, 2498, 61.4, _tensor(122.8), 355, RX_7900),  # 48 WGPs of 2 CUs
]
KNOWN = {card.name: card for card in _CARDS}

# What drivers call them, and short forms, where that is not the name with "NVIDIA", "Tesla", "GeForce", "AMD" before it
_DRIVER_NAMES = {
    "A100-SXM4-40GB": "A100 SXM4 40GB",
    "A100-SXM4-80GB": "A100 SXM4 80GB",
    "A100-PCIE-40GB": "A100 PCIe 40GB",
    "A100 80GB PCIe": "A100 PCIe 80GB",
    "H100 80GB HBM3": "H100 SXM",
    "H100": "H100 SXM",
    "A100": "A100 SXM4 80GB",
}
_MAKERS = re.compile(r"\b(NVIDIA|Tesla|GeForce|AMD|Instinct|Radeon|ATI)\b", re.IGNORECASE)


def find(name: str) -> Card:
    """The known card of that name: one of KNOWN, or what a driver reports ("NVIDIA GeForce RTX 4090", "Tesla T4").

    A name must match as a whole, so a "Laptop GPU", a "SUPER" or an "A10G" is never taken for its namesake. Raises
    FastkitError that lists near names.
    """
    wanted = _plain(name)
    names = {_plain(known): known for known in KNOWN} | {_plain(says): known for says, known in _DRIVER_NAMES.items()}
    if wanted in names:
        return KNOWN[names[wanted]]
    near = [names[match] for match in difflib.get_close_matches(wanted, names, n=4, cutoff=0.5)]
    listed = f"near it: {', '.join(dict.fromkeys(near))}" if near else f"known: {', '.join(KNOWN)}"
    raise FastkitError(f"no card {name!r} in the table; {listed}")


def _plain(name: str) -> str:
    return " ".join(_MAKERS.sub(" ", name).split()).lower()


def present(device=None) -> Card:
    """The card that is here, with the peaks of the table if it is known (same name, SMs and memory).

    Of another one, what its driver says: bandwidth from memory clock and bus width, FP32 peak from SMs and boost clock.
    The peaks of its matrix units are then unknown (an empty dict). Raises FastkitError without a GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise FastkitError("no GPU here: name a card of the table, such as 'RTX 4090' (fastkit.lab.cards.KNOWN)")
    properties = torch.cuda.get_device_properties(device)
    memory_gib = properties.total_memory / 2**30
    try:
        known = find(properties.name)
    except FastkitError:
        known = None
    if known and known.sms == properties.multi_processor_count and 0.88 < memory_gib / known.memory_gib < 1.1:
        return known
    return _reported(properties)


def _reported(properties) -> Card:
    """A card as torch's device properties describe it."""
    arch = architecture(properties)
    limit = LIMITS.get(arch)
    clock_khz, memory_khz, bus_bits = (
        getattr(properties, name, 0) for name in ("clock_rate", "memory_clock_rate", "memory_bus_width")
    )
    fp32 = 2 * limit.fp32_lanes * properties.multi_processor_count * clock_khz / 1e9 if limit and clock_khz else None
    return Card(
        name=properties.name,
        arch=arch,
        sms=properties.multi_processor_count,
        memory_gib=round(properties.total_memory / 2**30, 1),
        # two transfers a clock, as CUDA's deviceQuery counts it
        bandwidth_gbps=2 * memory_khz * bus_bits / 8 / 1e6 or None,
        l2_mib=properties.L2_cache_size / 2**20 or None,
        clock_mhz=clock_khz // 1000 or None,
        fp32_tflops=fp32,
        tensor_tflops={},
        power_w=None,
        source="the driver",
    )
