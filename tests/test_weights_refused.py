"""Weights that are damaged, hostile or of another kind: one sentence each, soon, and nothing else happens."""

import collections
import enum
import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from detr_fast import DETR, build_model, load_model, load_state_dict
from detr_fast.config import UserError
from detr_fast.data.annotations import Category
from detr_fast.weights import load_for_fine_tuning, read_state_dict
from detr_fast.weights.container import write_container
from detr_fast.weights.pickles import read_pickle
from tests.small_detr import OPTIMIZER, SMALL

PETS = [{"id": number, "name": name} for number, name in enumerate(("dog", "parrot", "cat"))]


pytestmark = pytest.mark.usefixtures("narrow")


def refused(path: Path, said: str, load: Any = load_model) -> None:
    """Expects one short sentence that begins with the file."""
    with pytest.raises(UserError, match=said) as raised:
        load(path)
    message = str(raised.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 500


def endless() -> list[Any]:
    """A list of 60 lists, each twice in the next: written out, it would fill any memory."""
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    return value


STATED: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "no heads": ({"num_heads": 0}, PETS, "num_heads must be at least 1"),
    "no width": ({"hidden_dim": 0}, PETS, "hidden_dim must be at least 1"),
    "fewer layers than none": ({"encoder_layers": -1}, PETS, "encoder_layers must not be negative"),
    "no spread": ({"image_std": (0.0, 1.0, 1.0)}, PETS, "image_std positive"),
    "no number": ({"image_mean": (float("nan"), 1.0, 1.0)}, PETS, "must be finite"),
    "an image beyond memory": ({"max_size": 1 << 40}, PETS, "max_size must be less"),
    "a longer number": ({"num_heads": 10**400}, PETS, "model_config holds a int"),
    "lists for a number": ({"num_heads": endless()}, PETS, "model_config holds a list"),
    "lists for an entry": ({}, [endless()], "categories holds a list"),
    "lists for a name": ({}, [{"id": 1, "name": endless()}], "categories holds a list"),
    "an infinite id": ({}, [{"id": float("inf"), "name": "a"}] * 3, "whole numbers, each once"),
    "half an id": ({}, [{"id": number + 0.7, "name": "a"} for number in range(3)], "whole numbers"),
    "a flag as id": ({}, [{"id": True, "name": "a"}, *PETS[1:]], "whole numbers"),
    "an id twice": ({}, [PETS[1], *PETS[1:]], "each once"),
}


BY_ENDING = [(kind, ending) for kind in STATED for ending in (".pth", ".safetensors")]
"""As json, what is endless would be as long as it says."""


@pytest.mark.parametrize(
    ("kind", "ending"), [one for one in BY_ENDING if one[1] == ".pth" or not one[0].startswith(("lists", "a longer"))]
)
def test_what_a_file_states_is_checked_before_it_is_used(
    kind: str, ending: str, model: DETR, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    change, categories, said = STATED[kind]
    path, config = tmp_path / f"stated{ending}", model.config.to_dict() | change
    if ending == ".pth":
        torch.save({"model": weights, "model_config": config, "categories": categories}, path)
    else:
        save_file(weights, path, {"model_config": json.dumps(config), "categories": json.dumps(categories)})
    refused(path, said)


def test_methods_are_not_what_a_file_says(model: DETR, weights: dict[str, Tensor], tmp_path: Path) -> None:
    inner = collections.OrderedDict(weights)
    outer: collections.OrderedDict[str, Any] = collections.OrderedDict(model=None, args=None)
    options = collections.OrderedDict(nheads=4)
    for each in (inner, outer, options):
        each.get = each.keys = each.values = 5  # type: ignore[method-assign, assignment]
    outer["model"], outer["args"] = inner, options
    torch.save([outer], tmp_path / "methods.pth")
    assert vars(read_pickle(tmp_path / "methods.pth")[0]["model"]) == {}
    torch.save(outer, tmp_path / "methods.pth")
    assert load_model(tmp_path / "methods.pth").config.num_heads == 4


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "inner", "gone.safetensors"])
def test_an_index_names_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for folder, shard in ((tmp_path, name), (tmp_path / "inner", "..")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    said = "no such file: copy" if name in ("inner", "gone.safetensors") else "must name files in the same folder"
    refused(tmp_path, said)


@pytest.mark.parametrize("bias", [torch.zeros(2), torch.tensor(0.0), torch.zeros(0)])
def test_a_class_head_whose_parts_differ_is_learned_anew(
    bias: Tensor, model: DETR, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    changed = weights | {"class_embed.bias": bias}
    torch.save({"model": changed, "model_config": model.config.to_dict(), "categories": PETS}, tmp_path / "cut.pth")
    own = build_model("detr_r50", num_classes=2, **SMALL)
    categories = (Category(1, "cat"), Category(2, "spoon"))
    assert load_for_fine_tuning(own, tmp_path / "cut.pth", categories).new == ["class_embed"]


def test_no_categories_are_none_at_all(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "any.pth")
    with pytest.raises(UserError, match="one for each class"):
        load_model(tmp_path / "any.pth", categories=[])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["class_embed.bias", "class_embed.weight", "backbone.0.body.bn1.running_var"])
def test_numbers_of_another_kind_are_no_weights(
    name: str, dtype: torch.dtype, model: DETR, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    changed = weights | {name: torch.ones_like(weights[name], dtype=dtype)}
    torch.save(changed, tmp_path / "other.pth")
    own = build_model("detr_r50", num_classes=2, **SMALL)
    uses = (
        lambda: load_model(tmp_path / "other.pth"),
        lambda: load_for_fine_tuning(own, tmp_path / "other.pth"),
        lambda: load_state_dict(own, changed),
    )
    for use in uses:
        with pytest.raises(UserError, match="complex or quantised"):
            use()


def test_repeated_numbers_are_read_as_far_as_a_model_has_them(weights: dict[str, Tensor], tmp_path: Path) -> None:
    name, path = "transformer.decoder.norm.weight", tmp_path / "expanded.pth"
    torch.save(weights | {name: torch.full((1,), 0.5).expand(32)}, path)
    assert torch.equal(load_model(path).network.transformer.decoder.norm.weight, torch.full((32,), 0.5))
    torch.save(weights | {name: torch.zeros(1).expand(10**12)}, path)
    refused(path, "is damaged: transformer.decoder.norm.weight has fewer numbers")


def test_shapes_are_said_however_long_a_name_is(model: DETR, weights: dict[str, Tensor]) -> None:
    name = "transformer.decoder.layers.0.multihead_attn.out_proj.weight"
    with pytest.raises(UserError, match=r"out_proj\.weight \(3, 4, 5, 6, 7, 8, 9\) instead of \(32, 32\)"):
        load_state_dict(model, weights | {name: torch.zeros(3, 4, 5, 6, 7, 8, 9)})


@pytest.mark.parametrize("kept", [9, 300, -100])
def test_a_cut_safetensors_file_is_to_be_copied_again(kept: int, weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "cut.safetensors")
    data = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:kept])
    refused(tmp_path / "cut.safetensors", "copy or download it again")


@pytest.mark.parametrize(("text", "said"), [("<html>", "is a web page"), ("404: not found", "is text")])
def test_a_mark_of_byte_order_hides_nothing(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text(text, encoding="utf-8-sig")
    refused(tmp_path / "page.pth", said)


class Colour(enum.Enum):
    RED = 1


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


NO_WEIGHTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a whole model": (lambda: saved(nn.Linear(2, 2)), "holds a whole pickled model: save the weights alone"),
    "one under a key": (lambda: saved({"model": nn.DataParallel(nn.Linear(2, 2))}), "holds a whole pickled model"),
    "one in the older format": (
        lambda: saved(nn.Linear(2, 2), _use_new_zipfile_serialization=False),
        "holds a whole pickled model",
    ),
    "a program": (scripted, "is a TorchScript program"),
    "someone's class": (lambda: saved({"model": {}, "x": Colour.RED}), r"holds [\w.]*Colour, which is no plain value"),
    "a function": (lambda: saved({"model": {}, "x": print}), "holds print, which is no plain value"),
    "a list": (lambda: saved([1]), "holds a list, not a state dict"),
    "an optimizer": (lambda: saved(OPTIMIZER), "only an optimizer's state"),
    "an empty dictionary": (lambda: saved({}), "it is an empty dictionary"),
    "numbers": (lambda: saved({"epoch": 3, "model": {}}), r"its keys are 'epoch' \(int\), 'model' \(dict\)"),
    "adapters": (lambda: saved({"a.lora_A.weight": torch.zeros(2)}), "holds LoRA adapters"),
    "integers": (lambda: saved({"a.weight": torch.zeros(2, dtype=torch.int8)}), r"quantised \(a.weight is int8\)"),
    "a shape without numbers": (lambda: saved({"a": torch.zeros(1).expand(10**12)}), "is damaged: a has fewer"),
    "another pickle": (lambda: pickle.dumps({"a": 1}), "no file that torch.save writes by default"),
    "a newer pickle": (lambda: saved({"a": 1}, pickle_protocol=4), "no file that torch.save writes by default"),
    "a pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run git lfs pull"),
    "a page": (lambda: b"\n<!DOCTYPE html><html>", "is a web page"),
    "json": (lambda: b'{"weight_map": {}}', "is json text"),
    "text": (lambda: b"404: not found", "is text, not weights"),
    "nothing": (lambda: b"", "is empty"),
    "compressed": (lambda: gzip.compress(b"a" * 99), "is a compressed archive"),
    "zipped": (lambda: zipped(weights=b"a"), "is a zip archive"),
    "a cut file": (lambda: saved({"a": torch.zeros(99)})[:-200], "copy or download it again"),
    "names with colours": (lambda: saved({"\x1b[31m" + "w" * 999: torch.zeros(2)}), r"names are w{57}\.\.\.;"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_weights_is_said_in_one_sentence(kind: str, ending: str, tmp_path: Path) -> None:
    make, said = NO_WEIGHTS[kind]
    path = tmp_path / f"file{ending}"
    path.write_bytes(make())
    nothing: Any = None  # it is refused before a model is looked at
    for use in (load_model, partial(load_for_fine_tuning, nothing)):
        with pytest.raises(UserError, match=said) as refused:
            use(path)
        message = str(refused.value)
        assert message.startswith(str(path)) and message.endswith(".")
        assert "\n" not in message and "\x1b" not in message and len(message) < 500


class CreatesFile:
    """Unpickled without restraint, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "older torch", "pickle", "checkpoint"])
def test_hostile_pickle_is_refused_and_not_run(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, created = tmp_path / "hostile.pth", tmp_path / "created"
    content = {"model": {"weight": torch.zeros(2)}, "args": CreatesFile(created)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    elif form == "checkpoint":
        write_container(path, content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError, match=r"hostile\.pth cannot be read safely"):
        read_state_dict(path)
    assert not created.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert created.exists()  # so it was hostile


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pth", b""),
        ("html.pth", b"<html>404 Not Found</html>"),
        ("cut.pth", b"PK\x03\x04 and no more"),
        ("list.pth", pickle.dumps([1, 2], protocol=2)),
        ("zeros.pt", bytes(500)),
        ("empty.safetensors", b""),
        ("long.safetensors", b"\xff" * 100),
        ("notes.txt", b"weights?"),
    ],
)
def test_unreadable_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("content", [{"model": {}}, {"model": {"a": 1}}, {"model": [1]}, torch.zeros(2)])
def test_no_state_dict(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth"):
        read_state_dict(tmp_path / "other.pth")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_model(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_model(tmp_path)


def test_something_else_is_no_detr(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "classifier.pth")
    with pytest.raises(UserError, match=r"classifier\.pth does not look like a DETR"):
        load_model(tmp_path / "classifier.pth")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_dim": 2**20}, "contradicts itself"),  # found before anything of that size is allocated
        ({"backbone": "resnet0"}, "no model that can be built"),
        ({"num_heads": "many"}, "no model that can be built"),
        ({"hidden_dimension": 256}, "hidden_dim"),
        (7, "no model that can be built"),
    ],
)
def test_hostile_model_config(config: Any, message: str, model: DETR, tmp_path: Path) -> None:
    path = tmp_path / "strange.pth"
    stated = {**model.config.to_dict(), **config} if isinstance(config, dict) else config
    torch.save({"model": model.state_dict(), "model_config": stated}, path)
    with pytest.raises(UserError, match=rf"strange\.pth.*{message}"):
        load_model(path)
