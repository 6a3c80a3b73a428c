"""The command line is a promise: every command's flags lie in flags.txt, where a change is seen in review.

`python tests/test_flags.py` writes the file anew.
"""

import argparse
import re
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import tyro
from detr_profiling import __main__ as profiling

FROZEN = Path(__file__).with_name("flags.txt")
COMMANDS = {
    "train": ("detr_fast.train", "TrainOptions"),
    "evaluate": ("detr_fast.evaluate", "EvaluateOptions"),
    "predict": ("detr_fast.predict", "PredictOptions"),
    "export": ("detr_fast.export", "ExportOptions"),
    "check-data": ("detr_fast.check_data", "CheckDataOptions"),
    "doctor": ("detr_fast.doctor", "DoctorOptions"),
    **{f"profile {name}": (f"detr_profiling.{name}", options) for name, options in profiling.COMMANDS.items()},
}
"""What a person types after detr-fast -> the module, and its class of options."""


def flags(options_type: type) -> Iterator[str]:
    """Yield a line for each: names, a default, what it takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # nothing else lists what tyro has understood
        parser = tyro.extras.get_parser(options_type, config=(tyro.conf.OmitArgPrefixes,))
    for action in parser._actions:
        if action.dest != "help":
            yield line(action)


def line(action: argparse.Action) -> str:
    names = " ".join(action.option_strings) or action.dest.upper()
    found = re.search(r"\((?:default: )?([^()]*)\)$", action.help or "")
    takes = f"  {action.metavar}" if action.metavar and action.nargs != 0 else ""
    return f"{names}{takes}  ({found[1] if found else ''})"


def listed() -> str:
    """Write the commands with their flags, sorted."""
    parts = [
        "\n".join([command, *(f"    {flag}" for flag in sorted(flags(getattr(import_module(module), name))))])
        for command, (module, name) in COMMANDS.items()
    ]
    return "\n\n".join(parts) + "\n"


def test_every_command_has_the_flags_that_are_promised() -> None:
    assert listed() == FROZEN.read_text(encoding="utf-8"), "if this is meant: python tests/test_flags.py"


if __name__ == "__main__":
    FROZEN.write_text(listed(), encoding="utf-8")
