"""`detr-fast COMMAND` and `python -m detr_fast COMMAND`: every command, each with a line on what it is for."""

import sys

from detr_fast.command import Command, as_typed, dispatch

COMMANDS = {
    "train": Command("detr_fast.train", "TrainOptions", "train a detector, and evaluate it as it learns"),
    "evaluate": Command("detr_fast.evaluate", "EvaluateOptions", "COCO's metrics of a detector on a data set"),
    "predict": Command("detr_fast.predict", "PredictOptions", "find objects in photographs, and draw them"),
    "export": Command("detr_fast.export", "ExportOptions", "write weights under another implementation's names"),
    "check-data": Command("detr_fast.check_data", "CheckDataOptions", "list what is wrong with a data set"),
    "doctor": Command("detr_fast.doctor", "DoctorOptions", "show what this machine has, and what is missing"),
    "profile": Command("detr_profiling.__main__", None, "measure speed, memory and parity: trace, ladder, report, ..."),
}


def main() -> None:
    dispatch(COMMANDS, sys.argv[1:], as_typed())


if __name__ == "__main__":
    main()
