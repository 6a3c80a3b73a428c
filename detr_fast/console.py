"""The only way in which tables and lines are printed: whatever text holds is shown as it is, and moves no cursor."""

import re
from typing import Any

import rich.console
from rich.text import Text

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal acts on; not the new line and the tab."""


def legible(text: str) -> str:
    """Return `text` with escapes for the control characters that a file's or a class's name may hold."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Console(rich.console.Console):
    """Prints text literally: brackets are no markup, `:name:` is no picture, numbers have no colour. Styles are given
    as arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def on_broken_pipe(self) -> None:
        """Leave it to `detr_fast.command.run`, where rich would exit with 1."""
        raise BrokenPipeError

    def render_str(self, text: str, **options: Any) -> Text:
        """Make of any text, in lines and in tables, what is shown: control characters escaped."""
        return super().render_str(legible(text), **options)

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """Print as rich does, but do not break text into lines, so that a path in it can be copied."""
        if soft_wrap is None:
            soft_wrap = all(isinstance(each, str | Text) for each in objects)
        super().print(*objects, soft_wrap=soft_wrap, **options)
