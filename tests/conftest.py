"""What several test files need: small data sets, made once."""

from pathlib import Path

import pytest

from detr_fast.data.shapes import ensure_shapes

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 12 validation images of 64 pixels, in COCO format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETR_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        return ensure_shapes(64, sizes={"train": 48, "val": 12})
