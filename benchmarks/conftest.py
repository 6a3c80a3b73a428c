"""`pytest benchmarks/ --benchmark-only [--size full]`: options, cases and data sets of all benchmarks.

Nothing is timed before it is shown to be right: a benchmark whose gate fails fails, and reports no time. They run one
after another, so a machine that slows down in between moves the figures. Where a few percent decide, use
`python -m detr_profiling ladder`: its rows take turns, each in a fresh process.
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_profiling.measuring.machine import describe_machine

from benchmarks.clock import DEVICE, case_id
from benchmarks.gate import PlainObservations
from benchmarks.photographs import write_photographs
from detr_fast.data.shapes import ensure_shapes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size",
        choices=("small", "full"),
        default="small",
        help="small: all of it in 5 minutes on two CPU cores; full: DETR's own image sizes, and compiled ones too",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a benchmark with an argument `case` for each of its file's `cases(size)`; likewise `other_case`."""
    for argument in metafunc.fixturenames:
        if argument == "case" or argument.endswith("_case"):
            cases = getattr(metafunc.module, f"{argument}s")(metafunc.config.getoption("size"))
            metafunc.parametrize(argument, list(cases), ids=case_id)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Note what the times depend on.

    Dates and commits stand elsewhere in the file, and would make any two runs differ.
    """
    machine = describe_machine(DEVICE).to_dict()
    machine_info["detr_profiling"] = {key: value for key, value in machine.items() if key not in ("date", "commit")}


@pytest.fixture(autouse=True)
def fresh_start() -> Iterator[None]:
    """Drop what earlier benchmarks have compiled, and allow TF32, which a case may turn off.

    Past a limit of recompilations torch.compile would run eagerly, and say nothing.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PlainObservations:
    return PlainObservations(tmp_path_factory.mktemp("observations"))


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the embedded data set at 64 pixels, a few images of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETR_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        return ensure_shapes(64, sizes={"train": 64, "val": 64})


@pytest.fixture(scope="session")
def photographs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write JPEG files of 640x480 pixels with COCO json."""
    return write_photographs(tmp_path_factory.mktemp("photographs"))
