"""pycocotools, COCO's own tool, as an `Evaluator`: hotcoco has to agree with it, to the last bit."""

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from detr_fast.config import UserError
from detr_fast.evaluation.coco_metrics import Arrays, without_annotations


def run_pycocotools(truth: dict[str, Any], detections: np.ndarray, most: int) -> Arrays:
    """Compute what `run_hotcoco` does, a hundred times slower. Raises UserError where pycocotools is not installed."""
    require_pycocotools()
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):
        ground = pycocotools_index(truth)
        found = ground.loadRes(detections) if len(detections) else pycocotools_index(without_annotations(truth))
        evaluator = COCOeval(ground, found, "bbox")
        evaluator.params.maxDets = [1, 10, most]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    result = evaluator.eval
    found_and_scored = (result["precision"], result["scores"], result["recall"])
    return np.array(evaluator.stats), *found_and_scored, np.array(evaluator.params.recThrs)


def pycocotools_index(document: dict[str, Any]) -> Any:
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = document
    index.createIndex()
    return index


def require_pycocotools() -> None:
    """Raise UserError where pycocotools is not installed."""
    try:
        import pycocotools  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("--pycocotools needs pycocotools: pip install 'detr-fast[coco]'. Or leave it out.") from error
