"""Text is never markup: whatever names, folders and messages hold is printed as it is."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from detr_fast.check_data import print_lines
from detr_fast.command import run
from detr_fast.config import UserError
from detr_fast.console import Console, legible
from detr_fast.doctor import DoctorOptions
from detr_fast.options import TrainOptions
from detr_fast.train import default_options

CHECKOUT = Path(__file__).parents[1]
AWKWARD = ("try [v2]", "x[/old]", "[red]", "[/]", "a:smile:.jpg", "[link=x]y[/link]", "x" * 300)


def printed(*objects: object, **options: object) -> str:
    file = io.StringIO()
    Console(file=file, width=1000, **options).print(*objects)
    return file.getvalue()


@pytest.mark.parametrize("text", AWKWARD)
def test_text_is_printed_as_it_is(text: str) -> None:
    assert printed(text) == f"{text}\n"
    assert printed(text, force_terminal=True, color_system="truecolor") == f"{text}\n"
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    assert printed(table).count(text) == 4
    file = io.StringIO()
    print_lines("problems", [(text, f"{text} is wrong")], Console(file=file, width=1000))
    assert file.getvalue().count(text) == 2


def test_no_name_moves_the_cursor() -> None:
    """In a line, in a table and in what a command ends with."""
    name, shown = "evil\x1b[2J\r\x9b\x7f.jpg", "evil\\x1b[2J\\r\\x9b\\x7f.jpg"
    table = Table(name, title=name)
    table.add_row(name)
    assert printed(name) == f"{shown}\n" and printed(table).count(shown) == 3
    assert legible("a\n\tb\u00a0c\u200d") == "a\n\tb\u00a0c\u200d"


def test_lines_are_not_broken_and_tables_are() -> None:
    file = io.StringIO()
    console = Console(file=file, width=40)
    console.print("a/long/path/" * 10)
    console.print(Text("a/long/path/" * 10))
    assert file.getvalue().count("\n") == 2
    table = Table("path")
    table.add_row("a/long/path/" * 10)
    console.print(table)
    assert max(map(len, file.getvalue().splitlines()[2:])) == 40


def test_nothing_prints_in_another_way() -> None:
    """rich's own Console, and what reads markup."""
    for folder in ("detr_fast", "kernels", "profiling", "benchmarks"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            if path == CHECKOUT / "detr_fast" / "console.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
                module = getattr(node, "module", "") or ""
                assert not (module == "rich.console" and "Console" in names), path
                assert not module.startswith("rich.markup") and "rich.markup" not in names, path
                assert not (module == "rich" and "print" in names), path
                assert getattr(node, "attr", "") != "from_markup", path
                assert getattr(node, "arg", "") not in ("markup", "highlight"), path


def test_a_terminal_that_cannot_show_a_name_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def main(options: DoctorOptions) -> None:
        Console().print("\u7ec4\udce9")
        raise UserError("\u7ec4\udce9\x1b[2J")

    with pytest.raises(SystemExit) as stopped:
        run(main, DoctorOptions, argv=[])
    out, err = (stream.detach() for stream in streams)
    assert stopped.value.code == 2
    assert (out.getvalue(), err.getvalue()) == (b"\\u7ec4\\udce9\n", b"error: \\u7ec4\\udce9\\x1b[2J\n")


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("signal.signal(signal.SIGINT, signal.default_int_handler); signal.raise_signal(signal.SIGINT)", 130),
        ("os.close(read); print('x' * 100_000)", 141),
        ("0 / 0", 1),
        ("os.close(read); Console().print('x' * 100_000)", 141),
    ],
    ids=["interrupted", "no longer read", "a fault of ours", "no longer read, printed by rich"],
)
def test_how_a_command_ends_that_is_stopped(ending: str, code: int) -> None:
    """Ours alone shows where it happened."""
    program = (
        "import os, signal; from detr_fast.command import run; from detr_fast.option_groups import Options\n"
        "from detr_fast.console import Console\n"
        "read, write = os.pipe(); os.dup2(write, 1); os.close(write)\n"
        f"def main(options):\n    {ending}\n"
        "run(main, Options, argv=[])"
    )
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == code and ("Traceback" in done.stderr) == (code == 1), done.stderr


def parsed(*argv: str) -> TrainOptions:
    """The options that `train` gets from a command line."""
    got: list[TrainOptions] = []
    with pytest.raises(SystemExit) as ending:
        run(got.append, TrainOptions, default_options, argv)
    assert ending.value.code == 0
    return got[0]


def test_options_have_one_meaning_in_any_spelling() -> None:
    """The recipe depends on some of them, before they are parsed."""
    argv = ["--train-images", "a_b", "--train-annotations=c_d.json", "--val-images", "e", "--val-annotations", "f"]
    respelled = [word.replace("-images", "_images").replace("-annotations", "_annotations") for word in argv]
    assert argv != respelled and parsed(*argv) == parsed(*respelled)
    assert (parsed(*argv).network.model, parsed(*argv).dataset.train_images) == ("detr_r50", "a_b")
    assert parsed("--output=~/runs").output == parsed("--output", os.path.expanduser("~/runs")).output


@pytest.mark.parametrize("argv", [["--resume", ""], ["--output="], ["--data", "shapes:64", "--weights", ""]])
def test_an_empty_value_is_named(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        run(lambda options: None, TrainOptions, default_options, argv)
    assert ending.value.code == 2
    assert f"{argv[-2] if argv[-1] == '' else '--output'} is empty" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["1", "39", "80"])
def test_help_ends_on_any_terminal(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one column tyro's layout takes all memory. A run to resume that is not there is no reason to give none."""
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as ending:
        run(lambda options: None, TrainOptions, default_options, ["--help", "--resume", "nowhere"])
    assert ending.value.code == 0 and os.environ["COLUMNS"] == ("80" if columns == "80" else "40")
    assert "--epochs" in capsys.readouterr().out
