"""What a GPU does while something is measured: NVML's readings (nvidia-ml-py), taken in a thread beside it.

NVML averages by itself, utilisation over up to a second and power on most GPUs over one. Of a shorter stretch these say
little; the driver's energy counter is right, but for the tenth of a second in which it may stand still.
"""

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

import torch

THROTTLING = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "clock shared with other GPUs",
    0x20: "temperature, slowed by the driver",
    0x40: "temperature, slowed by the hardware",
    0x80: "power brake of the server",
    0x100: "display clock",
    0x200: "board limit",
    0x400: "reliability limit",
}
"""Bits of nvml.h, nvmlClocksEventReason...; NVIDIA called them throttle reasons."""
NOT_THROTTLING = 0x1 | 0x2
"""Idle; and application clocks, which somebody has set."""


@dataclass(frozen=True)
class Reading:
    mean: float
    max: float


@dataclass(frozen=True)
class GpuSummary:
    """Of the stretch of time in which the sampler was open; None: the GPU does not tell."""

    utilisation_percent: Reading | None
    memory_mib: Reading | None
    """Of all processes on the GPU."""
    power_watts: Reading | None
    sm_clock_mhz: Reading | None
    temperature_celsius: Reading | None
    energy_joules: float | None
    energy_source: str | None
    """counter: the driver's; power: readings over time, where there is no counter."""
    throttled: tuple[str, ...]
    """Why the clock was lowered, if it was."""
    samples: int
    problem: str | None
    """Why the readings end early."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Sampler:
    """Reads the GPU that torch calls `device` every `every_ms` while the context is open, at its beginning and its end.

    Without a GPU, nvidia-ml-py or a driver nothing is read and `problem` says why. Where NVML fails on the way, reading
    ends with a warning; what is measured goes on.
    """

    def __init__(self, device: torch.device, every_ms: float = 50.0) -> None:
        self.device = device
        self.every_ms = every_ms
        self.problem: str | None = None
        self._samples: list[dict[str, float]] = []
        self._reasons = 0
        self._energy_mj: list[int] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.device.type != "cuda":
            self.problem = "no GPU"
            return self
        try:
            import pynvml
        except ModuleNotFoundError:
            self.problem = "nvidia-ml-py is not installed"
            return self
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._gpu = _Gpu(pynvml, find_handle(pynvml, self.device))
            self._note_energy()
        except pynvml.NVMLError as error:
            self.problem = f"NVML: {error}"
            return self
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        try:
            if self.problem is None:
                self._note_energy()
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError as failure:
            self.problem = self.problem or f"NVML: {failure}"
        if self.problem is not None:
            warnings.warn(f"The GPU's readings end after {len(self._samples)} samples. {self.problem}")

    def summary(self) -> GpuSummary | None:
        """Once the context is closed; None where nothing was read."""
        if not self._samples:
            return None
        energy_joules, energy_source = self._energy()
        return GpuSummary(
            utilisation_percent=self._reading("utilisation_percent"),
            memory_mib=self._reading("memory_mib"),
            power_watts=self._reading("power_watts"),
            sm_clock_mhz=self._reading("sm_clock_mhz"),
            temperature_celsius=self._reading("temperature_celsius"),
            energy_joules=energy_joules,
            energy_source=energy_source,
            throttled=throttling(self._reasons),
            samples=len(self._samples),
            problem=self.problem,
        )

    def _run(self) -> None:
        try:
            self._sample()
            while not self._stop.wait(self.every_ms / 1e3):
                self._sample()
            self._sample()
        except self._nvml.NVMLError as error:
            self.problem = f"NVML: {error}"

    def _sample(self) -> None:
        values = self._gpu.read()
        self._reasons |= int(values.pop("reasons", 0))
        self._samples.append(values | {"time_s": time.perf_counter()})

    def _note_energy(self) -> None:
        energy_mj = self._gpu.energy_mj()
        if energy_mj is not None:
            self._energy_mj.append(energy_mj)

    def _reading(self, name: str) -> Reading | None:
        values = [sample[name] for sample in self._samples if name in sample]
        return Reading(sum(values) / len(values), max(values)) if values else None

    def _energy(self) -> tuple[float | None, str | None]:
        """Joules of the whole stretch, and by what; None where the readings end early."""
        if self.problem is not None:
            return None, None
        if len(self._energy_mj) == 2:
            return (self._energy_mj[1] - self._energy_mj[0]) / 1e3, "counter"
        points = [(each["time_s"], each["power_watts"]) for each in self._samples if "power_watts" in each]
        if len(points) < 2:
            return None, None
        return sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(points)), "power"


class _Gpu:
    """One GPU as NVML knows it. What it does not support is left out, and not asked for again."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._unsupported = (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound)
        self._energy_mj: Callable[[], int] = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        self._readers: dict[str, Callable[[], float]] = {
            "utilisation_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "memory_mib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20,
            "power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "temperature_celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "reasons": lambda: _clock_reasons(nvml, handle),
        }

    def read(self) -> dict[str, float]:
        """Raises NVMLError where the GPU does not answer."""
        values = {}
        for name, read in list(self._readers.items()):
            try:
                values[name] = float(read())
            except self._unsupported:
                del self._readers[name]
        return values

    def energy_mj(self) -> int | None:
        """Millijoules since the driver was loaded; None without a counter. Raises NVMLError as above."""
        try:
            return self._energy_mj()
        except self._unsupported:
            return None


def _clock_reasons(nvml: Any, handle: Any) -> int:
    try:
        return nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except nvml.NVMLError_FunctionNotFound:  # the same by its name before driver 535
        return nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)


def find_handle(nvml: Any, device: torch.device) -> Any:
    """NVML's handle of torch's `device`. Raises NVMLError.

    torch numbers the GPUs that CUDA_VISIBLE_DEVICES leaves it, in another order than NVML numbers all: what both know
    is the UUID. Of a part of a GPU (MIG) it is the part's, and then the place on the PCI bus finds the whole.
    """
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
        domain, bus, place = properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id
        return nvml.nvmlDeviceGetHandleByPciBusId(f"{domain:08x}:{bus:02x}:{place:02x}.0")


def throttling(reasons: int) -> tuple[str, ...]:
    """The bits of `reasons` in words, but for those that are no throttling."""
    bits = (1 << place for place in range(reasons.bit_length()))
    found = (bit for bit in bits if reasons & bit & ~NOT_THROTTLING)
    return tuple(THROTTLING.get(bit, f"unknown reason {bit:#x}") for bit in found)
