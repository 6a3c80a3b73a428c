"""Readings of a GPU's state while something is measured, taken in a thread beside it.

Utilisation, memory, power, clock and temperature are torch.cuda's own functions, which ask NVML through nvidia-ml-py
and find the GPU by CUDA_VISIBLE_DEVICES, numbered as CUDA_DEVICE_ORDER=PCI_BUS_ID does; a part of a GPU (MIG) that is
named there by its UUID they do not find. Energy and why the clock was lowered, which torch does not tell, are read from
NVML here.

NVML averages by itself, utilisation over up to a second and power on most GPUs over one. Of a shorter time these say
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

READERS: dict[str, tuple[Callable[[torch.device], int], float]] = {
    "utilisation_percent": (lambda device: torch.cuda.utilization(device), 1),
    "memory_mib": (lambda device: torch.cuda.device_memory_used(device), 2**20),
    "power_watts": (lambda device: torch.cuda.power_draw(device), 1e3),
    "sm_clock_mhz": (lambda device: torch.cuda.clock_rate(device), 1),
    "temperature_celsius": (lambda device: torch.cuda.temperature(device), 1),
}
"""Quantity -> the function that reads it, and how many of that function's units make one of ours."""
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
    """Readings of the time in which the sampler was open; None: the GPU does not tell."""

    utilisation_percent: Reading | None
    memory_mib: Reading | None
    """Memory that all processes hold on the GPU."""
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
        self._readers = dict(READERS)
        self._samples: list[dict[str, float]] = []
        self._reasons = 0
        self._energies_mj: list[int] = []
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
            self._handle = find_handle(pynvml, self.device)
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
        if self.problem is None:
            try:
                self._note_energy()
            except self._nvml.NVMLError as failure:
                self.problem = f"NVML: {failure}"
        if self.problem is not None:
            warnings.warn(f"The GPU's readings end after {len(self._samples)} samples. {self.problem}")

    def summary(self) -> GpuSummary | None:
        """Sum up, once the context is closed; None where nothing was read."""
        if not self._samples:
            return None
        energy_joules, energy_source = self._energy()
        return GpuSummary(
            **{name: self._reading(name) for name in READERS},
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
        except (self._nvml.NVMLError, RuntimeError) as error:  # the latter is torch's, where it finds no such GPU
            self.problem = f"NVML: {error}"

    def _sample(self) -> None:
        """Read what there is; what the GPU does not support is not asked for again."""
        values: dict[str, float] = {}
        for name, (read, units) in list(self._readers.items()):
            try:
                values[name] = read(self.device) / units
            except self._nvml.NVMLError_NotSupported:
                del self._readers[name]
        self._reasons |= clock_reasons(self._nvml, self._handle)
        self._samples.append(values | {"time_s": time.perf_counter()})

    def _note_energy(self) -> None:
        """Read the millijoules since the driver was loaded, where there is a counter."""
        try:
            self._energies_mj.append(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_FunctionNotFound):
            return

    def _reading(self, name: str) -> Reading | None:
        values = [sample[name] for sample in self._samples if name in sample]
        return Reading(sum(values) / len(values), max(values)) if values else None

    def _energy(self) -> tuple[float | None, str | None]:
        """Return joules of the whole time, and by what they are known; None where the readings end early."""
        if self.problem is not None:
            return None, None
        if len(self._energies_mj) == 2:
            return (self._energies_mj[1] - self._energies_mj[0]) / 1e3, "counter"
        points = [(each["time_s"], each["power_watts"]) for each in self._samples if "power_watts" in each]
        if len(points) < 2:
            return None, None
        return sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(points)), "power"


def find_handle(nvml: Any, device: torch.device) -> Any:
    """Find NVML's handle of torch's `device` by its place on the PCI bus. Raises NVMLError."""
    properties: Any = torch.cuda.get_device_properties(device)
    domain, bus, place = properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id
    return nvml.nvmlDeviceGetHandleByPciBusId(f"{domain:08x}:{bus:02x}:{place:02x}.0")


def clock_reasons(nvml: Any, handle: Any) -> int:
    """Read the bits of why the clock is as it is, 0 where the GPU does not tell. Raises NVMLError."""
    try:
        return nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except nvml.NVMLError_FunctionNotFound:  # the same by its name before driver 535
        return nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    except nvml.NVMLError_NotSupported:
        return 0


def throttling(reasons: int) -> tuple[str, ...]:
    """Say the bits of `reasons` in words, but for those that are no throttling."""
    bits = (1 << place for place in range(reasons.bit_length()))
    found = (bit for bit in bits if reasons & bit & ~NOT_THROTTLING)
    return tuple(THROTTLING.get(bit, f"unknown reason {bit:#x}") for bit in found)
