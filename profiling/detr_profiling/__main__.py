"""`python -m detr_profiling COMMAND`: where time and memory go, and that the results did not move."""

import sys
from collections.abc import Sequence

from detr_fast.command import Command, as_typed, dispatch

COMMANDS = {
    "trace": Command(
        "detr_profiling.trace", "TraceOptions", "one step in a profiler: its ranges, kernels, waits, memory, roofline"
    ),
    "parity": Command(
        "detr_profiling.parity",
        "ParityOptions",
        "how far every block, loss, gradient, training curve and AP is from the plain reference",
    ),
    "ladder": Command(
        "detr_profiling.ladder",
        "LadderOptions",
        "from the plain reference to everything on, one technique a row",
    ),
    "race": Command("detr_profiling.race", "RaceOptions", "ours compared with baselines, in turns"),
    "accuracy": Command(
        "detr_profiling.accuracy",
        "AccuracyOptions",
        "accuracy against seconds of training, beside torchvision's Faster R-CNN",
    ),
    "tune": Command(
        "detr_profiling.tune",
        "TuneOptions",
        "which backends and switches are fastest here, for every auto to read",
    ),
    "launches": Command(
        "detr_profiling.launches",
        "LaunchesOptions",
        "what a GPU would be told to do in a step, counted without one",
    ),
    "report": Command(
        "detr_profiling.report", "ReportOptions", "one HTML page and its Markdown twin from what the others left"
    ),
}


def main(argv: Sequence[str], prog: str) -> None:
    dispatch(COMMANDS, argv, prog)


if __name__ == "__main__":
    main(sys.argv[1:], as_typed())
