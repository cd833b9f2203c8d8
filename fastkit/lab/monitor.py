"""Watch clocks, temperature and power while something runs: whether the card was held back, and by what."""

import contextlib
import statistics
import threading
import time

import torch

# What NVML calls the reasons for a clock below the highest (nvmlClocksEventReasons). Idle and a clock that the user
# asked for hold nothing back.
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal (driver)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}
NO_THROTTLE = {"idle", "application clocks"}


class Monitor:
    """Samples NVML in a thread: `with Monitor() as m: ...`, then m.samples, m.throttled, m.summary().

    samples    dicts of t_s (since the start), sm_mhz, memory_mhz, temperature_c, power_w and reasons (of REASONS); None
               for what this card does not tell
    throttled  the reasons seen that held clocks back, in order of appearance
    reason     why there are no samples: no NVIDIA GPU, NVML missing or refusing; "" if there are

    Watches torch's current device, or `device`. Without a GPU it does nothing and says so in `reason`.
    """

    def __init__(self, interval_s: float = 0.1, device: int | None = None):
        self.interval_s, self.device = interval_s, device
        self.samples, self.reason = [], ""
        self._stop, self._thread = threading.Event(), None

    def __enter__(self):
        self.samples, self.reason = [], ""
        self._stop.clear()
        try:
            self._nvml, self._handle = _open(self.device)
        except Exception as error:  # NVML's errors are made at run time, and a broken library raises what it likes
            self.reason = str(error)
            return self
        self._start = time.perf_counter()
        self._sample()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        if self._thread:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self._sample()
            self._nvml.nvmlShutdown()

    @property
    def throttled(self) -> list[str]:
        seen = (reason for sample in self.samples for reason in sample["reasons"] or ())
        return [reason for reason in dict.fromkeys(seen) if reason not in NO_THROTTLE]

    def summary(self) -> dict[str, tuple[float, float, float]]:
        """(least, median, greatest) of each quantity that was told; empty without samples."""
        found = {}
        for name in ("sm_mhz", "memory_mhz", "temperature_c", "power_w"):
            values = [sample[name] for sample in self.samples if sample[name] is not None]
            if values:
                found[name] = (min(values), statistics.median(values), max(values))
        return found

    def __str__(self) -> str:
        if not self.samples:
            return f"not watched: {self.reason or 'not started'}"
        units = {"sm_mhz": "MHz SM", "memory_mhz": "MHz memory", "temperature_c": "°C", "power_w": "W"}
        told = [f"{low:.0f} to {high:.0f} {units[name]}" for name, (low, _, high) in self.summary().items()]
        return f"{', '.join(told)}; held back by {', '.join(self.throttled) or 'nothing'}"

    def _watch(self):
        while not self._stop.wait(self.interval_s):
            self._sample()

    def _sample(self):
        nvml, handle = self._nvml, self._handle
        power_mw = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
        bits = _ask(nvml, nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if bits is None:  # a driver older than 535 knows it by its former name
            bits = _ask(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        self.samples.append(
            {
                "t_s": time.perf_counter() - self._start,
                "sm_mhz": _ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
                "memory_mhz": _ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
                "temperature_c": _ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
                "power_w": None if power_mw is None else power_mw / 1e3,
                "reasons": None if bits is None else [name for bit, name in REASONS.items() if bits & bit],
            }
        )


def link(a: int, b: int) -> str:
    """What lies between two of torch's GPUs: "NVLink", "PCIe", or "unknown"."""
    try:
        nvml, handle = _open(a)
        other = _open(b)[1]
        status = _ask(nvml, nvml.nvmlDeviceGetP2PStatus, handle, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except Exception:  # NVML's errors are made at run time
        return "unknown"
    return {None: "unknown", nvml.NVML_P2P_STATUS_OK: "NVLink"}.get(status, "PCIe")


def _open(device: int | None):
    """(NVML, the handle of torch's `device`, which CUDA_VISIBLE_DEVICES may have numbered otherwise than NVML)"""
    if not torch.cuda.is_available() or torch.version.hip:
        raise RuntimeError("no NVIDIA GPU here")
    import pynvml

    pynvml.nvmlInit()
    try:
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except Exception:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        raise


def _ask(nvml, question, *arguments):
    """NVML's answer; None where this card or driver has none."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None
