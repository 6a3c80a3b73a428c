"""Judges before a run whether it will learn, by thresholds that were measured (docs/will_it_train.md)."""

import math
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np

from detr_fast.config import ModelConfig
from detr_fast.data.coco import CocoDataset
from detr_fast.data.drawn_objects import drawn_objects
from detr_fast.data.sampler import batches_per_epoch
from detr_fast.data.shapes import is_shapes
from detr_fast.model.backbone import token_stride
from detr_fast.options import OptimizerOptions, TrainOptions

Verdict = Literal["fine", "depends", "doubtful", "will not do"]


class Updates(NamedTuple):
    """Numbers of optimizer steps that tell apart what was seen to learn, and what was not."""

    least: int
    """Below, nothing useful was learned."""
    enough: int
    plenty: int
    """Objects of few tokens, and queries of few objects, are learned from here on."""


PROPOSING = Updates(200, 600, 100_000)
"""Queries that the encoder proposes, on a few hundred photographs."""
LEARNED = Updates(100_000, 300_000, 100_000)
"""Learned queries, on photographs."""
DRAWN = Updates(0, 3_000, 3_000)
"""Queries of any kind, on the embedded data set."""
FINE_TUNED = Updates(0, 0, 0)
LEAST_TOKENS, ENOUGH_TOKENS = 2.5, 4.0
"""Width of the median object."""
LEAST_OF_SMALL = 1.0
"""Width that nine of ten objects reach."""
FEW_OBJECTS = 25
QUERIES_FOR_ONE = 10
"""Learned queries for each object of the fullest image, from which on fewer are better."""
MOSTLY_EMPTY, NEARLY_EMPTY = 0.5, 0.9
SPARE = 1.1
"""Factor on the sizes that are named: of three, objects have another median width than of all that were drawn."""
LARGEST_PX = 1333
"""Longer side up to which larger images are advised: DETR's."""


@dataclass(frozen=True)
class Row:
    """Holds one line of the judgement."""

    what: str
    here: str
    verdict: Verdict = "fine"
    change: str = ""
    """Option and value, or what to do with the data; empty where it is fine."""


@dataclass(frozen=True)
class Length:
    """Says how long a run is."""

    images_an_update: int
    updates: int | None
    """None: as many as fit into --minutes."""

    @classmethod
    def of(cls, options: OptimizerOptions, images: int, processes: int, images_per_second: float = 0.0) -> Self:
        """Count the updates of `images` training images, with --minutes those at a pace, where one is stated."""
        images_an_update = options.batch_size * options.accumulate * processes
        an_epoch = batches_per_epoch(images, options.batch_size, processes)
        if options.minutes:
            return cls(images_an_update, round(60 * options.minutes * images_per_second / images_an_update) or None)
        return cls(images_an_update, options.epochs * an_epoch // options.accumulate)


def judge(options: TrainOptions, config: ModelConfig, train_set: CocoDataset, length: Length) -> list[Row]:
    """Return a row for each thing that a run needs in order to learn; none where there is no object to learn."""
    counts = np.array([len(record.labels) for record in train_set.records])
    if not counts.sum():
        return []
    enough = needed(options, config)
    settled = (length.updates or 0) >= enough.plenty
    return [
        judge_updates(options, len(train_set), length, enough),
        judge_width(options, config, train_set, settled),
        judge_queries(config, counts, settled),
        judge_classes(train_set),
        judge_empty(counts),
    ]


def warn(rows: list[Row]) -> None:
    """Warn, in a line each, of what will not do."""
    for row in rows:
        if row.verdict == "will not do":
            warnings.warn(f"This run is unlikely to learn. {row.what}: {row.here}. What to change: {row.change}.")


def needed(options: TrainOptions, config: ModelConfig) -> Updates:
    if options.network.weights:
        return FINE_TUNED
    if is_shapes(options.dataset.data):
        return DRAWN
    return PROPOSING if config.queries == "encoder" else LEARNED


ELSE = "--model detr_lite (queries that the encoder proposes, tokens of 16 pixels), or --weights of a trained detector"


def judge_updates(options: TrainOptions, images: int, length: Length, enough: Updates) -> Row:
    asked, updates, an_epoch = options.optimizer, length.updates, images / length.images_an_update
    if updates is None:
        here = f"as many as fit into {asked.minutes:g} minutes, {an_epoch:.0f} an epoch"
        pace = enough.enough * length.images_an_update / (60 * asked.minutes)
        takes = f"{here}; {enough.enough:,} take {pace:,.1f} images/s"
        return Row("updates", takes, "depends") if pace else Row("updates", here)
    here = f"{updates:,} of {length.images_an_update} images"
    if updates >= enough.enough:
        return Row("updates", here)
    verdict: Verdict = "will not do" if updates < enough.least else "doubtful"
    longer = updates and math.ceil((asked.minutes or asked.epochs) * enough.enough / updates)
    option = "minutes" if asked.minutes else "epochs"
    change = f"--{option} {longer} makes {enough.enough:,}" if longer else "lower --batch-size"
    here += f", {enough.enough:,} are enough"
    return Row("updates", here, verdict, f"{ELSE}; or {change}" if enough == LEARNED else change)


def judge_width(options: TrainOptions, config: ModelConfig, train_set: CocoDataset, settled: bool) -> Row:
    """Judge how many tokens an object is wide; in a `settled` run, one that is long enough, small ones are learned."""
    stride = token_stride(config)
    widths_px = np.sqrt(drawn_objects(train_set).sizes_px.prod(1))  # of a square of the box's area
    small, median = np.percentile(widths_px / stride, (10, 50)).tolist()
    here = f"{median:.1f} tokens of {stride} pixels (median; of the smallest tenth at most {small:.1f})"
    least, enough, of_small = (0, LEAST_OF_SMALL, 0) if settled else (LEAST_TOKENS, ENOUGH_TOKENS, LEAST_OF_SMALL)
    verdict: Verdict = "doubtful" if median < enough or small < of_small else "fine"
    if median <= least:
        verdict = "will not do"
    if verdict == "fine":
        return Row("width of an object", here)
    here += f"; {ENOUGH_TOKENS:g} are enough, of these {LEAST_OF_SMALL:g}"
    if config.queries == "learned" and not settled:
        return Row("width of an object", here, verdict, ELSE)
    change, left = "", max(ENOUGH_TOKENS / median, LEAST_OF_SMALL / small)
    if stride > 16 and config.queries == "encoder" and not (config.dilation or options.network.weights):
        change, left = "--token-stride 16", left * 16 / stride
    larger = larger_images(options, config, SPARE * left) if left > 1 else ""
    return Row("width of an object", here, verdict, " ".join(filter(None, (change, larger))))


def larger_images(options: TrainOptions, config: ModelConfig, factor: float) -> str:
    """Name training sizes `factor` times as large."""
    bound = options.dataset.max_size or config.max_size
    sizes = sorted({math.ceil(factor * size / 32) * 32 for size in options.augmentation.train_sizes})
    if factor * bound > LARGEST_PX:
        return "cut the images into tiles, in which objects are larger"
    shown = " ".join(str(size) for size in sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}))
    return f"--train-sizes {shown} --max-size {max(sizes[-1], math.ceil(factor * bound / 32) * 32)}"


def judge_queries(config: ModelConfig, counts: np.ndarray, settled: bool) -> Row:
    what, most = "objects an image", int(counts.max())
    here = f"{counts.mean():.1f}, at most {most}, for {config.num_queries} queries"
    if most > config.num_queries:
        return Row(what, here, "will not do", f"--num-queries {2 * most}")
    if config.queries == "learned" and config.num_queries > QUERIES_FOR_ONE * most and not settled:
        return Row(what, here, "doubtful", f"--num-queries {2 * most}: each then learns from more objects")
    return Row(what, here)


def judge_classes(train_set: CocoDataset) -> Row:
    labels = np.concatenate([record.labels for record in train_set.records])
    counts = np.bincount(labels, minlength=train_set.num_classes).tolist()
    rows = sorted((counts[label], id_) for id_, label in train_set.label_of.items())
    names = {one.id: one.name for one in train_set.annotations.categories}
    (least, rarest), (most, commonest) = rows[0], rows[-1]
    here = f"{least:,} ({names[rarest]!r:.40}) to {most:,} ({names[commonest]!r:.40}), {len(rows)} classes"
    none, few = sum(count == 0 for count, _ in rows), sum(0 < count < FEW_OBJECTS for count, _ in rows)
    found = [f"{none} have none"] * (none > 0) + [f"{few} have fewer than {FEW_OBJECTS}"] * (few > 0)
    if not found:
        return Row("objects a class", here)
    return Row("objects a class", f"{here}; {', '.join(found)}", "doubtful", "add images of them, or leave them out")


def judge_empty(counts: np.ndarray) -> Row:
    empty = int((counts == 0).sum())
    fraction = empty / len(counts)
    here = f"{empty:,} of {len(counts):,} ({fraction:.0%})"
    if fraction <= MOSTLY_EMPTY:
        return Row("images without objects", here)
    verdict: Verdict = "will not do" if fraction > NEARLY_EMPTY else "doubtful"
    keep = len(counts) - empty
    return Row("images without objects", here, verdict, f"leave out all but about {keep:,} of them")
