"""`python -m detr_fast.evaluate`: COCO's numbers of a detector on a data set, as a table, json and pictures."""

from pathlib import Path

from rich.table import Column, Table

from detr_fast.command import run
from detr_fast.config import EvaluateConfig, UserError, require
from detr_fast.console import Console
from detr_fast.data.categories import UnknownCategories, spelling
from detr_fast.data.checks import warn_before_evaluation
from detr_fast.data.coco import CocoDataset, build_dataset
from detr_fast.data.loader import evaluation_loader
from detr_fast.evaluation.coco_metrics import ABSENT, NOTHING_MEASURED, Evaluation, evaluate_model
from detr_fast.evaluation.report import write_evaluation
from detr_fast.files import require_writable
from detr_fast.model.detr import DETR
from detr_fast.runtime import runtime_for_inference
from detr_fast.weights import load_model


def main(options: EvaluateConfig) -> None:
    output = Path(options.output)
    model = load_model(options.weights, categories=options.categories)
    runtime = runtime_for_inference(options, model, options.batch_size)
    model = runtime.place_for_inference(model)
    dataset = evaluation_dataset(model, options)
    require_writable("--output", output)
    console = Console()
    for note in model.notes:
        console.print(note)
    console.print(f"{options.weights} on {len(dataset)} images")
    for line in dataset.annotations.corrections.lines():
        console.print(f"{dataset.annotation_file}: {line}")
    for name, reason in runtime.reasons.items():
        console.print(f"{name:>18}  {reason}")
    workers = runtime.workers(options.workers)
    batches = evaluation_loader(dataset, options.batch_size, workers, runtime.device.type == "cuda")
    evaluation = evaluate_model(model, dataset, batches, runtime)
    for table in metric_tables(evaluation):
        console.print(table)
    write_evaluation(evaluation, dataset, output)
    console.print(f"evaluation.json and plots/ are in {options.output}")


def evaluation_dataset(model: DETR, options: EvaluateConfig) -> CocoDataset:
    """The split, labelled as the model's classes are. Raises UserError where the data has classes it does not know."""
    raw_ids = model.categories is None
    try:
        dataset = build_dataset(options, options.split, model.config, categories=model.categories, raw_ids=raw_ids)
    except UnknownCategories as error:
        raise UserError(f"{error} {ways_on(model, error)}") from error
    require(
        dataset.num_classes <= model.config.num_classes,
        f"{dataset.annotation_file} has category ids up to {dataset.num_classes - 1}, but {options.weights} has "
        f"{model.config.num_classes} classes and does not say which. Evaluate it on the data it was trained on, or "
        "name its classes with --categories FILE.json.",
    )
    warn_before_evaluation(dataset)
    return dataset


def ways_on(model: DETR, error: UnknownCategories) -> str:
    """Say what to do where the model has other classes than the data."""
    known = {spelling(category.name) for category in model.categories or ()}
    if all(spelling(one.name) in known for one in error.unknown):
        return f"The names agree: --categories {error.file} gives their ids."
    return " ".join([*model.notes, f"Weights that were trained on this data take --categories {error.file}."])


def metric_tables(evaluation: Evaluation) -> list[Table]:
    """The twelve numbers with the best operating point, and AP by class."""
    point = evaluation.operating_point
    numbers = Table("metric", Column("value", justify="right"), title="COCO metrics")
    for name, value in (evaluation.metrics | evaluation.unlimited).items():
        numbers.add_row(name, show(value))
    numbers.caption = (
        f"At IoU 0.50 and scores of at least {point.threshold:.3f}: precision {point.precision:.3f}, "
        f"recall {point.recall:.3f}, mean over the classes (best F1)."
        if evaluation.measured
        else NOTHING_MEASURED
    )
    figures = (Column(name, justify="right") for name in ("AP", "AP50"))
    classes = Table("class", *figures, title="Average precision by class")
    for name, values in evaluation.per_class.items():
        classes.add_row(name, show(values["AP"]), show(values["AP50"]))
    return [numbers, classes]


def show(value: float) -> str:
    return "–" if value == ABSENT else f"{value:.3f}"


if __name__ == "__main__":
    run(main, EvaluateConfig)
