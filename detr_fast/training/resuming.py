"""Resuming of a run: which options may change, which have to stay, and checks of both against the checkpoint."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detr_fast.config import ModelConfig, UserError, require
from detr_fast.data.annotations import Category
from detr_fast.data.categories import names
from detr_fast.data.coco import CocoDataset
from detr_fast.data.shapes import is_shapes
from detr_fast.options import TrainOptions
from detr_fast.paths import kind_of
from detr_fast.training.checkpoint import SplitDigest, TrainingState
from detr_fast.training.run_folder import RunFolder

TAKES_EFFECT = "take effect at once"
SAME_UPDATE = "may change as long as an update keeps its number of images"
SAME_CONTENT = "may lie elsewhere, with the same annotations"
FIXED = "are fixed: another value is refused"

ON_RESUMING: dict[str, tuple[str, ...]] = {
    TAKES_EFFECT: (
        *(
            "epochs",
            "minutes",
            "lr",
            "lr_backbone",
            "weight_decay",
            "clip",
            "schedule",
            "lr_drop",
            "warmup_steps",
            "scale_lr",
        ),
        *("ema", "dropout", "no_object_weight", "class_loss", "train_sizes", "crop_sizes", "crop_range"),
        *("min_visible", "color_jitter", "mosaic", "mixup", "copy_paste", "compose_epochs", "image_size", "max_size"),
        *(
            "device",
            "precision",
            "compile",
            "channels_last",
            "kernels",
            "attention",
            "tune",
            "capture",
            "host_allocator",
        ),
        *("checkpoint_activations", "workers", "on_bad_image", "follow_links", "data_only", "profile"),
        *("eval_every", "log_every", "save_every", "output", "resume"),
    ),
    SAME_UPDATE: ("batch_size", "accumulate", "effective_batch"),
    SAME_CONTENT: ("data", "train_images", "train_annotations", "val_images", "val_annotations"),
    FIXED: (
        *("recipe", "model", "num_classes", "num_queries", "encoder_layers", "decoder_layers", "source_position"),
        *(
            "feature_strides",
            "token_stride",
            "size_divisible",
            "token_norm",
            "fold_norms",
            "position_temperature",
            "queries",
            "query_positions",
        ),
        *("box_refinement", "layer_heads", "scores", "groups", "denoise"),
        *("weights", "backbone_weights", "seed", "buckets", "muon"),
    ),
}
"""Rules for the options of `train` on resuming: every option, once. README's table is made from it."""

PATHS = (*ON_RESUMING[SAME_CONTENT], "weights", "backbone_weights")
"""Options that name a file or a folder; stored as absolute paths, for a run may be resumed from elsewhere."""
WORDS = ("imagenet", "none")
"""Values of --backbone-weights that are no file."""


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def spelt(name: str, value: Any) -> str:
    """Write an option as it is given on the command line."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    words = value if isinstance(value, tuple) else (value,)
    return f"no {flag(name)}" if value is None else " ".join(map(str, (flag(name), *words)))


def options_table() -> str:
    """Write `ON_RESUMING` as a Markdown table."""
    rows = (f"| {rule} | {', '.join(f'`{flag(name)}`' for name in group)} |" for rule, group in ON_RESUMING.items())
    return "\n".join(("| on resuming | options |", "|---|---|", *rows))


def resumed_path(resume: str | None, output: str) -> Path | None:
    """Find the checkpoint to continue, also by its run's folder; None where none is asked for, or `auto` finds none."""
    if resume != "auto":
        path = Path(resume) if resume not in (None, "None") else None
        if path and kind_of(path) == "folder":
            return next((last for last in (RunFolder(path).last, path / "last.pt") if kind_of(last) == "file"), path)
        return path
    last = RunFolder(Path(output)).last
    return last if kind_of(last) != "nothing" else None


NEW_RUN = "For a new run leave --resume out, and give another --output."


def from_weights(path: Path) -> str:
    return f"{NEW_RUN} It may start from these weights: --weights {path}."


def load_resumed(path: Path | None) -> TrainingState | None:
    """Return the state in `path`, if one is given: as `resumed_options` has read it already, else read now.

    Raises UserError where a run cannot be continued from it.
    """
    if path is None:
        return None
    handed_over = _HANDED_OVER.pop(_file(path), None)
    return handed_over or TrainingState.load(path, from_weights(path))


def resumed_options(path: Path, data_asked: bool) -> TrainOptions:
    """Return the `stored_defaults` of `path`, and hand the rest over to `load_resumed`: a process reads it once.

    Raises UserError as `load_resumed` does.
    """
    state = TrainingState.load(path, from_weights(path))
    _HANDED_OVER.clear()
    _HANDED_OVER[_file(path)] = state
    return stored_defaults(state, path, data_asked)


_HANDED_OVER: dict[object, TrainingState] = {}
"""At most one, between a command's options and its run, by `_file`."""


def _file(path: Path) -> object:
    """Return a value that identifies the file at `path`, and changes when that is replaced."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def stored_defaults(state: TrainingState, path: Path, data_asked: bool) -> TrainOptions:
    """Return the defaults of all options on resuming from `path`: the run's own.

    Its output folder is the one that holds `path`, wherever that is now. `data_asked`: another --data replaces the
    stored run's folders and files, too.
    """
    options = state.options
    folder = path.absolute().parent.parent
    if path.absolute() == RunFolder(folder).last:
        options = options.but(output=str(folder) if path.is_absolute() else os.path.relpath(folder))
    options = options.but(batch_size=0, accumulate=0, effective_batch=0)  # so that others are asked for
    if data_asked:
        nowhere: dict[str, Any] = dict.fromkeys(ON_RESUMING[SAME_CONTENT][1:])
        options = options.but(**nowhere)
    return options


def located(options: TrainOptions) -> TrainOptions:
    """Return the options with absolute paths, which hold from any working directory."""
    values = options.to_dict()
    given = {name: value for name in PATHS if (value := values[name]) is not None}
    files = [name for name, value in given.items() if value not in WORDS and not is_shapes(value)]
    absolute: dict[str, Any] = {name: str(Path(given[name]).absolute()) for name in files}
    return options.but(**absolute)


def digest(dataset: CocoDataset) -> SplitDigest:
    """Digest ids and sizes of images, boxes, areas, crowds and classes; not names of files."""
    found = dataset.annotations
    sizes = np.array([(image.id, image.width, image.height) for image in found.images], dtype=np.int64)
    columns = (found.crowd, found.areas, *found.boxes_xywh_px.T, found.category_ids, found.image_ids)
    order = np.lexsort(columns)  # of the annotations in the file does not matter
    digested = hashlib.sha256(sizes.tobytes())
    for column in columns:
        digested.update(column[order].tobytes())
    return SplitDigest(len(found.images), len(found.ids), digested.hexdigest())


def digests(train_set: CocoDataset, val_set: CocoDataset) -> dict[str, SplitDigest]:
    """Digest both splits for the checkpoint."""
    return {name: digest(each) for name, each in (("train", train_set), ("val", val_set))}


def continued(options: TrainOptions, state: TrainingState, processes: int) -> TrainOptions:
    """Return the options with batches that make the stored run's updates, divided among `processes`.

    The batches are the run's own where nothing else is asked for; with another number of processes all together take
    the same images a batch, where they can be divided. Raises UserError where the images per update would change.
    """
    before, now = state.options.optimizer, options.optimizer
    batch = before.batch_size * state.processes
    update = batch * before.accumulate
    require(
        now.effective_batch in (0, before.effective_batch, update),
        f"The run to resume has {update} images an update, asked for is --effective-batch {now.effective_batch}. "
        f"Give --effective-batch {update}. {NEW_RUN}",
    )
    asked: dict[str, Any] = {name: value for name in ("batch_size", "accumulate") if (value := getattr(now, name))}
    if not asked and batch % processes == 0:
        each = batch // processes
        return options.but(batch_size=each, accumulate=before.accumulate, effective_batch=before.effective_batch)
    each, rest = divmod(update, processes * asked.get("batch_size", 1) * asked.get("accumulate", 1))
    words = " ".join(spelt(*one) for one in asked.items())
    require(
        rest == 0 and (each == 1 or len(asked) < 2),
        f"The run to resume has {update} images an update: {words or 'batches'} on {processes} processes cannot make "
        "them. Give numbers whose product divides it.",
    )
    return options.but(**({"batch_size": 0, "accumulate": 0} | asked), effective_batch=update)


def check_resumed(
    state: TrainingState, options: TrainOptions, config: ModelConfig, train_set: CocoDataset, val_set: CocoDataset
) -> None:
    """Raise UserError where the options would not continue the checkpoint's run but start another one."""
    for before, now in differing(state, options, config):
        raise UserError(f"{now} cannot be had on resuming: the run to resume has {before}. Keep to that. {NEW_RUN}")
    anew = (
        f"Give the run's data, wherever it lies now. {NEW_RUN} It may start from this one's weights, and keeps what "
        f"the classes share: --weights {resumed_path(options.resume, options.output)}."
    )
    check_classes(state.categories, train_set, anew)
    for split, dataset in (("train", train_set), ("val", val_set)):
        stored, found = state.data[split], digest(dataset)
        other = "others than the run's" if str(stored) == str(found) else f"the run's has {stored}"
        require(
            stored == found,
            f"{dataset.annotation_file}: the {split} split is not that of the run to resume: it has {found}, {other}. "
            f"{anew}",
        )


def differing(state: TrainingState, options: TrainOptions, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield fixed options that would change, as stored and as asked for; the model's values where it has them."""
    stored, wanted, stored_model = state.options.to_dict(), options.to_dict(), state.model_config.to_dict()
    for name in ON_RESUMING[FIXED]:
        before, now = stored[name], wanted[name]
        if name in ("weights", "backbone_weights") and before and now:  # not read any more: may lie elsewhere
            before, now = Path(before).name, Path(now).name
        if name in stored_model and before != now:
            before, now = stored_model[name], getattr(config, name)
        if before != now:
            yield spelt(name, before), spelt(name, now)
    for name in stored_model.keys() - stored.keys():
        if stored_model[name] != getattr(config, name):
            yield f"{name} {stored_model[name]}", f"--model {options.network.model} with {name} {getattr(config, name)}"


def check_classes(before: Sequence[Category] | None, train_set: CocoDataset, advice: str) -> None:
    """Raise UserError, with their names, where the data's classes are not the run's, each with its id."""
    stored = tuple(before or ())
    found = train_set.categories or ()
    gone, come = [each for each in stored if each not in found], [each for each in found if each not in stored]
    require(
        stored == found,
        f"{train_set.annotation_file}: its classes are not those of the run to resume. The run has "
        f"{names(gone or stored)} where the data has {names(come or found)}. {advice}",
    )


def changes(state: TrainingState, options: TrainOptions) -> str:
    """List the options that differ from the stored run's and take effect."""
    before, now = state.options.to_dict(), options.to_dict()
    told = (*ON_RESUMING[TAKES_EFFECT], "batch_size", "accumulate")
    other = [name for name in told if name not in ("output", "resume") and now[name] != before[name]]
    listed = ", ".join(f"{spelt(name, now[name])} (was {spelt(name, before[name])})" for name in other)
    return f"resumed after step {state.progress.step}, {listed or 'as it was'}"


def evaluates_otherwise(state: TrainingState, config: ModelConfig) -> bool:
    """Tell whether images are evaluated in another size than before: the best AP so far is then not comparable."""
    return any(getattr(state.model_config, name) != getattr(config, name) for name in ("image_size", "max_size"))
