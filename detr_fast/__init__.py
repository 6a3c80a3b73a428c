"""A fast detection transformer, provably DETR: `build_model`, `load_model`, `build_criterion` and the weights'
namings."""

from detr_fast.detector import Detector
from detr_fast.model.detr import DETR
from detr_fast.training.criterion import build_criterion
from detr_fast.weights import build_model, export_state_dict, load_model, load_state_dict

__version__ = "0.1.0"

__all__ = ["DETR", "Detector", "build_criterion", "build_model", "export_state_dict", "load_model", "load_state_dict"]
