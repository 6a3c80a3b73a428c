"""What every command shares: options parsed from a dataclass, a user's error as one message and exit code 2."""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from detr_fast.config import UserError

Options = TypeVar("Options")


def run(
    main: Callable[[Options], int | None],
    options_type: type[Options],
    default: Callable[[Sequence[str]], Options] | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parses `argv` into `options_type` and exits with what `main` returns.

    `default` gives, from the same arguments, the values of options that are not given.
    """
    argv = sys.argv[1:] if argv is None else argv
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        values = {} if default is None else {"default": default(argv)}
        options = tyro.cli(options_type, args=argv, **values)  # type: ignore[call-overload]
        code = main(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)
