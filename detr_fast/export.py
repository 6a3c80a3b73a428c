"""`python -m detr_fast.export`: a detector's weights under another implementation's names."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from detr_fast.config import Checked, UserError, require
from detr_fast.detector import Detector
from detr_fast.weights import export_state_dict, read_detector
from detr_fast.weights.files import HUGGING_FACE_CONFIG, PREPROCESSOR_CONFIG
from detr_fast.weights.naming import Naming
from detr_fast.weights.preprocessing import preprocessor_config


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Checked):
    """Write a detector's weights under the names that another implementation reads."""

    weights: str
    """Own checkpoint, facebookresearch .pth, Hugging Face folder or .safetensors."""
    out: str
    """File to write, .pth or .safetensors; for huggingface also a folder, for from_pretrained and pipelines."""
    naming: Naming = "detr_fast"
    """Whose names: facebook loads into facebookresearch/detr, huggingface into transformers."""
    categories: str | None = None
    """A COCO json that names the weights' classes, where they do not: ids are labels."""

    def __post_init__(self) -> None:
        suffix = Path(self.out).suffix
        allowed = (".pth", ".safetensors", "") if self.naming == "huggingface" else (".pth", ".safetensors")
        require(suffix in allowed, f"--out {self.out}: give a .pth or .safetensors file (huggingface: or a folder).")


def main(options: ExportConfig) -> int:
    """Raises UserError where the weights cannot be read, have no counterpart, or the file cannot be written."""
    detector = read_detector(options.weights, categories=options.categories)
    for note in detector.notes:
        print(note)
    out = Path(options.out)
    try:
        if out.suffix:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_weights(detector, out, options.naming)
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_weights(detector, out / "model.safetensors", options.naming)
            for name, content in (
                (HUGGING_FACE_CONFIG, huggingface_config(detector)),
                (PREPROCESSOR_CONFIG, preprocessor_config(detector.config)),
            ):
                (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--out {out} cannot be written: {error}") from error
    print(f"Wrote {out} with {options.naming} names.")
    return 0


def write_weights(detector: Detector, out: Path, naming: Naming) -> None:
    """Write the weights with, beside them, the architecture and the classes, which `load_model` reads and others
    ignore."""
    state_dict = {key: value.contiguous() for key, value in export_state_dict(detector, naming).items()}
    facts = {"model_config": detector.config.to_dict(), "categories": described_categories(detector)}
    partial = out.with_name(out.name + ".partial")  # a kill leaves the old file or the new one, never a torn one
    try:
        if out.suffix == ".pth":
            torch.save({"model": state_dict, **facts}, partial)
        else:
            save_file(state_dict, partial, {"format": "pt", **{name: json.dumps(fact) for name, fact in facts.items()}})
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def described_categories(detector: Detector) -> list[dict[str, Any]] | None:
    """Return the detector's classes as plain values, in label order."""
    if detector.categories is None:
        return None
    return [{"id": category.id, "name": category.name} for category in detector.categories]


def huggingface_config(detector: Detector) -> dict[str, Any]:
    """Return what transformers' DetrConfig needs to build this model with a timm backbone."""
    config = detector.config
    names = [category.name for category in detector.categories or ()]
    names = names or [f"LABEL_{label}" for label in range(config.num_classes)]
    return {
        "architectures": ["DetrForObjectDetection"],
        "model_type": "detr",
        "use_timm_backbone": True,
        "backbone": config.backbone,
        "use_pretrained_backbone": False,
        "dilation": config.dilation,
        "num_queries": config.num_queries,
        "d_model": config.hidden_dim,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.feedforward_dim,
        "decoder_ffn_dim": config.feedforward_dim,
        "dropout": config.dropout,
        "auxiliary_loss": False,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }


if __name__ == "__main__":
    from detr_fast.command import run

    run(main, ExportConfig)
