"""One command with every subcommand, which answers at once, and names itself as it was typed."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from detr_profiling.__main__ import COMMANDS as PROFILING

import detr_fast
from detr_fast.__main__ import COMMANDS
from detr_fast.command import dispatch

CHECKOUT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(str(CHECKOUT / name) for name in ("", "kernels", "profiling"))
}
SCRIPT = "import sys\nfrom detr_fast.__main__ import main\n"
"""The console script, spelt the way pip writes it."""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    """Exit code, output and errors of `detr-fast` with these words."""
    with pytest.raises(SystemExit) as ending:
        dispatch(COMMANDS, words, "detr-fast")
    printed = capsys.readouterr()
    return ending.value.code, printed.out, printed.err


def test_help_lists_every_command_without_importing_torch(tmp_path: Path) -> None:
    script = tmp_path / "detr-fast"
    script.write_text(f"{SCRIPT}try: main()\nfinally: print(sys.modules.keys() & {{'torch', 'detr_profiling'}})")
    done = python(str(script), "--help")
    assert done.returncode == 0 and done.stdout.endswith("set()\n")
    assert done.stdout.startswith("usage: detr-fast COMMAND [")
    for name, command in COMMANDS.items():
        assert f"  {name:10}  {command.line}\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        ("detr_fast export --help", "python -m detr_fast export"),
        ("detr_fast.export --help", "python -m detr_fast.export"),
        ("detr_profiling report --help", "python -m detr_profiling report"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_usage_is_what_was_typed(
    words: str, usage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *arguments = words.split()
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with pytest.raises(SystemExit) as ending:
        runpy.run_module(module, run_name="__main__", alter_sys=True)  # as python -m does
    assert ending.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {usage} [")


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (("profile", "--help"), "detr-fast profile COMMAND"),
        (("profile", "report", "--help"), "detr-fast profile report"),
        (("check-data", "--help"), "detr-fast check-data"),
    ],
)
def test_a_subcommand_has_the_name_of_the_command(
    words: tuple[str, ...], usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = answer(capsys, *words)
    assert code == 0 and out.startswith(f"usage: {usage} [")


@pytest.mark.parametrize(
    ("words", "nearest"), [(("trian",), "'train'"), (("profile", "lader"), "'ladder'"), ((), None)]
)
def test_a_command_that_is_not_there_is_refused_with_the_nearest(
    words: tuple[str, ...], nearest: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = answer(capsys, *words)
    assert code == 2 and "usage: detr-fast" in out + err
    assert nearest is None or err.startswith(f"error: Unknown command {words[-1]!r}. Did you mean {nearest}?")


def test_a_command_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its mistakes are told as those of its module; --out is --output."""
    for name in ("--output", "--out"):
        code, _, err = answer(capsys, "export", "--weights", "nowhere.pth", name, str(tmp_path / "x.pth"))
        assert code == 2 and err.startswith("error: ") and "nowhere.pth" in err
    code, _, err = answer(capsys, "train", "--epochs", "0")
    assert (code, err) == (2, "error: --epochs must be at least 1, got 0.\n")


def test_public_names_are_there() -> None:
    assert set(detr_fast.__all__) == detr_fast.MODULES.keys() <= set(dir(detr_fast))
    assert all(callable(getattr(detr_fast, name)) for name in detr_fast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'bild_model'"):
        _ = detr_fast.bild_model


def test_the_profiling_commands_are_their_modules() -> None:
    assert all(command.module == f"detr_profiling.{name}" for name, command in PROFILING.items())
