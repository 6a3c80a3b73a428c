"""A candidate's process that goes wrong in the way its argument names, or is faster or slower than it should be."""

import os
import signal
import sys
import time
from typing import Any

KIND = sys.argv[1]
SECONDS = {"first": 0.02, "slow": 0.03, "fast": 0.01, "same": 0.02}

if KIND == "hanging":
    time.sleep(1000)
if KIND == "crashing":
    os.kill(os.getpid(), signal.SIGSEGV)
if KIND == "raising":
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

from detr_profiling.measuring import candidate, timing  # noqa: E402
from detr_profiling.measuring.measurement import Configuration  # noqa: E402
from detr_profiling.workload import Workload  # noqa: E402
from planted_clock import PlantedClock  # type: ignore[import-not-found]  # noqa: E402

build = Configuration.build


def planted(configuration: Configuration) -> Workload:
    workload = build(configuration)

    def run() -> None:
        clock.sleep(SECONDS.get(KIND, 0.01))

    def observe() -> dict[str, Any]:
        assert honest is not None
        found = honest()
        return found | {"logits": found["logits"] * 1.05} if KIND == "wrong" else found

    honest, workload.run, workload.observe = workload.observe, run, observe
    return workload


clock = timing.time = PlantedClock()
Configuration.build = planted  # type: ignore[method-assign, assignment]
candidate.main()
