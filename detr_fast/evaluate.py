"""`python -m detr_fast.evaluate`: COCO's numbers of a detector on a data set, as a table, json and pictures."""

from pathlib import Path

from rich.table import Column, Table

from detr_fast.command import run
from detr_fast.console import Console
from detr_fast.data.loader import evaluation_loader
from detr_fast.evaluation.coco_metrics import ABSENT, NOTHING_MEASURED, Evaluation, evaluate_detector
from detr_fast.evaluation.dataset import evaluation_dataset
from detr_fast.evaluation.referee import require_pycocotools, run_pycocotools
from detr_fast.evaluation.report import write_evaluation
from detr_fast.files import require_writable
from detr_fast.options import EvaluateOptions
from detr_fast.runtime import runtime_for_inference
from detr_fast.weights import read_detector


def main(options: EvaluateOptions) -> None:
    output = Path(options.output)
    if options.pycocotools:  # before minutes are spent on detections that it cannot evaluate
        require_pycocotools()
    detector = read_detector(options.weights, categories=options.categories)
    runtime = runtime_for_inference(options.runtime, detector.config, options.batch_size)
    detector.optimize(runtime)
    dataset = evaluation_dataset(detector, options)
    require_writable("--output", output)
    console = Console()
    for note in detector.notes:
        console.print(note)
    console.print(f"{options.weights} on {len(dataset)} images")
    for line in dataset.annotations.corrections.lines():
        console.print(f"{dataset.annotation_file}: {line}")
    for name, reason in runtime.reasons.items():
        console.print(f"{name:>18}  {reason}")
    workers = runtime.workers(options.dataset.workers)
    batches = evaluation_loader(dataset, options.batch_size, workers, runtime.device.type == "cuda")
    evaluation = evaluate_detector(detector, dataset, batches, run_pycocotools if options.pycocotools else None)
    for table in metric_tables(evaluation):
        console.print(table)
    write_evaluation(evaluation, dataset, output)
    console.print(f"evaluation.json and plots/ are in {options.output}")


def metric_tables(evaluation: Evaluation) -> list[Table]:
    """Lay out the twelve numbers with the best operating point, and AP by class."""
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
    run(main, EvaluateOptions)
