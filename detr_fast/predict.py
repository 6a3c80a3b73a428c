"""`python -m detr_fast.predict`: objects in photographs, as json and as pictures with boxes."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from detr_fast.command import run
from detr_fast.config import UserError, require
from detr_fast.data.annotations import Category
from detr_fast.data.photographs import find_images
from detr_fast.evaluation.fonts import class_names
from detr_fast.evaluation.pictures import Picture, draw_detections
from detr_fast.evaluation.predictions_file import PredictionsFile
from detr_fast.files import require_writable
from detr_fast.options import PredictOptions
from detr_fast.prediction import Detections, prediction_batches, read_pixels
from detr_fast.runtime import runtime_for_inference
from detr_fast.weights import read_detector
from detr_fast.weights.pickles import listed


def main(options: PredictOptions) -> int:
    """Find objects on every image; return the exit code, 2 where an image could not be read or drawn."""
    require(options.batch_size >= 1, f"--batch-size must be at least 1, got {options.batch_size}.")
    files, passed_over = find_images(Path(options.images))
    out = Path(options.output)
    pictures = out / "pictures"
    require(
        all(file.resolve().parent != pictures.resolve() for file in files),
        f"--output {out}: pictures would be written among the images that are read. Give another folder.",
    )
    for line in passed_over:
        print(f"passed over: {line}", file=sys.stderr)
    detector = read_detector(options.weights, categories=options.categories)
    for note in detector.notes:
        print(note)
    require_writable("--output", out)
    detector.optimize(runtime_for_inference(options.runtime, detector.config, options.batch_size))
    threshold = detector.least_score(options.threshold)
    names, note = drawn_names(detector.categories or ()), f"score at least {threshold}"
    bad: set[Path] = set()
    by_shape = prediction_batches(detector.config, files, options.batch_size)
    with PredictionsFile(out / "predictions.json") as predictions:
        for batch in read_batches([[files[index] for index in batch] for batch in by_shape], bad):
            found = detector.predict_batch([pixels for _, pixels in batch], threshold)
            predictions.add([entry(*read, one) for read, one in zip(batch, found, strict=True)])
            for (file, pixels), detections in zip(batch, found, strict=True):
                with named(file, bad):
                    drawn = picture(file, pixels, detections, names)
                    draw_detections([drawn], pictures / f"{file.name}.png", note=note)
        predictions.finish()
    entries = predictions.entries
    objects = sum(len(one["detections"]) for one in entries)
    failed = f", {len(bad)} with an error" if bad else ""
    print(f"{objects} objects on {len(entries)} images{failed}: predictions.json and pictures/ are in {out}")
    if older := older_pictures(pictures, entries):
        print(f"older pictures, of images that are not among these, are left in {pictures}: {listed(older)}")
    return 2 if bad else 0


def older_pictures(pictures: Path, entries: Sequence[dict[str, Any]]) -> list[str]:
    """List the names of pictures of none of `entries`, which an earlier run left."""
    drawn = {f"{one['file_name']}.png" for one in entries}
    return sorted(file.name for file in pictures.glob("*.png") if file.name not in drawn)


def read_batches(batches: Iterable[list[Path]], bad: set[Path]) -> Iterator[list[tuple[Path, Tensor]]]:
    """Yield each batch's files with their pixels uint8 (3, h, w); print and add to `bad` those that cannot be read."""
    for files in batches:
        batch = []
        for file in files:
            with named(file, bad):
                batch.append((file, read_pixels(file)))
        if batch:
            yield batch


@contextmanager
def named(file: Path, bad: set[Path]) -> Iterator[None]:
    """Print a UserError on one image, add the file to `bad`, and go on."""
    try:
        yield
    except UserError as error:
        bad.add(file)
        print(f"error: {error}", file=sys.stderr)


def entry(file: Path, pixels: Tensor, detections: Detections) -> dict[str, Any]:
    """Make the entry of an image in predictions.json."""
    height, width = pixels.shape[1:]
    return {"file_name": file.name, "width": width, "height": height, **detections.to_dict()}


def drawn_names(categories: Sequence[Category]) -> list[str]:
    """Return what pictures call the classes, by label; nothing where the model does not know their names."""
    return list(class_names({category.id: category.name for category in categories}).values())


def picture(file: Path, pixels: Tensor, detections: Detections, names: list[str]) -> Picture:
    return Picture(
        image=pixels.permute(1, 2, 0).numpy(),
        title=file.name,
        boxes=detections.boxes_xyxy_px.numpy(),
        names=[names[label] for label in detections.labels.tolist()] if names else detections.names,
        scores=detections.scores.tolist(),
    )


if __name__ == "__main__":
    run(main, PredictOptions)
