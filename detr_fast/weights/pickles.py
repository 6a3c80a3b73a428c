"""Safe reading of torch's files: tensors and plain values come out, code of theirs never runs.

What training loops keep beside the weights (NumPy numbers, paths, dates, option holders) is made of stand-ins of ours;
any other class or function is refused by its name.
"""

import argparse
import io
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detr_fast.config import UserError

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
"""Errors that torch's restricted unpickler raises on files that are damaged or forbidden."""

RESAVE = "save the weights alone where it was made, torch.save(model.state_dict(), FILE)"
LARGEST_PICKLE = 16 << 20
"""Bytes that are looked through for what a refused file holds."""


def brief(text: object, longest: int = 60) -> str:
    """Return `text` of a file as a message may show it: without escape codes and control characters, and shortened."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text))
    plain = "".join(character if character.isprintable() else "?" for character in plain)
    return plain if len(plain) <= longest else f"{plain[: longest - 3]}..."


def listed(names: Iterable[object], shown: int = 4, longest: int = 60) -> str:
    """Join the first `shown` names, each shortened to `longest`, and say how many more there are."""
    every = list(names)
    more = f", and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(brief(name, longest) for name in every[:shown]) + more


class Inert:
    """Stand-in for a value that is not used here; takes whatever its own class would take."""

    def __new__(cls, *_: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class PlainDict:
    """Makes a dictionary in place of one of a subclass; an OrderedDict, as torch fills no others that have state."""

    def __new__(cls, *_: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class PlainList:
    """Makes a list in place of a deque."""

    def __new__(cls, *_: Any) -> list[Any]:  # type: ignore[misc]
        return []


class NumpyDtype:
    """A type as NumPy pickles it; `dtype` is None for what is no number, such as text and Python objects."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code) if re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", code) else None

    def __setstate__(self, state: Any) -> None:
        if state[1] == ">" and self.dtype is not None:
            self.dtype = self.dtype.newbyteorder(">")


def no_bytes(*_: Any) -> bytes:
    """Return empty bytes, the only ones that torch's files hold as a call of `bytes`."""
    return b""


def numbers(dtype: object, data: object) -> np.ndarray | None:
    """Return the array that NumPy pickled as `data`; None where it holds no numbers.

    Raises UnpicklingError where either is another object than NumPy puts there.
    """
    if not isinstance(dtype, NumpyDtype):
        raise pickle.UnpicklingError(f"a NumPy value has a {type(dtype).__name__} as its type")
    if dtype.dtype is None:
        return None
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError(f"a NumPy value has a {type(data).__name__} as its content")
    return np.frombuffer(data, dtype.dtype) if data else np.zeros(0, dtype.dtype)


def numpy_scalar(dtype: object, data: object) -> Any:
    """Return the Python number that NumPy pickled as `data`; an `Inert` where it is no number."""
    values = numbers(dtype, data)
    return Inert() if values is None else values[0].item()


class NumpyArray:
    """An array as NumPy pickles it; `values` holds its numbers once its state is set, if it has any."""

    def __init__(self, *_: Any) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        values = numbers(dtype, data)
        if values is not None:
            values = values.reshape(shape, order="F" if fortran else "C")
            self.values = values.astype(values.dtype.newbyteorder("="))


STAND_INS = [
    (argparse.Namespace, "argparse.Namespace"),
    (argparse.Namespace, "types.SimpleNamespace"),
    (NumpyDtype, "numpy.dtype"),
    (NumpyArray, "numpy.ndarray"),
    *((numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((NumpyArray, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (no_bytes, "builtins.bytes"),
    (PlainList, "collections.deque"),
    *(
        (PlainDict, name)
        for name in (
            "collections.defaultdict",
            "easydict.EasyDict",
            "yacs.config.CfgNode",
            "fvcore.common.config.CfgNode",
            "detectron2.config.config.CfgNode",
            "addict.addict.Dict",
            "munch.Munch",
            "ml_collections.config_dict.config_dict.ConfigDict",
            "lightning.fabric.utilities.data.AttributeDict",
            "lightning_fabric.utilities.data.AttributeDict",
            "pytorch_lightning.utilities.parsing.AttributeDict",
        )
    ),
    *(
        (Inert, name)
        for name in (
            *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
            *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
            *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
            *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list", "str", "tuple")),
            *(f"numpy.{kind}{bits}" for kind in ("float", "int", "uint") for bits in (8, 16, 32, 64)),
            *("numpy.bool", "numpy.bool_"),
            "decimal.Decimal",
            "typing.Any",
            "uuid.UUID",
            "torch.torch_version.TorchVersion",
            "omegaconf.base.ContainerMetadata",
            "omegaconf.base.Metadata",
            "omegaconf.dictconfig.DictConfig",
            "omegaconf.listconfig.ListConfig",
            *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "Path", "String")),
        )
    ),
]
"""Stand-ins for a class or function of that name: none of those of the file, or of NumPy, is called."""


def read_pickle(path: Path, data: bytes | None = None) -> Any:
    """Read what torch saved as `path`, or its content `data`, always with `weights_only=True`.

    Raises UserError that names what is in the way.
    """
    try:
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")  # on a pickle's protocol: what cannot be read is told here
            if data is not None:
                content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            # torch's older format cannot be mapped into memory, nor a file whose name is not UTF-8
            elif zipfile.is_zipfile(path) and not any("\ud800" <= letter <= "\udfff" for letter in str(path)):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:
                with path.open("rb") as file:
                    content = torch.load(file, map_location="cpu", weights_only=True)
            return without_attributes(content)
    except UNREADABLE as error:
        raise UserError(f"{path} {obstacle(path, error)}.") from error


def without_attributes(content: Any) -> Any:
    """Remove the attributes of all dictionaries in `content`: a file could replace a method by any value."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, OrderedDict):
            vars(value).clear()
        if isinstance(value, argparse.Namespace):
            waiting.append(vars(value))
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return content


def obstacle(path: Path, error: BaseException) -> str:
    """Say what keeps `path` from being read, as the rest of a sentence that begins with its name."""
    text = str(error)
    if "TorchScript" in text:
        return f"is a TorchScript program, not weights: {RESAVE}"
    if b"ctorch.nn.modules." in pickled(path):
        return f"cannot be read safely as weights, since it holds a whole pickled model: {RESAVE}"
    if found := re.search(r"GLOBAL (\S+)|instantiate unsafe class (\S+)", text):
        name = brief(next(filter(None, found.groups())))
        return f"cannot be read safely as weights, since it holds {name}, which is no plain value: {RESAVE}"
    if "Unsupported operand" in text or "Invalid magic number" in text:
        kind = "is damaged, or no file that torch.save writes by default"
        return f"cannot be read safely as weights, since it {kind}: copy it again, or {RESAVE}"
    unpickler = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    reason = unpickler[1] if unpickler else getattr(error, "strerror", None) or text.strip().partition("\n")[0]
    reason = brief(reason or type(error).__name__, 120).rstrip(".")
    return f"cannot be read safely as weights ({reason}): copy or download it again, or {RESAVE}"


def pickled(path: Path) -> bytes:
    """Return the pickle in `path`, or its beginning; empty where there is none."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return file.read(LARGEST_PICKLE)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return archive.open(names[0]).read(LARGEST_PICKLE) if names else b""
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        return b""
