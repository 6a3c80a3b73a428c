"""Reading a file of weights without trusting it: tensors and plain values come out, code never runs."""

import argparse
import json
import struct
import zipfile
from codecs import BOM_UTF8
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from detr_fast.config import ModelConfig, UserError, require
from detr_fast.data.annotations import Category
from detr_fast.paths import kind_of
from detr_fast.weights.container import is_container, read_container
from detr_fast.weights.naming import NamedWeights
from detr_fast.weights.pickles import RESAVE, brief, listed, read_pickle
from detr_fast.weights.wrappings import find_weights

LARGEST_JSON = 64 << 20
"""Bytes; an index of shards, the largest of these files, has a few hundred thousand."""
LARGEST_REPEATED = 16 << 20
"""Bytes of a tensor that repeats its numbers, as `expand` makes it: a small file can hold one of any size."""
HUGGING_FACE_CONFIG = "config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"


@dataclass(frozen=True)
class ModelDescription:
    """Description of a model that every file of ours has beside the weights, as plain values; a field is a key."""

    model_config: dict[str, Any]
    """Fields of ModelConfig."""
    categories: list[dict[str, Any]] | None
    """`{"id", "name"}` in label order."""

    @classmethod
    def of(cls, config: ModelConfig, categories: Sequence[Category] | None) -> "ModelDescription":
        return cls(config.to_dict(), None if categories is None else [vars(category) for category in categories])

    def with_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Any]:
        """Return the content of a file that holds the model for use."""
        return {**vars(self), "model": state_dict}


DESCRIPTION = tuple(each.name for each in fields(ModelDescription))


@dataclass(frozen=True)
class WeightsFile:
    """Content of a file or a Hugging Face folder: tensors under its own names, and what it states about them."""

    path: Path
    state_dict: dict[str, Tensor]
    model_config: dict[str, Any] | None = None
    """That of `ModelDescription`, where we wrote the file."""
    categories: list[dict[str, Any]] | None = None
    """Those of `ModelDescription`, where we wrote the file."""
    args: dict[str, Any] = field(default_factory=dict)
    """facebookresearch's training options, where the file has them."""
    huggingface_config: dict[str, Any] = field(default_factory=dict)
    """Hugging Face's config.json, where there is one."""
    preprocessor: dict[str, Any] = field(default_factory=dict)
    """Hugging Face's preprocessor_config.json, where there is one."""
    notes: tuple[str, ...] = ()
    """Choices made among several things in the file, a line each."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the weights in `path`, EMA ones where it has them, under the file's own names: see `read_weights_file`."""
    return read_weights_file(path).state_dict


def read_weights_file(path: Path) -> WeightsFile:
    """Read what torch saved (.pth, .pt, .ckpt, .bin, whatever the ending), .safetensors, or a Hugging Face folder.

    Pickles are read with `weights_only=True` and nothing else: see `pickles.py`. Raises UserError that names the file.
    """
    path = Path(path)
    if kind_of(path) == "folder":
        return _read_folder(path)
    if kind_of(path) == "nothing":
        raise UserError(f"{path}: no such file of weights.")
    require(kind_of(path) != "broken link", f"{path} is a broken link: give the file itself.")
    require(kind_of(path) == "file", f"{path} is no regular file, but a pipe or a device: save the weights in a file.")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if _is_safetensors(start, path.stat().st_size):  # first: its length may look like any text
        return _read_safetensors(path)
    if kind := _something_else(start):
        raise UserError(f"{path} {kind}.")
    if path.suffix == ".safetensors" and not start.startswith(TORCHS):
        return _read_safetensors(path)  # which says what is wrong with it
    return _read_torch(path)


INSIDE = ("*.pth", "*.pt", "*.ckpt", "*.safetensors", "*/*.pt", "*/*.ckpt", "*/model.safetensors")
"""Files that a folder which is no model may hold instead, such as a run's."""
TORCHS = (b"PK", *(bytes((0x80, protocol)) for protocol in range(2, 6)))
"""First bytes of an archive, and of a pickle."""
TEXTS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the weights: run git lfs pull where it was cloned",
    b"<": "is a web page, not weights: download the file itself",
    b"{": "is json text, not weights: give the .pth or .safetensors file, or the folder that it lies in",
}
ARCHIVES = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"7z\xbc\xaf", b"Rar!")


def _something_else(start: bytes) -> str | None:
    """Describe a file that begins with `start`, if it is no weights, as the rest of a sentence."""
    if not start:
        return "is empty: copy or download it again"
    start = start.removeprefix(BOM_UTF8)
    for beginning, kind in TEXTS.items():
        if start.lstrip().startswith(beginning):
            return kind
    if start.startswith(ARCHIVES):
        return "is a compressed archive: unpack it, and give the file in it"
    if start.startswith(b"\x89HDF"):
        return f"is an HDF5 file (Keras): {RESAVE}, with PyTorch"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return "is text, not weights: give a .pth, .pt, .ckpt, .bin or .safetensors file, or a Hugging Face folder"
    return None


def _is_safetensors(start: bytes, size: int) -> bool:
    """Tell whether a file begins with the length of a header and the header, as safetensors files do."""
    return len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < size


def _read_torch(path: Path) -> WeightsFile:
    """Read one of our checkpoints, checked by its sha256, facebookresearch's, or a state dict anywhere in the file."""
    if zipfile.is_zipfile(path) and not _of_torch(path):
        raise UserError(f"{path} is a zip archive that torch.save did not write: unpack it, and give the file in it.")
    content = read_container(path) if is_container(path) else read_pickle(path)
    try:
        found = find_weights(content)
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    options = content.get("args", content.get("hyper_parameters"))
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    ours = _described(path, content) if "model_config" in content else {}
    config, preprocessor = _beside(path, found.tensors)
    place, *others = (".".join(map(brief, each)) or "no key" for each in (found.keys, *found.passed_over))
    notes = [f"{path}: the averaged weights are read, under {place}"] if found.is_ema and not ours else []
    if others:
        notes.append(f"{path}: the weights under {place} are read, not those of the same names under {listed(others)}")
    return WeightsFile(
        path,
        _require_tensors(path, found.tensors),
        args=options if isinstance(options, dict) else {},
        huggingface_config=config,
        preprocessor=preprocessor,
        notes=tuple(notes),
        **ours,
    )


def _described(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return what `content` has of a `ModelDescription`, by its keys."""
    return {name: _plain(path, name, content[name]) for name in DESCRIPTION if name in content}


def _plain(path: Path, name: str, stated: Any) -> Any:
    """Return `stated`. Raises UserError unless it is text and numbers, at most in a list or dict of lists."""
    for entry in stated if isinstance(stated, list) else [stated]:
        for value in (*entry.keys(), *entry.values()) if isinstance(entry, dict) else [entry]:
            for one in value if isinstance(value, list | tuple) else [value]:
                short = isinstance(one, str | float | None) or (isinstance(one, int) and one.bit_length() <= 64)
                kind = type(one).__name__
                require(short, f"{path}: its {name} holds a {kind} that is neither text nor a number of usual size.")
    return stated


def _of_torch(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return True  # damaged: reading it will say how


def _read_safetensors(path: Path) -> WeightsFile:
    """Read tensors, what our export wrote about them into the file's metadata, and Hugging Face's files beside it."""
    tensors, metadata = _open_safetensors(path)
    ours = _described(path, {name: _parse_json(path, metadata[name]) for name in DESCRIPTION if name in metadata})
    config, preprocessor = _beside(path, tensors)
    return WeightsFile(
        path, _require_tensors(path, tensors), **ours, huggingface_config=config, preprocessor=preprocessor
    )


def _beside(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config.json and preprocessor_config.json beside a file, unless its weights are not Hugging Face's."""
    weights = NamedWeights.recognise(tensors)
    if weights.is_detr and not weights.naming.startswith("huggingface"):
        return {}, {}
    config = _read_json(path.parent / HUGGING_FACE_CONFIG)
    kind = config.get("model_type")
    return config if kind else {}, _read_json(path.parent / PREPROCESSOR_CONFIG) if kind == "detr" else {}


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        reason = brief(error, 120).rstrip(".")
        raise UserError(f"{path} is no readable .safetensors file ({reason}): copy or download it again.") from error


def _read_folder(folder: Path) -> WeightsFile:
    """Read one file, or the shards that an index lists, config.json and preprocessor_config.json."""
    config, preprocessor = (_read_json(folder / name) for name in (HUGGING_FACE_CONFIG, PREPROCESSOR_CONFIG))
    names = ("model.safetensors", "pytorch_model.bin")
    single = [folder / name for name in names if kind_of(folder / name) == "file"]
    index = next((file for name in names if kind_of(file := folder / f"{name}.index.json") == "file"), None)
    if not single and index is None:
        found = sorted(str(file.relative_to(folder)) for pattern in INSIDE for file in folder.glob(pattern))
        hint = f" Inside are {listed(found)}: give one." if found else ""
        raise UserError(f"{folder}: no {', '.join(names)} or {names[0]}.index.json in it.{hint}")
    tensors: dict[str, Tensor] = {}
    categories = None
    for shard in single[:1] or _shards(index or folder / f"{names[0]}.index.json"):
        part = read_weights_file(shard)
        tensors |= part.state_dict
        categories = categories or part.categories
    return WeightsFile(folder, tensors, categories=categories, huggingface_config=config, preprocessor=preprocessor)


def _shards(index: Path) -> list[Path]:
    """List the files of a sharded model, each beside its index."""
    names = _read_json(index).get("weight_map", {})
    names = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
    if not names or any(name in ("", ".", "..") or "\0" in name or Path(name).name != name for name in names):
        raise UserError(f"{index}: weight_map must name files in the same folder.")
    shards = [index.with_name(name) for name in names]
    lacking = [shard.name for shard in shards if not shard.is_file()]
    require(not lacking, f"{index} names {listed(lacking)}, and there is no such file: copy or download it as well.")
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in `path`, empty where there is no such file."""
    if kind_of(path) != "file":
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


def _require_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors`. Raises UserError where they are no whole weights: none, adapters, quantised or damaged."""
    if not tensors:
        raise UserError(f"{path} holds no tensors: save model.state_dict() in it.")
    if any(".lora_A." in name or ".lora_B." in name for name in tensors):
        raise UserError(
            f"{path} holds LoRA adapters, not a whole model: merge them into it, and save its state_dict()."
        )
    for name, value in tensors.items():
        if name.endswith((".weight", ".bias")) and not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"{path} is complex or quantised ({brief(name)} is {kind}): give the weights in floating-point numbers."
            )
        held = prod(size for size, stride in zip(value.shape, value.stride(), strict=True) if stride)
        repeated = held < value.numel() and value.nbytes > LARGEST_REPEATED
        if repeated or value.untyped_storage().nbytes() < held * value.element_size():
            raise UserError(f"{path} is damaged: {brief(name)} has fewer numbers than its shape {tuple(value.shape)}.")
    return tensors
