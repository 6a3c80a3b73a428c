"""Weights as people have them: under any key, behind wrappers, beside other values, without heads."""

import argparse
import collections
import datetime
import json
import os
import pathlib
import pickle
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from detr_fast import DETR, Detector, build_model, export_state_dict, load_model, load_state_dict
from detr_fast.config import UserError
from detr_fast.data.annotations import Category
from detr_fast.weights import Naming, load_backbone_weights, load_for_fine_tuning
from detr_fast.weights.pickles import STAND_INS, NumpyArray, NumpyDtype, numpy_scalar, read_pickle
from detr_fast.weights.wrappings import DEEPEST, state_dicts
from tests.small_detr import OPTIMIZER, SMALL, Weights

PETS = (Category(0, "dog"), Category(1, "parrot"), Category(2, "cat"))


OWN = (Category(1, "dog"), Category(2, "spoon"))


pytestmark = pytest.mark.usefixtures("narrow")


def assert_same_weights(model: DETR | Detector, other: DETR | Detector) -> None:
    networks = (each.network if isinstance(each, Detector) else each for each in (model, other))
    expected, found = (network.state_dict() for network in networks)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def own_model(**changes: Any) -> DETR:
    return build_model("detr_r50", num_classes=2, **SMALL | changes)


def before(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: value for key, value in weights.items()}


def other(weights: Weights) -> Weights:
    return {key: value + 1 for key, value in weights.items()}


KEPT_AS: dict[str, Callable[[Weights], Any]] = {
    "under a key of one's own": lambda w: {"epoch": 3, "detector": {"weights": w}, "optimizer": OPTIMIZER},
    "RT-DETR's EMA": lambda w: {"ema": {"module": w, "updates": 5}, "model": other(w)},
    "EMA before the model": lambda w: {"model_ema": w, "model": other(w)},
    "no EMA": lambda w: {"model": w, "ema": None},
    "an EMA of a part": lambda w: {"model": w, "ema": dict(list(other(w).items())[:9])},
    "torch's AveragedModel": lambda w: {"n_averaged": torch.tensor(3), **before("module.", w)},
    "DDP of a compiled model": lambda w: {"model": before("module._orig_mod.", w)},
    "a compiled DDP": lambda w: {"model": before("_orig_mod.module.", w)},
    "a compiled backbone": lambda w: {key.replace("backbone.", "backbone._orig_mod.", 1): w[key] for key in w},
    "Lightning with the loss": lambda w: {
        "state_dict": before("model.", w | {"criterion.a": torch.ones(4)}) | {"criterion.b": torch.ones(4)}
    },
    "a larger teacher": lambda w: {"teacher": other(w) | {"a": torch.zeros(1)}, "model": w},
    "inside two modules": lambda w: before("net.detr.", w),
    "student and EMA in one": lambda w: before("student.", other(w)) | before("ema.", w),
    "EMA by a name with capitals": lambda w: {"modelEMA": w, "model": other(w)},
    "no EMA by its letters": lambda w: {"swap": other(w), "average_grad": other(w), "model": w},
    "an EMA of parameters alone in one": lambda w: {
        **before("model.", w),
        **{f"ema.{name}": value + 1 for name, value in w.items() if "running" not in name},
    },
    "EMA beside more of the loss": lambda w: {
        **before("ema.", w),
        **before("net.", other(w) | {"criterion.a": torch.ones(4)}),
    },
    "moments before them": lambda w: {"exp_avg": other(w), "best": {"momentum": other(w), "weights": w}},
    "another network in one": lambda w: before("d.", other(w)) | before("model.", w),
    "gradients in one": lambda w: before("grad.", other(w)) | before("weights.", w),
    "little under a usual key": lambda w: {"net": {"scale": torch.ones(1)}, "weights": w},
    "NumPy arrays": lambda w: {"model": {key: value.numpy() for key, value in w.items()}},
}

AVERAGED = ("RT-DETR's EMA", "EMA before the model", "EMA by a name with capitals")
"""Those whose weights are another dictionary than the model's, which is said."""


@pytest.mark.parametrize("naming", ["facebook", "huggingface"])
@pytest.mark.parametrize("kept_as", KEPT_AS)
def test_weights_are_found_wherever_they_are_kept(kept_as: str, naming: Naming, model: DETR, tmp_path: Path) -> None:
    content = KEPT_AS[kept_as](export_state_dict(model, naming))
    torch.save(content, tmp_path / "last.ckpt")
    loaded = load_model(tmp_path / "last.ckpt")
    assert_same_weights(model, loaded)
    assert ("averaged" in " ".join(loaded.notes)) == (kept_as in AVERAGED)
    into = build_model("detr_r50", num_classes=3, **SMALL)
    if kept_as != "NumPy arrays":
        load_state_dict(into, content)
        assert_same_weights(model, into)
    load_for_fine_tuning(into, tmp_path / "last.ckpt")


def test_a_choice_that_nothing_says_is_told(model: DETR, weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "two.pth"
    torch.save({"detector": weights, "epoch": 3, "best": {"detector": other(weights)}}, path)
    loaded = load_model(path)
    assert_same_weights(model, loaded)
    said = f"{path}: the weights under detector are read, not those of the same names under best.detector"
    assert said in loaded.notes and said in load_for_fine_tuning(own_model(), path).notes
    torch.save({"teacher": other(weights), "student": weights}, path)
    assert not any("are read" in note for note in load_model(path).notes)


def test_names_that_would_become_one_are_kept_apart(weights: Weights) -> None:
    twice = weights | {"module.class_embed.weight": weights["class_embed.weight"] + 1}
    with pytest.raises(UserError, match=r"unexpected: module\.class_embed\.weight"):
        load_state_dict(build_model("detr_r50", num_classes=3, **SMALL), twice)


def test_dictionaries_are_followed_to_a_depth() -> None:
    """Each has the keys that lead to it: a chain of them in a small file would fill the memory."""
    chain: dict[str, Any] = {}
    for _ in range(50):
        chain = {"a": chain, "weight": torch.zeros(1)}
    assert [len(found.keys) for found in state_dicts(chain)] == list(range(DEEPEST + 1))


@pytest.mark.parametrize("ending", [".pth.tar", ".bin", ".safetensors", ""])
@pytest.mark.parametrize("written_by", ["torch", "safetensors"])
def test_the_content_says_how_a_file_is_read(
    written_by: str, ending: str, model: DETR, weights: Weights, tmp_path: Path
) -> None:
    path = tmp_path / f"weights{ending}"
    wrapped = before("module.", weights)
    torch.save(wrapped, path) if written_by == "torch" else save_file(wrapped, path)
    assert_same_weights(model, load_model(path))


def test_a_name_in_other_bytes_is_a_name(model: DETR, weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.pth")
    with path.open("wb") as file:
        torch.save(weights, file)
    assert_same_weights(model, load_model(path))


def test_a_header_as_long_as_any_text_is_no_text(tmp_path: Path) -> None:
    """The length of the header stands first, and its lowest byte may be that of any character."""
    for note in range(64):
        save_file({"a.weight": torch.zeros(1)}, tmp_path / "any.safetensors", {"note": "x" * 8 * note})
        with pytest.raises(UserError, match="does not look like a DETR"):
            load_model(tmp_path / "any.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded(dtype: torch.dtype, weights: Weights, tmp_path: Path) -> None:
    torch.save({key: value.to(dtype) for key, value in weights.items()}, tmp_path / "half.pth")
    loaded = load_model(tmp_path / "half.pth").network.input_proj.weight
    assert loaded.dtype == torch.float32 and torch.equal(loaded, weights["input_proj.weight"].to(dtype).float())


def test_a_backbone_is_found_in_what_holds_one(model: DETR, weights: Weights, tmp_path: Path) -> None:
    classifier = {**model.backbone.state_dict(), "fc.weight": torch.zeros(3)}
    contents = (
        {"state_dict": before("module.", classifier)},
        before("encoder.", classifier) | {"layer1.0.conv1.weight": torch.zeros(2)},
        {"model": before("module.", weights)},
    )
    for content in contents:
        torch.save(content, tmp_path / "backbone.ckpt")
        into = build_model("detr_r50", **SMALL)
        load_backbone_weights(into.backbone, "resnet50", str(tmp_path / "backbone.ckpt"))
        assert all(
            torch.equal(a, b) for a, b in zip(into.backbone.state_dict().values(), classifier.values(), strict=False)
        )


def of_module(monkeypatch: pytest.MonkeyPatch, name: str, base: type = dict) -> Any:
    """A value of a class as a library defines it that is not installed here."""
    module_name, _, class_name = name.rpartition(".")
    module = types.ModuleType(module_name)
    made = type(class_name, (base,), {"__module__": module_name})
    setattr(module, class_name, made)
    parts = module_name.split(".")
    for count in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
    monkeypatch.setitem(sys.modules, module_name, module)
    return made


PLAIN = {
    "number": np.float64(0.3),
    "flag": np.bool_(True),
    "name": np.str_("best"),
    "day": np.datetime64("2026-01-01"),
    "objects": np.array([1, "a", None], dtype=object),
    "big-endian": np.arange(3, dtype=">i4"),
    "random state": np.random.RandomState(0).get_state(),
    "number's type": np.float32,
    "path": pathlib.Path("runs/best"),
    "time": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    "lists": collections.defaultdict(list, a=[1]),
    "counts": collections.Counter("abc"),
    "last": collections.deque([1, 2], 5),
    "bytes": b"",
    "no numbers": np.array([]),
    "no rows": np.zeros((0, 3)),
    "no text": np.array([], dtype="U1"),
    "options": types.SimpleNamespace(lr=argparse.Namespace(a=1)),
}


@pytest.mark.parametrize("form", ["torch", "older torch", "numpy 1"])
def test_plain_values_beside_the_weights_do_not_matter(
    form: str, model: DETR, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    easy = of_module(monkeypatch, "easydict.EasyDict")(a=1)
    easy.a = 1  # state, as well as an entry
    node = of_module(monkeypatch, "omegaconf.dictconfig.DictConfig", object)()
    node.content = {"a": PLAIN["number"]}
    path = tmp_path / "best.pth"
    content = {"model": weights, **PLAIN, "easy": easy, "node": node}
    torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    if form == "numpy 1":
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert_same_weights(model, load_model(path))


def test_numpy_values_are_what_they_were(tmp_path: Path) -> None:
    arrays = [np.arange(6, dtype=">f4").reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.ones((), "?")]
    arrays += [np.array([]), np.zeros((0, 3), "i2")]
    numbers = [np.float32(0.5), np.int64(-3), np.complex64(1j), np.bool_(True)]
    torch.save([arrays, numbers], tmp_path / "values.pth")
    found_arrays, found_numbers = read_pickle(tmp_path / "values.pth")
    assert all(np.array_equal(found.values, array) for found, array in zip(found_arrays, arrays, strict=True))
    assert found_numbers == [0.5, -3, 1j, True] and type(found_numbers[0]) is float


def test_only_what_is_ours_is_called() -> None:
    """Whatever a file asks for by an allowed name, no code of NumPy or of another library makes it."""
    assert {made.__module__ for made, _ in STAND_INS} == {"argparse", "detr_fast.weights.pickles"}


@pytest.mark.parametrize(("dtype", "data"), [(argparse.Namespace(dtype=np.dtype("U2")), b"ABCD" * 2), ("f4", "text")])
def test_numpy_values_of_other_parts_are_no_numbers(dtype: Any, data: Any) -> None:
    """Whatever has an attribute `dtype`, a file can make: text, records and objects would come of it."""
    made = NumpyDtype(dtype) if isinstance(dtype, str) else dtype
    for make in (partial(numpy_scalar, made, data), partial(NumpyArray().__setstate__, (1, (2,), made, False, data))):
        with pytest.raises(pickle.UnpicklingError, match=r"a NumPy value has a (Namespace|str) as its"):
            make()


def test_dictionaries_within_dictionaries_are_looked_at_once(weights: Weights) -> None:
    inner: dict[str, Any] = dict(weights)
    for _ in range(4):
        inner = {str(number): inner for number in range(300)}
    with pytest.raises(UserError, match="do not fit"):
        load_state_dict(build_model("detr_tiny"), inner)


def without(weights: Weights, *heads: str) -> Weights:
    return {key: value for key, value in weights.items() if not key.startswith(heads)}


HEADLESS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "class_embed": (lambda w: without(w, "class_embed"), "0 of 2 classes; new: class_embed"),
    "its bias": (lambda w: without(w, "class_embed.bias"), "new: class_embed"),
    "its name": (
        lambda w: without(w, "class_embed") | {"head.weight": w["class_embed.weight"]},
        "new: class_embed, the rest is kept; left out: head.weight",
    ),
    "its width": (lambda w: w | {"class_embed.weight": torch.zeros(4, 64)}, "new: class_embed"),
    "bbox_embed": (lambda w: without(w, "bbox_embed"), "1 of 2 classes; new: bbox_embed"),
    "a layer of it": (lambda w: without(w, "bbox_embed.layers.1."), "new: bbox_embed"),
    "query_embed": (lambda w: without(w, "query_embed"), "new: query_embed"),
    "all": (lambda w: without(w, "class", "bbox", "query"), "new: class_embed, query_embed, bbox_embed"),
}


@pytest.mark.parametrize("lost", HEADLESS)
def test_training_begins_without_a_head_and_says_so(lost: str, weights: Weights, tmp_path: Path) -> None:
    change, said = HEADLESS[lost]
    path = tmp_path / "headless.pth"
    # what the source calls its classes, so that dog's row is kept
    torch.save({"model": change(weights), "model_config": None, "categories": list(map(vars, PETS))}, path)
    own = own_model()
    fresh = {key: value.clone() for key, value in own.state_dict().items()}
    kept = load_for_fine_tuning(own, path, OWN)
    assert said in kept.lines("headless.pth", 2)[0]
    for key, value in own.state_dict().items():
        head = key.partition(".")[0]
        if head in kept.new:
            assert torch.equal(value, fresh[key]), key
        elif head != "class_embed":
            assert torch.equal(value, weights[key.replace("backbone.", "backbone.0.body.")]), key
    if lost != "its width":  # which is a whole file, of another kind
        with pytest.raises(UserError, match=r"lacks DETR's .* only be trained from"):
            load_model(path)


@pytest.mark.parametrize(("own_queries", "said"), [(8, "3 of 8 queries"), (2, "0 of 2 queries")])
def test_queries_are_kept_as_many_as_both_have(own_queries: int, said: str, weights: Weights, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "five.pth")
    own = own_model(num_queries=own_queries)
    fresh = own.query_embed.weight.clone()
    kept = load_for_fine_tuning(own, tmp_path / "five.pth")
    assert f"{said} (the file has 5, as --num-queries)" in kept.lines("five.pth", 2)[0]
    rows = min(own_queries, 5)
    assert torch.equal(own.query_embed.weight[:rows], weights["query_embed.weight"][:rows])
    assert torch.equal(own.query_embed.weight[rows:], fresh[rows:])


@pytest.mark.parametrize("stated_in", ["our configuration", "options", "config.json"])
def test_training_begins_with_what_the_weights_were_made_for(
    stated_in: str, model: DETR, weights: Weights, tmp_path: Path
) -> None:
    """Neither attention heads nor DC5 are seen in shapes; the first make weights useless, the second does not."""

    def written(num_heads: int, dilation: bool) -> Path:
        if stated_in == "config.json":
            save_file(export_state_dict(model, "huggingface"), tmp_path / "model.safetensors")
            config = {"model_type": "detr", "encoder_attention_heads": num_heads, "dilation": dilation}
            (tmp_path / "config.json").write_text(json.dumps(config))
            return tmp_path
        stated = {"num_heads": num_heads, "nheads": num_heads, "dilation": dilation}
        ours = stated_in == "our configuration"
        torch.save({"model": weights, "model_config" if ours else "args": stated}, tmp_path / "stated.pth")
        return tmp_path / "stated.pth"

    with pytest.raises(UserError, match=r"num_heads=4, and the model of 8.*num_heads=4\)"):
        load_for_fine_tuning(own_model(), written(4, False))
    assert not load_for_fine_tuning(own_model(num_heads=4, dilation=True), written(4, True)).notes
    noted = load_for_fine_tuning(own_model(), written(8, True)).notes
    assert len(noted) == 1 and "has dilation=True, here it is False" in noted[0]


def test_no_one_is_told_to_build_no_layers(model: DETR, weights: Weights) -> None:
    for names in (before("layers.", {"a": torch.zeros(1)}), without(weights, "transformer.decoder")):
        with pytest.raises(UserError) as raised:
            load_state_dict(build_model("detr_r50", num_classes=3, **SMALL), names)
        assert "layers=0" not in str(raised.value) and "layers 0" not in str(raised.value)
    with pytest.raises(UserError, match="--encoder-layers 1"):
        load_state_dict(build_model("detr_r50", num_classes=3, **SMALL | {"encoder_layers": 2}), weights)
