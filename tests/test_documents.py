"""Nothing points to a document that is not there, and docs/faults.md names tests that there are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
FOLDERS = ("docs", "detr_fast", "kernels", "profiling", "benchmarks", "tests", ".github")
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *(path for name in FOLDERS for path in (CHECKOUT / name).rglob("*.md"))])
SOURCES = sorted(
    path
    for name in FOLDERS
    for path in (CHECKOUT / name).rglob("*")
    if path.suffix in {".py", ".sh", ".yml", ".j2"} and "results" not in path.parts
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<![\w/.*{}:-])[\w./-]*\w\.md\b")


def of_checkout(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def anchors(document: Path) -> set[str]:
    """Give the headings as GitHub names them in addresses."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> Iterator[str]:
    for link in LINK.findall(re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)):
        if "://" in link or link.startswith("mailto:"):
            continue
        place, _, anchor = link.partition("#")
        target = document.parent / place if place else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def documents_named(source: Path) -> Iterator[str]:
    """Yield names in a folder and names in capitals; others, such as report.md, are of what programs make."""
    for name in NAMED.findall(source.read_text(encoding="utf-8")):
        if "/" in name or name != name.lower():
            yield name


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if "results" not in path.parts], ids=of_checkout)
def test_every_link_leads_somewhere(document: Path) -> None:
    assert not list(broken_links(document))


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# The first, `second`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md#the-first-second) [b](there.md#third) [c](gone.md) [d](https://e.f/g.md)\n```\n[h](i)\n```\n"
    )
    assert list(broken_links(page)) == ["there.md#third", "gone.md"]


def test_every_document_that_code_names_is_there() -> None:
    names = {path.name for path in DOCUMENTS}
    wrong = [
        f"{of_checkout(source)}: {name}"
        for source in SOURCES
        if source != Path(__file__)
        for name in documents_named(source)
        if not ((CHECKOUT / name).exists() or (source.parent / name).exists() or name in names)
    ]
    assert not wrong, wrong


def test_a_document_that_is_not_there_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text('"""As docs/gone.md says, and GONE.md (a report.md, *.md, f"{name}.md")."""\n')
    assert list(documents_named(source)) == ["docs/gone.md", "GONE.md"]


def test_every_fault_names_tests_that_there_are() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\|$", (text := (CHECKOUT / "docs" / "faults.md").read_text()), re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 40))
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (CHECKOUT / "tests").rglob("*.py"))
    defined = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 80 and not set(named) - defined


def test_help_names_no_document() -> None:
    """Whoever has installed the package has no docs/ beside it."""
    options = [CHECKOUT / "detr_fast" / f"{name}.py" for name in ("options", "export", "check_data", "doctor")]
    assert all("class " in source.read_text() and "Options" in source.read_text() for source in options)
    assert not [name for source in options for name in documents_named(source)]


def test_the_version_is_one() -> None:
    version = re.search(r'^__version__ = "(.+)"$', (CHECKOUT / "detr_fast" / "__init__.py").read_text(), re.MULTILINE)
    assert version is not None
    assert f"\nversion: {version[1]}\n" in (CHECKOUT / "CITATION.cff").read_text()
    assert f" {version[1]} " in (CHECKOUT / "CHANGELOG.md").read_text()


def test_the_files_on_an_images_way_are_those_that_there_are() -> None:
    text = (CHECKOUT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = re.findall(r"^\| (\d+) \| `([\w/]+)` \|", text, re.MULTILINE)
    assert [int(number) for number, _ in files] == list(
        range(1, len(files) + 1)
    ) and f"passes {len(files)} files" in text
    named = {name for _, name in files} | set(re.findall(r"`((?:training|weights|model|data|evaluation)/\w+)`", text))
    assert [name for name in sorted(named) if not (CHECKOUT / "detr_fast" / f"{name}.py").exists()] == []
