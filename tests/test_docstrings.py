"""Docstrings begin as the style asks, and no automatic wrap has left a word alone on a paragraph's last line."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PACKAGES = {
    "detr_fast": CHECKOUT / "detr_fast",
    "detr_kernels": CHECKOUT / "kernels" / "detr_kernels",
    "detr_profiling": CHECKOUT / "profiling" / "detr_profiling",
    "benchmarks": CHECKOUT / "benchmarks",
}

NEVER_FIRST = re.compile(r"(Of|What|As|Whether|With|From|The same)\b")
NO_VERB = re.compile(
    r"[^A-Z]|(The|A|An|It|Its|This|That|These|Those|Their|Each|Every|Both|All|One|How|Why|Which|Where)\b"
)
"""Beginnings of a function's docstring that say what it is instead of what it does; a shape or a name among them."""
Strings = Iterator[tuple[ast.AST, ast.Constant]]


def docstrings(tree: ast.Module) -> Strings:
    """Yield the text below each definition, and below each attribute, with the node that it describes."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for position, statement in enumerate(body if isinstance(body, list) else []):
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield node if position == 0 else statement, value


def paragraphs(text: str) -> list[list[str]]:
    return [paragraph.strip().splitlines() for paragraph in text.split("\n\n")]


def faults(source: str) -> Iterator[str]:
    """Yield line and beginning of each docstring that is not as the style asks."""
    for described, constant in docstrings(ast.parse(source)):
        text = str(constant.value)
        function = isinstance(described, ast.FunctionDef | ast.AsyncFunctionDef)
        if NEVER_FIRST.match(text) or (function and NO_VERB.match(text)):
            yield f"{constant.lineno}: begins with {text[:40]!r}"
        for lines in paragraphs(text):
            if len(lines) > 1 and len(lines[-1].split()) == 1 and not lines[-1].endswith(":"):
                yield f"{constant.lineno}: one word on the last line, {lines[-1].strip()!r}"


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_begin_as_the_style_asks(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert len(files) > 10
    assert [f"{path}:{fault}" for path in files for fault in faults(path.read_text())] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""Of one thing."""', 1),
        ('"""Reading of files."""', 0),
        ('def f():\n    """(B, N) -> (N,)."""', 1),
        ('def f():\n    """The sum."""', 1),
        ('def f():\n    """Return the sum."""', 0),
        ('x: int\n"""Whether it holds."""', 1),
        ('class C:\n    """A class may be named.\n\n    A long sentence ends\n    alone."""', 1),
    ],
)
def test_a_fault_is_found(source: str, found: int) -> None:
    assert len(list(faults(source))) == found
