"""DETR, the detection transformer, made fast and provably equal: `load_model`, `build_model`, `build_criterion`."""

from detr_fast.detector import Detector
from detr_fast.model.detr import DETR
from detr_fast.training.criterion import build_criterion
from detr_fast.weights import build_model, export_state_dict, load_model, load_state_dict

__version__ = "0.1.0"

__all__ = ["DETR", "Detector", "build_criterion", "build_model", "export_state_dict", "load_model", "load_state_dict"]
