"""Runs commands: options parsed from a dataclass, a user's error as one message and exit code 2."""

import io
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn, TypeVar

import tyro

from detr_fast.config import UserError, require, unknown_name
from detr_fast.console import legible
from detr_fast.option_groups import Options

Given = TypeVar("Given", bound=Options)

LEAST_COLUMNS = 40
"""Narrower, the layout of --help needs more memory than a machine has."""


@dataclass(frozen=True)
class Command:
    """Names a subcommand's module, which is imported when it runs: start-up and help are quick."""

    module: str
    """It has a function `main`, and a `default_options` where options that are not given depend on others."""
    options: str | None
    """The class of its options there; None: `main` takes the arguments that follow, and what was typed before them."""
    line: str
    """One line for the list of commands."""


def dispatch(commands: Mapping[str, Command], argv: Sequence[str], prog: str) -> None:
    """Run the command that `argv` begins with; list all of them where that is no command, and for --help."""
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {command.line}" for name, command in commands.items()]
    usage = "\n".join([f"usage: {prog} COMMAND [options], each with --help", "", *lines])
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        sys.exit(0 if argv else 2)
    name, *rest = argv
    if name not in commands:
        print(f"error: {unknown_name('command', name, commands)}\n\n{usage}", file=sys.stderr)
        sys.exit(2)
    command = commands[name]
    module = import_module(command.module)
    if command.options is None:
        module.main(rest, f"{prog} {name}")
    else:
        default = getattr(module, "default_options", None)
        run(module.main, getattr(module, command.options), default, rest, f"{prog} {name}")


def as_typed() -> str:
    """Return how this process was started: the console script's name, or python with its module."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else os.path.basename(sys.argv[0])


def run(
    main: Callable[[Given], int | None],
    options_type: type[Given],
    default: Callable[[Sequence[str]], Given] | None = None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> NoReturn:
    """Parse `argv` into `options_type` and exit with what `main` returns; by Ctrl-C or where its output is read no
    further, without a traceback and as a shell expects it.

    `default` gives, from the same arguments, the values of options that are not given; `prog` is what was typed before
    them, and stands in messages.
    """
    argv = list(in_one_spelling(sys.argv[1:] if argv is None else argv))
    if shutil.get_terminal_size().columns < LEAST_COLUMNS:
        os.environ["COLUMNS"] = str(LEAST_COLUMNS)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may have letters, or bytes, that no terminal here can show
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {legible(str(message))}\n"
    try:
        refuse_empty(argv)
        helping = not {"-h", "--help"}.isdisjoint(argv)
        code = main(parsed(options_type, argv, None if default is None or helping else default(argv), prog))
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {legible(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output, as `head` does, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain on leaving
        code = 128 + signal.SIGPIPE
    sys.exit(code or 0)


def parsed(
    options_type: type[Given], argv: Sequence[str], default: Given | None = None, prog: str | None = None
) -> Given:
    """Parse `argv`; what it does not give is as in `default`. Raises UserError for an option without effect."""
    options = tyro.cli(
        options_type,
        prog=prog or as_typed(),
        args=list(spelled_out(argv, options_type)),
        default=tyro.MISSING_NONPROP if default is None else default,
        config=(tyro.conf.OmitArgPrefixes,),  # a group's name is no part of its flags
    )
    refuse_idle(options, argv)
    return options


def in_one_spelling(argv: Sequence[str]) -> Iterator[str]:
    """Yield `argv` with hyphens in the names of options, and with the user's home for `~/`, which a shell leaves as it
    is behind `=`."""
    for word in argv:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        value = os.path.expanduser(value) if value.startswith("~/") else value
        yield name.replace("_", "-") + equals + value


def refuse_empty(argv: Sequence[str]) -> None:
    """Raise UserError for a value of no letters, as an unset variable of a shell leaves it."""
    for before, word in zip(("", *argv), argv, strict=False):
        if word == "" or (word.startswith("--") and word.endswith("=")):
            name = before if word == "" and before.startswith("--") else word.rstrip("=")
            raise UserError(f"{name or 'A value'} is empty: give a value, or leave it out.")


def refuse_idle(options: Options, argv: Sequence[str]) -> None:
    """Raise UserError for an option that `argv` gives and that has no effect beside the others (`Idle`)."""
    given = {word.partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    for part in options.parts():
        for one in part.idle:
            named = {f"__{one.option}", f"__no_{one.option}"}
            require(not given & named or not one.when(part), one.message())


def spelled_out(argv: Sequence[str], options_type: type[Options]) -> Iterator[str]:
    """Yield `argv` with `--NAME` as `--NAME True` and `--no-NAME` as `--NAME False`, for options that are yes, no or
    left to the program (`bool | None`): tyro has the two words for plain `bool` alone."""
    switches = {name.replace("_", "-") for name, kind in options_type.field_types().items() if kind == bool | None}
    for position, word in enumerate(argv):
        name = word.replace("_", "-").removeprefix("--")
        following = argv[position + 1] if position + 1 < len(argv) else ""
        if word.startswith("--") and name in switches and following not in ("True", "False", "None"):
            yield from (f"--{name}", "True")
        elif word.startswith("--no") and name.removeprefix("no-") in switches:
            yield from (f"--{name.removeprefix('no-')}", "False")
        else:
            yield word
