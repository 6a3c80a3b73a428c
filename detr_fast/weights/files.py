"""Reading a file of weights without trusting it: tensors and plain values come out, code never runs."""

import argparse
import json
import pickle
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from detr_fast.config import UserError

LARGEST_JSON = 64 << 20
"""Bytes; an index of shards, the largest of these files, has a few hundred thousand."""

UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What torch's restricted unpickler raises on files that are damaged or forbidden."""

HUGGING_FACE_CONFIG = "config.json"


@dataclass(frozen=True)
class WeightsFile:
    """What a file, or a Hugging Face folder, holds: tensors under its own names, and what else it says about them."""

    path: Path
    state_dict: dict[str, Tensor]
    model_config: dict[str, Any] | None = None
    """Fields of ModelConfig, where we wrote the file."""
    categories: list[dict[str, Any]] | None = None
    """`{"id", "name"}` in label order, where we wrote the file."""
    args: dict[str, Any] = field(default_factory=dict)
    """facebookresearch's training options, where the file has them."""
    huggingface_config: dict[str, Any] = field(default_factory=dict)
    """Hugging Face's config.json, where there is one."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in `path` under the file's own names, averaged ones (EMA) where it has them; see
    `read_weights_file`."""
    return read_weights_file(path).state_dict


def read_weights_file(path: Path) -> WeightsFile:
    """Reads .pth, .pt, .bin (torch's format), .safetensors, or a folder as Hugging Face saves it.

    Pickles are read with `weights_only=True` and nothing else, `argparse.Namespace` being the one class allowed, since
    facebookresearch's files hold one. Raises UserError that names the file.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such file of weights.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return _read_torch(path)
    raise UserError(f"{path}: weights are .pth, .pt, .bin or .safetensors files, or Hugging Face folders.")


def _read_torch(path: Path) -> WeightsFile:
    """One of our checkpoints, its sha256 checked; facebookresearch's {"model": ..., "args": ...}; a plain state
    dict."""
    from detr_fast.training.checkpoint import is_checkpoint, load_checkpoint

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            if is_checkpoint(path):
                content = load_checkpoint(path)
            else:
                mapped = zipfile.is_zipfile(path)  # torch's older format cannot be mapped into memory
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UNREADABLE as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{path} cannot be read safely as weights: {reason}\n"
            "It is damaged, or holds more than tensors; nothing in it was run. Give a file from a source you trust, "
            "saved as a state dict or as .safetensors."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict.")
    args = content.get("args")
    return WeightsFile(
        path,
        _require_tensors(path, content.get("ema") or content.get("model", content)),
        content.get("model_config"),
        content.get("categories"),
        vars(args) if isinstance(args, argparse.Namespace) else {},
    )


def _read_safetensors(path: Path) -> WeightsFile:
    """Tensors, what our export wrote about them into the file's metadata, and the config.json beside it."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no readable .safetensors file: {error}") from error
    ours = {name: _parse_json(path, metadata[name]) for name in ("model_config", "categories") if name in metadata}
    beside = _read_json(path.parent / HUGGING_FACE_CONFIG) if not ours else {}
    config = beside if beside.get("model_type") == "detr" else {}
    return WeightsFile(path, _require_tensors(path, tensors), **ours, huggingface_config=config)


def _read_folder(folder: Path) -> WeightsFile:
    """One file, or the shards that an index lists, and config.json."""
    config = _read_json(folder / HUGGING_FACE_CONFIG)
    index = folder / "model.safetensors.index.json"
    single = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).exists()]
    if not single and not index.exists():
        raise UserError(f"{folder}: no model.safetensors, model.safetensors.index.json or pytorch_model.bin in it.")
    shards = single[:1] or _shards(index)
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= read_weights_file(shard).state_dict
    return WeightsFile(folder, tensors, huggingface_config=config)


def _shards(index: Path) -> list[Path]:
    """The files of a sharded model, each beside its index."""
    names = _read_json(index).get("weight_map", {})
    names = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{index}: weight_map must name files in the same folder.")
    return [index.with_name(name) for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty where there is no such file."""
    if not path.exists():
        return {}
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path} has {path.stat().st_size >> 20} MiB: that is no configuration.")
    try:
        content = _parse_json(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a json object.")
    return content


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} holds invalid json: {error}") from error


def _require_tensors(path: Path, values: Any) -> dict[str, Tensor]:
    """`values`, once it is known to be a state dict."""
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path} holds no state dict, neither at its top nor under 'model'.")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path} is no state dict: {name!r} is a {type(value).__name__}, not a tensor.")
    return values
