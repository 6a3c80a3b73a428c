"""COCO's own tool as an `Evaluator`: what hotcoco has to agree with, to the last bit."""

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_fast.evaluation.coco_metrics import Arrays, without_annotations


def run_pycocotools(truth: dict[str, Any], detections: np.ndarray, most: int) -> Arrays:
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


def pycocotools_index(document: dict[str, Any]) -> COCO:
    index = COCO()
    index.dataset = document
    index.createIndex()
    return index
