"""The monitor: what it makes of NVML's answers, and that it says so where there is no GPU."""

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastkit.lab.monitor import Monitor


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu():
    with Monitor() as monitor:
        pass
    assert monitor.samples == [] and monitor.throttled == [] and monitor.summary() == {}
    assert monitor.reason == "no NVIDIA GPU here" and str(monitor) == "not watched: no NVIDIA GPU here"


@pytest.fixture
def nvml(monkeypatch):
    """An NVML whose answers the test chooses; an answer that is an exception is raised."""
    module = ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0
    module.answers = {"clock": 1980, "power": 350_000, "temperature": 60, "reasons": 0, "old": 0, "handle": "handle"}
    module.asked, module.open = [], 0

    def answer(name):
        def ask(*arguments):
            module.asked.append((name, arguments))
            found = module.answers[name]
            if isinstance(found, Exception):
                raise found
            return found

        return ask

    def count(change):
        return lambda: setattr(module, "open", module.open + change)

    module.nvmlInit, module.nvmlShutdown = count(1), count(-1)
    module.nvmlDeviceGetHandleByUUID = answer("handle")
    module.nvmlDeviceGetClockInfo = answer("clock")
    module.nvmlDeviceGetTemperature = answer("temperature")
    module.nvmlDeviceGetPowerUsage = answer("power")
    module.nvmlDeviceGetCurrentClocksEventReasons = answer("reasons")
    module.nvmlDeviceGetCurrentClocksThrottleReasons = answer("old")
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    found = SimpleNamespace(uuid="01234567-89ab-cdef-0123-456789abcdef")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: found)
    return module


def test_samples(nvml):
    with Monitor(interval_s=0.001) as monitor:
        deadline = time.monotonic() + 5
        while len(monitor.samples) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        nvml.answers |= {"reasons": 0x1 | 0x4 | 0x20, "clock": 1200, "power": 700_000, "temperature": 85}
    assert len(monitor.samples) >= 4 and monitor.reason == "" and nvml.open == 0
    assert [sample["t_s"] for sample in monitor.samples] == sorted(sample["t_s"] for sample in monitor.samples)
    first, last = monitor.samples[0], monitor.samples[-1]
    assert first["sm_mhz"] == first["memory_mhz"] == 1980 and first["reasons"] == []
    assert last["power_w"] == 700 and last["reasons"] == ["idle", "power cap", "thermal (driver)"]
    assert monitor.throttled == ["power cap", "thermal (driver)"]  # an idle card is not held back
    assert monitor.summary()["sm_mhz"][0] == 1200 and monitor.summary()["temperature_c"][2] == 85
    assert str(monitor).endswith("60 to 85 °C, 350 to 700 W; held back by power cap, thermal (driver)")
    assert ("handle", ("GPU-01234567-89ab-cdef-0123-456789abcdef",)) in nvml.asked


def test_what_a_card_does_not_tell_is_none(nvml):
    nvml.answers |= {"power": nvml.NVMLError("Not Supported"), "reasons": nvml.NVMLError(), "old": nvml.NVMLError()}
    with Monitor() as monitor:
        pass
    assert all(sample["power_w"] is sample["reasons"] is None for sample in monitor.samples)
    assert monitor.samples[0]["sm_mhz"] == 1980 and monitor.throttled == [] and "power_w" not in monitor.summary()


def test_an_older_driver_is_asked_by_the_former_name(nvml):
    nvml.answers |= {"reasons": nvml.NVMLError("Function Not Found"), "old": 0x40}
    with Monitor() as monitor:
        pass
    assert monitor.throttled == ["thermal (hardware)"]


def test_nvml_that_refuses_is_a_reason(nvml):
    nvml.answers["handle"] = nvml.NVMLError("Insufficient Permissions")
    with Monitor() as monitor:
        pass
    assert monitor.samples == [] and monitor.reason == "Insufficient Permissions" and nvml.open == 0


@pytest.mark.gpu
def test_on_the_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    with Monitor(interval_s=0.02) as monitor:
        for _ in range(200):
            x @ x
        torch.cuda.synchronize()
    if monitor.reason:
        pytest.skip(f"NVML: {monitor.reason}")
    assert len(monitor.samples) >= 2 and monitor.samples[-1]["t_s"] > 0
    assert monitor.summary()["sm_mhz"][2] > 100 and "°C" in str(monitor)
