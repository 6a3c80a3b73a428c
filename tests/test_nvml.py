"""The GPU's readings by torch's functions and ours, against an NVML that is not there: units, the right GPU, what it
does not support, its loss."""

import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pynvml
import pytest
import torch
from detr_profiling.measuring.nvml import Reading, Sampler, throttling

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

GPU = torch.device("cuda", 0)


class FakeNvml:
    """nvidia-ml-py with two GPUs, of which torch sees the second alone; its own errors and constants."""

    def __init__(self) -> None:
        self.watts: list[float] = [200.0]
        self.unsupported: set[str] = set()
        self.fails_after: int | None = None
        self.reasons = 0x1
        self.calls: list[str] = []
        self.is_open = False
        self.energy_mj = 5_000_000

    def __getattr__(self, name: str) -> object:
        return getattr(pynvml, name)  # what is not faked

    def _call(self, handle: str, name: str) -> None:
        assert handle == "second", "the other GPU was read"
        assert self.is_open, "NVML is not initialised"
        self.calls.append(name)
        if name in self.unsupported:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        if self.fails_after is not None and len(self.calls) > self.fails_after:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return ("first", "second")[index]

    def nvmlDeviceGetHandleByPciBusId(self, place: str) -> str:
        return {"00000000:17:00.0": "first", "00000000:ca:00.0": "second"}[place]

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        self._call(handle, "utilisation")
        return SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        self._call(handle, "memory")
        return SimpleNamespace(total=80 * 2**30, free=70 * 2**30, used=10 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._call(handle, "power")
        return int(1e3 * self.watts[min(self.calls.count("power"), len(self.watts)) - 1])

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        self._call(handle, "clock")
        assert kind == pynvml.NVML_CLOCK_SM
        return 1980

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        self._call(handle, "temperature")
        return 61

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._call(handle, "energy")
        self.energy_mj += 12_500
        return self.energy_mj

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        self._call(handle, "reasons")
        return self.reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        raise AssertionError("the deprecated function was asked")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xCA, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "nvml"]


def wait_until(condition: Callable[[], bool]) -> None:
    """Gives the thread that reads as much time as it takes."""
    ends = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < ends and readers(), "the thread has ended"
        time.sleep(0.001)


def test_readings_have_their_units_and_come_from_torchs_gpu(nvml: FakeNvml) -> None:
    nvml.watts = [100.0, 700.0]
    with Sampler(GPU, every_ms=5) as sampler:
        assert readers()
        wait_until(lambda: nvml.calls.count("power") >= 2)
    assert not readers()
    summary = sampler.summary()
    assert summary is not None and summary.samples >= 3
    assert summary.utilisation_percent == Reading(97, 97)
    assert summary.memory_mib == Reading(10240, 10240)
    assert summary.sm_clock_mhz == Reading(1980, 1980) and summary.temperature_celsius == Reading(61, 61)
    assert summary.power_watts is not None and summary.power_watts.max == 700
    mean = (100 + 700 * (summary.samples - 1)) / summary.samples
    assert summary.power_watts.mean == pytest.approx(mean)
    assert (summary.energy_joules, summary.energy_source) == (12.5, "counter")  # the difference, from millijoules
    assert summary.throttled == () and summary.problem is None and sampler.problem is None


def test_the_block_of_a_result(nvml: FakeNvml) -> None:
    with Sampler(GPU, every_ms=1e6) as sampler:
        pass
    summary = sampler.summary()
    assert summary is not None and summary.samples == 2  # at the beginning and at the end, however short
    block = summary.to_dict()
    for name in ("utilisation_percent", "memory_mib", "power_watts", "sm_clock_mhz", "temperature_celsius"):
        assert block[name].keys() == {"mean", "max"}
    assert block["energy_joules"] == 12.5 and list(block["throttled"]) == []


def test_without_a_counter_energy_is_power_over_time(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.unsupported = {"energy"}
    nvml.watts = [100.0, 300.0]
    clock = iter([10.0, 14.0])
    monkeypatch.setattr("detr_profiling.measuring.nvml.time.perf_counter", lambda: next(clock))
    with Sampler(GPU, every_ms=1e6) as sampler:
        pass
    summary = sampler.summary()
    assert summary is not None
    assert (summary.energy_joules, summary.energy_source) == (4 * 200, "power")


def test_what_a_gpu_does_not_support_is_none_and_the_rest_is_read(nvml: FakeNvml) -> None:
    nvml.unsupported = {"utilisation", "power", "energy", "reasons"}  # as a part of a GPU (MIG)
    with Sampler(GPU, every_ms=5) as sampler:
        wait_until(lambda: nvml.calls.count("memory") >= 2)
    summary = sampler.summary()
    assert summary is not None and summary.samples >= 3 and summary.problem is None
    assert summary.utilisation_percent is None and summary.power_watts is None
    assert summary.energy_joules is None and summary.energy_source is None
    assert summary.memory_mib == Reading(10240, 10240)
    assert nvml.calls.count("power") == 1


def test_a_gpu_that_torch_does_not_find_has_no_readings(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a part of a GPU (MIG) that is visible by its UUID."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-33333333-of-the-part")
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: ["GPU-11111111", "GPU-22222222"])
    with pytest.warns(UserWarning, match="readings end after 0 samples"), Sampler(GPU) as sampler:
        pass
    assert sampler.summary() is None and sampler.problem


def test_a_gpu_that_is_lost_ends_the_readings_and_nothing_else(nvml: FakeNvml) -> None:
    nvml.fails_after = 9  # the energy, a sample, and two readings
    done = False
    with pytest.warns(UserWarning, match="readings end after 1 samples. NVML: GPU is lost"), Sampler(GPU, 5) as sampler:
        readers()[0].join(120)
        done = True
    assert done and not readers()
    summary = sampler.summary()
    assert summary is not None and summary.samples == 1 and summary.problem == "NVML: GPU is lost"
    assert summary.energy_joules is None  # of half the time it would pass for that of all


def test_the_counter_can_fail_at_the_end(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="GPU is lost"), Sampler(GPU, 1e6) as sampler:
        lost = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: (_ for _ in ()).throw(lost))
    summary = sampler.summary()
    assert summary is not None and summary.energy_joules is None


def test_the_thread_ends_where_the_body_fails(nvml: FakeNvml) -> None:
    with pytest.raises(ValueError, match="the body's own"), Sampler(GPU, every_ms=5):
        assert readers()
        raise ValueError("the body's own")
    assert not readers()


def test_throttling_in_words(nvml: FakeNvml) -> None:
    nvml.reasons = 0x2 | 0x4 | 0x20
    with Sampler(GPU) as sampler:
        pass
    summary = sampler.summary()
    assert summary is not None and summary.throttled == ("power cap", "temperature, slowed by the driver")
    assert throttling(0x1 | 0x2) == ()  # idle, and clocks that somebody set
    assert throttling(0x4000) == ("unknown reason 0x4000",)


def test_an_old_driver_knows_the_reasons_by_their_old_name(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    monkeypatch.setattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", lambda h: (_ for _ in ()).throw(unknown))
    monkeypatch.setattr(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda h: 0x40)
    with Sampler(GPU) as sampler:
        pass
    summary = sampler.summary()
    assert summary is not None and summary.throttled == ("temperature, slowed by the hardware",)


def test_words_are_those_of_nvidias_bits() -> None:
    for name, word in {"SwPowerCap": "power cap", "HwPowerBrakeSlowdown": "power brake of the server"}.items():
        assert throttling(getattr(pynvml, f"nvmlClocksEventReason{name}")) == (word,)
    assert not throttling(pynvml.nvmlClocksEventReasonGpuIdle | pynvml.nvmlClocksEventReasonApplicationsClocksSetting)


@pytest.mark.parametrize("lacks", ["GPU", "package", "driver"])
def test_nothing_to_read_is_no_summary(lacks: str, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacks == "package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    if lacks == "driver":
        absent = pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        monkeypatch.setattr(nvml, "nvmlInit", lambda: (_ for _ in ()).throw(absent))
    with Sampler(torch.device("cpu") if lacks == "GPU" else GPU) as sampler:
        pass
    assert sampler.summary() is None and sampler.problem and not readers()
