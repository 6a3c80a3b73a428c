"""Reading and writing of weights: own, facebookresearch's, Hugging Face's, or a backbone's classifier's."""

from detr_fast.weights.backbone_weights import load_backbone_weights
from detr_fast.weights.files import read_state_dict
from detr_fast.weights.fine_tuning import load_for_fine_tuning
from detr_fast.weights.loading import build_model, export_state_dict, load_model, load_state_dict, read_detector
from detr_fast.weights.naming import Naming

__all__ = [
    "Naming",
    "build_model",
    "export_state_dict",
    "load_backbone_weights",
    "load_for_fine_tuning",
    "load_model",
    "load_state_dict",
    "read_detector",
    "read_state_dict",
]
