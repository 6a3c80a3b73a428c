"""`python -m detr_fast.export`: a detector's weights under another implementation's names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from detr_fast.config import Checked, require
from detr_fast.detector import Detector
from detr_fast.files import atomic_write, write_json
from detr_fast.weights import export_state_dict, read_detector
from detr_fast.weights.container import write_container
from detr_fast.weights.files import HUGGING_FACE_CONFIG, PREPROCESSOR_CONFIG, ModelDescription
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
    """Export a detector. Raises UserError where it cannot be read, has no counterpart there, or cannot be written."""
    detector = read_detector(options.weights, categories=options.categories)
    for note in detector.notes:
        print(note)
    out = Path(options.out)
    if out.suffix:
        write_weights(detector, out, options.naming)
    else:
        write_weights(detector, out / "model.safetensors", options.naming)
        write_json(out / HUGGING_FACE_CONFIG, huggingface_config(detector))
        write_json(out / PREPROCESSOR_CONFIG, preprocessor_config(detector.config))
    print(f"Wrote {out} with {options.naming} names.")
    return 0


def write_weights(detector: Detector, out: Path, naming: Naming) -> None:
    """Write the weights with the architecture and the classes, which `load_model` reads and others ignore.

    Raises UserError where the file cannot be written.
    """
    state_dict = {key: value.contiguous() for key, value in export_state_dict(detector, naming).items()}
    description = ModelDescription.of(detector.config, detector.categories)
    if out.suffix == ".pth":
        write_container(out, description.with_weights(state_dict))
        return
    metadata = {"format": "pt", **{name: json.dumps(fact) for name, fact in vars(description).items()}}
    with atomic_write(out) as file:
        file.write(save(state_dict, metadata))


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
