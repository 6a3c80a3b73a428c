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

from detr_fast import __main__ as detr_fast

FROZEN = Path(__file__).with_name("flags.txt")
ALL = detr_fast.COMMANDS | {f"profile {name}": command for name, command in profiling.COMMANDS.items()}
"""What a person types after detr-fast -> the command."""


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
        "\n".join([name, *(f"    {flag}" for flag in sorted(flags(getattr(import_module(one.module), one.options))))])
        for name, one in ALL.items()
        if one.options is not None
    ]
    return "\n\n".join(parts) + "\n"


def test_every_command_has_the_flags_that_are_promised() -> None:
    assert listed() == FROZEN.read_text(encoding="utf-8"), "if this is meant: python tests/test_flags.py"


if __name__ == "__main__":
    FROZEN.write_text(listed(), encoding="utf-8")
