"""DETR, the detection transformer, made fast and provably equal: `load_model`, `build_model`, `build_criterion`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr_fast.detector import Detector
    from detr_fast.model.detr import DETR
    from detr_fast.training.criterion import build_criterion
    from detr_fast.weights import build_model, export_state_dict, load_model, load_state_dict

__version__ = "0.1.0"

__all__ = ["DETR", "Detector", "build_criterion", "build_model", "export_state_dict", "load_model", "load_state_dict"]

MODULES = {
    "DETR": "detr_fast.model.detr",
    "Detector": "detr_fast.detector",
    "build_criterion": "detr_fast.training.criterion",
    **dict.fromkeys(("build_model", "export_state_dict", "load_model", "load_state_dict"), "detr_fast.weights"),
}
"""Where each name of `__all__` is defined."""


def __getattr__(name: str) -> Any:
    """Import a public name where it is first asked for: `detr-fast --help` need not wait for torch."""
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
