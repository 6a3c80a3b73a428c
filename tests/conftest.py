"""What several test files need: small data sets, made once, and Triton kernels that run without a GPU."""

import ctypes
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # threads of two processes on one core wait for each other; read when torch is imported, in this process and others
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's file is imported: before all of ours

from detr_fast import DETR, build_model, export_state_dict
from detr_fast.data.shapes import ensure_shapes
from detr_fast.files import atomic_write
from detr_fast.model import backbone
from tests.coco_files import Write
from tests.small_detr import SMALL, Weights

SHARED = Path(__file__).parents[2] / "shared"
FIRST = ("absent_gpu", "compile", "training", "benchmarks", "operations", "measurement", "notices", "reference")
"""Files of a minute or so: one that began last would run alone, beside processes that have nothing left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{name}" for name in FIRST]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


@pytest.fixture(scope="session", autouse=True)
def freed_memory_is_given_back() -> Iterator[None]:
    """A process that runs many files must not hold the largest one's memory for the rest of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detr_fast.host_memory.keep_freed_memory", lambda: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def nothing_outlives_its_file() -> Iterator[None]:
    """Compiled graphs, circles of references and what malloc holds for them."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 12 validation images of 64 pixels, in COCO format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETR_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        return ensure_shapes(64, sizes={"train": 48, "val": 12})


@pytest.fixture(scope="module")
def unrendered() -> Iterator[None]:
    """Figures are drawn and leave empty files: rendering takes three quarters of a small run's time."""

    def leave_empty(figure: Any, path: Path) -> None:
        with atomic_write(path):
            pass

    with pytest.MonkeyPatch.context() as patch:
        for module in ("plots", "pictures"):
            patch.setattr(f"detr_fast.evaluation.{module}.save_figure", leave_empty)
        yield


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN, and the largest integer: an entry that a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """ResNets of all their layers, each with few channels, so that files are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detr_fast.model.backbone.STAGE_WIDTHS", (2, 4, 8, 16))
        yield


@pytest.fixture
def one_narrow_block_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ResNet-50 that Triton's interpreter runs in seconds."""
    monkeypatch.setitem(backbone.DEPTHS, "resnet50", (1, 1, 1, 1))
    monkeypatch.setattr(backbone, "STAGE_WIDTHS", (8, 16, 16, 32))


@pytest.fixture(scope="module")
def model(narrow: None) -> DETR:
    """A narrow DETR of three classes."""
    return build_model("detr_r50", num_classes=3, **SMALL).eval()


@pytest.fixture(scope="module")
def weights(model: DETR) -> Weights:
    """Its weights, under facebookresearch's names."""
    return {key: value.clone() for key, value in export_state_dict(model, "facebook").items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a document, or text, to annotations.json beside a folder of images; returns the file."""
    (tmp_path / "images").mkdir()
    for i in range(1, 4):
        Image.new("RGB", (60, 40), (i * 40, 0, 0)).save(tmp_path / "images" / f"{i}.jpg")

    def write_file(content: Any) -> Path:
        file = tmp_path / "annotations.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return write_file
