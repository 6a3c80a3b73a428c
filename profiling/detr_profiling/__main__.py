"""`python -m detr_profiling COMMAND`: where time and memory go, and that the results did not move."""

import sys
from importlib import import_module

from detr_fast.command import run
from detr_fast.config import unknown_name

COMMANDS = {
    "trace": "TraceOptions",
    "parity": "ParityOptions",
    "ladder": "LadderOptions",
    "race": "RaceOptions",
    "tune": "TuneOptions",
    "launches": "LaunchesOptions",
    "report": "ReportOptions",
}
"""Each is a module here with a function `main` and this class of options."""

USAGE = """usage: python -m detr_profiling COMMAND [options], each with --help

  trace    one step in a profiler: stages, kernels, device synchronisations, memory, roofline
  parity   how far every block, loss, gradient, training curve and AP is from the plain reference
  ladder   from the plain reference to everything on, one technique a row
  race     ours compared with baselines, in turns
  tune     which backends and switches are fastest here, for every auto to read
  launches what a GPU would be told to do in a step, counted without one
  report   one HTML page and its Markdown twin from what the others left"""


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    name, *rest = argv
    if name not in COMMANDS:
        print(f"error: {unknown_name('command', name, COMMANDS)}\n\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    module = import_module(f"detr_profiling.{name}")
    run(module.main, getattr(module, COMMANDS[name]), argv=rest)


if __name__ == "__main__":
    main(sys.argv[1:])
