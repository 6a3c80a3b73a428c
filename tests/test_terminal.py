"""Blocks in a terminal: nothing is cut off for want of width, and no text is markup."""

import io

from detr_profiling.pages.blocks import BAD, Cell, Chart, Facts, Paragraph, Section, Table, cells, code, figures, words
from detr_profiling.pages.terminal import show
from matplotlib.figure import Figure

from detr_fast.console import Console

COLUMNS = [*words("technique"), *figures("ms (IQR, runs)", "images/s", "peak MiB"), *words("remark")]
ROWS = [
    cells("reference", "1,912 (25, 10 runs)", "1.10", "2,104", "close"),
    cells("folded batch norm", "402 (14, 10 runs)", "2.49", "1,238", Cell("a long remark " * 5, BAD)),
]


def shown(*blocks: Table | Paragraph | Facts | Chart, width: int = 80, colour: bool = False) -> str:
    system = {"force_terminal": True, "color_system": "standard"} if colour else {}
    console = Console(width=width, file=io.StringIO(), record=True, **system)
    show([Section("Ladder", list(blocks))], console)
    return console.export_text(styles=colour)


def test_a_wide_table_goes_on_beneath_with_its_first_column() -> None:
    for width in (40, 60, 80, 200):
        text = shown(Table("Training: time", COLUMNS, ROWS), width=width)
        assert max(map(len, text.splitlines())) <= width
        for row in ROWS:
            assert all(word in text for cell in row for word in cell.text.split()), "nothing is cut off"
        assert text.count("Training: time") == 1
        assert text.count("folded batch norm") == {40: 3, 60: 2, 80: 2, 200: 1}[width]
    lines = [line.split() for line in shown(Table("", COLUMNS[:4], [row[:4] for row in ROWS])).splitlines()]
    assert ["folded", "batch", "norm", "402", "(14,", "10", "runs)", "2.49", "1,238"] in lines


def test_long_names_of_kernels_end_and_text_is_no_markup() -> None:
    name = "void [bold]kernel<float>" + "x" * 300
    text = shown(Table("[red]Kernels", code("kernel"), [cells(name), cells("a\x1b[2Jb")]), Paragraph("[i]so[/i] \x1b."))
    assert "void [bold]kernel<float>" in text and "x" * 30 not in text and "…" in text
    for said in ("[red]Kernels", r"a\x1b[2Jb", r"[i]so[/i] \x1b."):
        assert said in text
    assert "\x1b" not in text


def test_what_a_terminal_does_not_show() -> None:
    def draw() -> Figure:
        raise AssertionError("drawn for nobody")

    folded = Table("The rest", words("operator"), [cells("aten::relu")], folded=True)
    text = shown(folded, Chart("c", "A chart", "", draw), Facts("Machine", [("device", "a GPU")]))
    assert "The rest" not in text and "A chart" not in text
    assert text.split() == ["LADDER", "Machine", "device", "a", "GPU"]


def test_what_is_bad_has_its_colour() -> None:
    assert "\x1b[1;31ma long" in shown(Table("", COLUMNS, ROWS), width=200, colour=True)
