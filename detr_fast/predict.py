"""`python -m detr_fast.predict`: objects in photographs, as json and as pictures with boxes."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from detr_fast.command import run
from detr_fast.config import PredictConfig, UserError, require
from detr_fast.evaluation.pictures import Picture, draw_detections
from detr_fast.evaluation.prediction import Detections, predict_batch, prediction_batches, read_pixels
from detr_fast.runtime import runtime_for_inference
from detr_fast.weights import load_model

SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
"""What is taken for an image in a folder, whatever the case; a file given by itself may have any."""


def main(options: PredictConfig) -> int:
    """An image that cannot be read is named, and makes the exit code 2; the others are done all the same."""
    require(options.batch_size >= 1, f"--batch-size must be at least 1, got {options.batch_size}.")
    files = find_images(Path(options.images))
    out = Path(options.out)
    pictures = out / "pictures"
    require(
        all(file.resolve().parent != pictures.resolve() for file in files),
        f"--out {out}: pictures would be written among the images that are read. Give another folder.",
    )
    model = load_model(options.weights, categories=options.categories)
    for note in model.notes:
        print(note)
    runtime = runtime_for_inference(options, model, options.batch_size)
    model = runtime.place_for_inference(model)
    bad: dict[Path, str] = {}
    entries: list[dict[str, Any]] = []
    by_shape = prediction_batches(model, files, options.batch_size)
    for batch in read_batches([[files[index] for index in batch] for batch in by_shape], bad):
        found = predict_batch(model, [pixels for _, pixels in batch], options.threshold, runtime)
        for (file, pixels), detections in zip(batch, found, strict=True):
            entries.append(entry(file, pixels, detections))
            draw(file, pixels, detections, pictures / f"{file.name}.png", options.threshold)
    entries.sort(key=lambda one: one["file_name"])
    write_json(entries, out / "predictions.json")
    objects = sum(len(one["detections"]) for one in entries)
    print(f"{objects} objects on {len(entries)} images: predictions.json and pictures/ are in {out}")
    for file in sorted(bad):
        print(f"error: {bad[file]}", file=sys.stderr)
    return 2 if bad else 0


def find_images(path: Path) -> list[Path]:
    """The file, or the images of a folder by name, without those of its subfolders. Raises UserError if there is
    none."""
    if not path.is_dir():
        require(path.exists(), f"{path}: there is no such file or folder.")
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    require(len(files) > 0, f"{path}: no images in this folder ({', '.join(sorted(SUFFIXES))}).")
    return files


def read_batches(batches: Iterable[list[Path]], bad: dict[Path, str]) -> Iterator[list[tuple[Path, Tensor]]]:
    """Yield each batch's files with their pixels uint8 (3, h, w); the messages of those that cannot be read go to
    `bad`."""
    for files in batches:
        batch = []
        for file in files:
            try:
                batch.append((file, read_pixels(file)))
            except UserError as error:
                bad[file] = str(error)
        if batch:
            yield batch


def entry(file: Path, pixels: Tensor, detections: Detections) -> dict[str, Any]:
    """What predictions.json says of an image."""
    height, width = pixels.shape[1:]
    return {"file_name": file.name, "width": width, "height": height, **detections.to_dict()}


def draw(file: Path, pixels: Tensor, detections: Detections, path: Path, threshold: float) -> None:
    picture = Picture(
        image=pixels.permute(1, 2, 0).numpy(),
        title=file.name,
        boxes=detections.boxes_xyxy_px.numpy(),
        names=detections.names,
        scores=detections.scores.tolist(),
    )
    draw_detections([picture], path, note=f"score at least {threshold}")


def write_json(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}.") from error


if __name__ == "__main__":
    run(main, PredictConfig)
