"""The only way in which tables and lines are printed: whatever text holds is shown as it is."""

from typing import Any

import rich.console
from rich.text import Text


class Console(rich.console.Console):
    """Prints text literally: brackets are no markup, `:name:` is no picture, numbers have no colour. Styles are given
    as arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def on_broken_pipe(self) -> None:
        """Leave it to `detr_fast.command.run`, where rich would exit with 1."""
        raise BrokenPipeError

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """As rich's, but text is not broken into lines, so that a path in it can be copied; tables are."""
        if soft_wrap is None:
            soft_wrap = all(isinstance(each, str | Text) for each in objects)
        super().print(*objects, soft_wrap=soft_wrap, **options)
