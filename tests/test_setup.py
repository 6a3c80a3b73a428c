"""setup.sh on machines that lack something: fake interpreters and tools on PATH, the real script."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
TOOLS = ("awk", "bash", "cat", "cksum", "cp", "dirname", "env", "flock", "head", "make", "mkdir", "rm", "sh")

PYTHON = """#!/bin/sh
case "$*" in
    *base_prefix*) echo /usr ;;
    *find_spec*) echo "{facts}" ;;
    *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"-m pip install"*) echo installed >>installations; exit $(cat pip_status) ;;
esac
"""
COMPLETE = "3.12 ensurepip Python.h"


class Machine:
    """A checkout in a folder of its own, and a PATH with nothing on it but what a test puts there."""

    def __init__(self, root: Path) -> None:
        self.bin = root / "bin"
        self.checkout = root / "check out"
        self.bin.mkdir()
        self.checkout.mkdir()
        for name in ("setup.sh", "Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(CHECKOUT / name, self.checkout)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool}"))
        self.put("python3.12", PYTHON.format(facts=COMPLETE))
        self.put("g++", "#!/bin/sh\n")
        self.put("df", "#!/bin/sh\necho header\necho /dev/sda 0 0 99999999 0% /\n")
        self.pip_status(0)

    def put(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def pip_status(self, status: int) -> None:
        (self.checkout / "pip_status").write_text(str(status))

    def setup(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command or ["./setup.sh"],
            cwd=self.checkout,
            env={"PATH": str(self.bin)} | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def installations(self) -> int:
        log = self.checkout / "installations"
        return len(log.read_text().split()) if log.exists() else 0

    def ready(self) -> bool:
        return (self.checkout / ".venv" / "ready").exists()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_second_setup_does_nothing(machine: Machine) -> None:
    for _ in range(2):
        result = machine.setup("make", "setup")
        assert result.returncode == 0, result.stderr
    assert machine.installations() == 1
    assert result.stdout == "", "the second says nothing"
    assert machine.ready()
    assert not (machine.checkout / ".venv" / "tmp").exists()


def no_python(machine: Machine) -> None:
    (machine.bin / "python3.12").unlink()


def old_python(machine: Machine) -> None:
    no_python(machine)
    machine.put("python3", PYTHON.format(facts="3.9 ensurepip Python.h"))
    machine.put("python", PYTHON.format(facts="3.6 ensurepip "))


def new_python(machine: Machine) -> None:
    no_python(machine)
    machine.put("python3", PYTHON.format(facts="3.14 ensurepip Python.h"))


def pyenv_shim(machine: Machine) -> None:
    machine.put("python3.12", "#!/bin/sh\necho pyenv: python3.12: command not found >&2\nexit 127\n")


def python_without_venv(machine: Machine) -> None:
    machine.put("python3.12", PYTHON.format(facts="3.12  Python.h"))


def no_compiler(machine: Machine) -> None:
    (machine.bin / "g++").unlink()


def broken_compiler(machine: Machine) -> None:
    machine.put("g++", "#!/bin/sh\necho omp.h: No such file >&2\nexit 1\n")


def little_disk(machine: Machine) -> None:
    machine.put("df", "#!/bin/sh\necho header\necho /dev/sda 0 0 4194304 0% /\n")


def failing_pip(machine: Machine) -> None:
    machine.pip_status(1)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (no_python, "Python 3.11, 3.12 or 3.13 is needed (python3 does not run)"),
        (old_python, "Python 3.11, 3.12 or 3.13 is needed (python3 is 3.9, python is 3.6)"),
        (new_python, "Python 3.11, 3.12 or 3.13 is needed (python3 is 3.14)"),
        (pyenv_shim, "Python 3.11, 3.12 or 3.13 is needed (python3 does not run)"),
        (python_without_venv, "sudo apt install python3.12-venv"),
        (no_compiler, "No working C++ compiler with OpenMP (g++)"),
        (broken_compiler, "No working C++ compiler with OpenMP (g++)"),
        (little_disk, "there are 4."),
        (failing_pip, "The installation failed"),
    ],
)
def test_what_is_missing_is_said(machine: Machine, break_it: Callable[[Machine], None], message: str) -> None:
    break_it(machine)
    result = machine.setup()
    assert result.returncode == 2
    assert message in result.stderr
    assert not machine.ready()


def test_interpreter_asked_for_is_used_or_refused(machine: Machine) -> None:
    assert machine.setup(PYTHON="/nonexistent/python").returncode == 2
    machine.put("older", PYTHON.format(facts="3.10 ensurepip Python.h"))
    result = machine.setup("make", "setup", "PYTHON=older")
    assert result.returncode == 2
    assert "older is 3.10" in result.stderr
    machine.put("chosen", PYTHON.format(facts="3.13 ensurepip Python.h"))
    assert "Python 3.13" in machine.setup("make", "setup", "PYTHON=chosen").stdout


def test_missing_headers_are_noted(machine: Machine) -> None:
    machine.put("python3.12", PYTHON.format(facts="3.12 ensurepip "))
    result = machine.setup()
    assert result.returncode == 0
    assert "sudo apt install python3.12-dev" in result.stderr


def test_failed_or_interrupted_setup_is_made_afresh(machine: Machine) -> None:
    machine.pip_status(1)
    machine.setup()
    leftover = machine.checkout / ".venv" / "half-installed"
    leftover.touch()
    machine.pip_status(0)
    assert machine.setup().returncode == 0
    assert machine.ready()
    assert not leftover.exists()


def test_activated_environment_is_not_made_from_itself(machine: Machine) -> None:
    inside = machine.checkout / ".venv" / "bin"
    inside.mkdir(parents=True)
    shutil.copy(machine.bin / "python3.12", inside / "python3.11")
    assert machine.setup(PATH=f"{inside}:{machine.bin}").returncode == 0
    assert machine.ready()


def test_changed_requirements_update_the_environment(machine: Machine) -> None:
    machine.setup()
    kept = machine.checkout / ".venv" / "kept"
    kept.touch()
    with (machine.checkout / "constraints.txt").open("a") as file:
        file.write("new==1\n")
    assert "requirements have changed" in machine.setup().stdout
    assert machine.installations() == 2
    assert kept.exists()


def test_moved_checkout_is_set_up_again(machine: Machine) -> None:
    machine.setup()
    machine.checkout = machine.checkout.rename(machine.checkout.parent / "moved")
    machine.setup()
    assert machine.installations() == 2
