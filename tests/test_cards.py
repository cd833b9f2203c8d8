"""The table of cards: that its figures hang together, and that a name never means another card."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from fastkit.errors import FastkitError
from fastkit.lab import cards
from fastkit.lab.cards import KNOWN, find, present
from fastkit.lab.device import card as device_card

# FLOPs a clock and multiprocessor in FP16 with FP32 accumulation, by the architecture papers; GeForce has half
MATRIX_FLOPS = {"sm_75": 1024, "sm_80": 2048, "sm_86": 1024, "sm_89": 1024, "sm_90": 4096, "sm_120": 1024}
MATRIX_FLOPS |= {"gfx942": 2048, "gfx1100": 1024}


@pytest.mark.parametrize("card", KNOWN.values(), ids=KNOWN)
def test_figures_hang_together(card):
    limit = card.limits
    assert limit is not None
    fp32 = 2 * limit.fp32_lanes * card.sms * card.clock_mhz / 1e6
    assert card.fp32_tflops == pytest.approx(fp32, rel=0.01)
    geforce = card.name.startswith("RTX")
    matrix = MATRIX_FLOPS[card.arch] / (2 if geforce else 1) * card.sms * card.clock_mhz / 1e6
    # Hopper's matrix peaks are for a lower clock than its highest: 1,830 MHz (SXM), 1,620 MHz (PCIe)
    lower = 0.91 if card.arch == "sm_90" else 0.98
    assert lower * matrix <= card.tensor_tflops["float16"] <= 1.01 * matrix
    assert card.tensor_tflops.get("bfloat16", card.tensor_tflops["float16"]) == card.tensor_tflops["float16"]
    assert ("bfloat16" in card.tensor_tflops) == (card.arch != "sm_75")
    for dtype, times in (("tf32", 0.5), ("float8", 2)):
        if dtype in card.tensor_tflops:
            assert card.tensor_tflops[dtype] == pytest.approx(times * card.tensor_tflops["float16"], rel=0.02)
    if card.arch in ("sm_75", "sm_80", "sm_86"):
        assert "float8" not in card.tensor_tflops
    assert card.source.startswith("https://")
    assert card.l2_mib is None or 0 < card.l2_mib <= 128
    assert 5 < card.memory_gib < 200 and 200 < card.bandwidth_gbps < 6000


@pytest.mark.parametrize(
    "line",
    [
        ("RTX 3060", "RTX 3070", "RTX 3080", "RTX 3090"),
        ("RTX 4060", "RTX 4070", "RTX 4080", "RTX 4090"),
        ("RTX 5070", "RTX 5070 Ti", "RTX 5080", "RTX 5090"),
        ("A100 SXM4 80GB", "H100 SXM"),
    ],
)
def test_better_cards_are_better(line):
    for worse, better in itertools.pairwise(line):
        for figure in ("sms", "bandwidth_gbps", "fp32_tflops", "power_w", "l2_mib"):
            assert getattr(KNOWN[worse], figure) <= getattr(KNOWN[better], figure), (worse, better, figure)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM4 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA GeForce RTX 4060", "RTX 4060"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
        ("nvidia geforce rtx 5090", "RTX 5090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
        *((name, name) for name in KNOWN),
    ],
)
def test_find(said, meant):
    assert find(said).name == meant


@pytest.mark.parametrize(
    "other",
    [
        "NVIDIA GeForce RTX 4060 Laptop GPU",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA H100 NVL",
        "NVIDIA GeForce RTX 3090 Ti",
    ],
)
def test_a_namesake_is_another_card(other):
    with pytest.raises(FastkitError, match=f"no card '{other}' in the table; near it: .") as caught:
        find(other)
    assert "\n" not in str(caught.value)


def test_an_unlike_name_lists_all():
    with pytest.raises(FastkitError, match=r"known: T4, .*MI300X"):
        find("9")


def properties(**other):
    found = dict(
        name="NVIDIA GeForce RTX 4060 Laptop GPU",
        major=8,
        minor=9,
        multi_processor_count=24,
        total_memory=8 * 2**30,
        L2_cache_size=32 * 2**20,
        clock_rate=2_370_000,
        memory_clock_rate=8_001_000,
        memory_bus_width=128,
        gcnArchName="",
    )
    return SimpleNamespace(**found | other)


@pytest.fixture
def pretend(monkeypatch):
    """Make torch tell of a card with these properties."""

    def gpu(**other):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties(**other))

    return gpu


def test_an_unknown_card_is_what_its_driver_says(pretend):
    pretend()
    card = present()
    assert card.name.endswith("Laptop GPU") and card.arch == "sm_89" and card.sms == 24 and card.source == "the driver"
    assert card.bandwidth_gbps == pytest.approx(256, rel=1e-3) and card.l2_mib == 32
    assert card.fp32_tflops == pytest.approx(14.56, rel=1e-3)
    assert card.tensor_tflops == {} and card.power_w is None


def test_a_known_name_with_other_hardware_is_what_its_driver_says(pretend):
    desktop = dict(name="NVIDIA GeForce RTX 3060", major=8, minor=6, multi_processor_count=28)
    pretend(**desktop, total_memory=int(11.8 * 2**30))
    assert present() is KNOWN["RTX 3060"]
    pretend(**desktop, total_memory=8 * 2**30)  # there is one of 8 GiB with two thirds of the bandwidth
    assert present().source == "the driver"


def test_what_the_driver_does_not_tell_is_unknown(pretend):
    pretend(major=7, minor=0, clock_rate=0, memory_clock_rate=0, memory_bus_width=0, L2_cache_size=0)
    card = present()
    assert card.arch == "sm_70" and card.limits is None
    assert card.bandwidth_gbps is card.fp32_tflops is card.l2_mib is card.clock_mhz is None


def test_amd_is_named_as_triton_does(pretend):
    pretend(name="AMD Instinct MI300A", gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=228)
    assert present().arch == "gfx942" and device_card("cuda:0")["arch"] == "gfx942"


def test_device_card_has_what_a_record_needs(pretend):
    pretend()
    found = device_card("cuda:0")
    assert found["l2_mib"] == 32 and found["shared_kib"] == 99 and found["sms"] == 24


def test_no_card_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FastkitError, match="no GPU here: name a card"):
        present()


@pytest.mark.gpu
def test_the_driver_agrees_with_the_table():
    said = cards._reported(torch.cuda.get_device_properties(None))
    card = present()
    assert card.arch == said.arch and card.sms == said.sms
    if said.bandwidth_gbps and card.bandwidth_gbps:
        assert card.bandwidth_gbps == pytest.approx(said.bandwidth_gbps, rel=0.03)
    if card.l2_mib and card.arch.startswith("sm_"):  # AMD's driver tells the cache of one of its dies
        assert card.l2_mib == pytest.approx(said.l2_mib, rel=0.05)
