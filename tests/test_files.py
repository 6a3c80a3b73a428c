"""Files are left whole or not at all, by one module: no other opens any for writing."""

import ast
import errno
import multiprocessing
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from detr_fast.config import UserError
from detr_fast.files import atomic_folder, atomic_write, open_growing, sweep_partial, write_json, write_text

CHECKOUT = Path(__file__).parents[1]
PACKAGES = ("detr_fast", "kernels/detr_kernels", "profiling/detr_profiling")
ALLOWED = {
    "detr_fast/files.py": "the one",
    "kernels/detr_kernels/compile_ahead.py": "a package that knows nothing of detr_fast; its table is printed as well",
    "profiling/detr_profiling/measuring/memory.py": "a switch of the kernel in /proc, no file",
}
WRITERS = {"write_text", "write_bytes", "save_file", "touch"}
SAVERS = re.compile(r"torch\.save|np\.savez?|.*\.savefig|Image\b.*\.save")
"""Functions of libraries that take an open file, which is called so, or open one by its name."""


def opened_for_writing(source: str) -> list[str]:
    """Find the calls that open a file for writing, also those of libraries that take a path."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or "devnull" in ast.unparse(node):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        method = isinstance(node.func, ast.Attribute)
        texts = [
            str(getattr(one, "value", ""))
            for one in (*node.args, *(each.value for each in node.keywords))
            if is_text(one)
        ]
        flags = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
        if (
            (name in ("open", "NamedTemporaryFile") and any(set(text) & set("wax+") for text in texts))
            or (name == "open" and flags & {"O_WRONLY", "O_RDWR", "O_CREAT"})
            or (name in WRITERS and method)
            or name == "FileIO"
            or (SAVERS.fullmatch(ast.unparse(node.func)) and not takes_open_file(node))
        ):
            found.append(ast.unparse(node)[:80])
    return found


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) <= 3


def takes_open_file(call: ast.Call) -> bool:
    return any(isinstance(one, ast.Name) and one.id in ("file", "buffer") for one in call.args)


@pytest.mark.parametrize(
    "code",
    [
        *('open(p, "w")', 'p.open("ab")', 'p.open(mode="r+")', 'p.write_text("")', "p.write_bytes(b'')", "p.touch()"),
        *("torch.save(x, p)", "figure.savefig(p)", "Image.save(p)", "save_file(x, p)", 'FileIO(p, "w")'),
        "os.open(p, os.O_CREAT | os.O_RDWR)",
    ],
)
def test_what_opens_a_file_for_writing_is_found(code: str) -> None:
    assert opened_for_writing(code if code[:9] != "save_file" else f"safetensors.{code}")


def test_one_module_alone_opens_files_for_writing() -> None:
    """What libraries write by themselves is not seen: TensorBoard's events and torch's traces."""
    for folder in PACKAGES:
        for path in (CHECKOUT / folder).rglob("*.py"):
            found = opened_for_writing(path.read_text())
            assert bool(found) == (str(path.relative_to(CHECKOUT)) in ALLOWED), f"{path}: {found}"
    for reading in ('open(p, "rb")', "p.open()", "torch.save(x, buffer)", "step.save(file)", "read_text(p)"):
        assert not opened_for_writing(reading)


def leave_half(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), 9)


def test_a_kill_leaves_the_old_file_and_one_rest_that_can_be_swept(tmp_path: Path) -> None:
    path = tmp_path / ("long name " * 20)  # the rest's name is no longer than the system allows
    write_text(path, "old")
    process = multiprocessing.get_context("fork").Process(target=leave_half, args=(path,))
    process.start()
    process.join()
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    sweep_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_names_the_file_and_the_reason(tmp_path: Path, reason: int) -> None:
    write_json(tmp_path / "new" / "a.json", [1])
    with (
        pytest.raises(UserError, match=rf"a\.json cannot be written: {os.strerror(reason)}\. Buy a disk\."),
        atomic_write(tmp_path / "new" / "a.json", "Buy a disk.") as file,
    ):
        file.write(b"half")
        raise OSError(reason, os.strerror(reason))
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "new" / "a.json") as file:
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in (tmp_path / "new").iterdir()] == [("a.json", "[\n  1\n]\n")]


def test_nothing_takes_the_place_of_a_pipe_or_a_folder(tmp_path: Path) -> None:
    """Nor of /dev/null, where root gives that as --output."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, reason in (("pipe", "special file"), ("link", "special file"), ("folder", "Is a directory")):
        with pytest.raises(UserError, match=rf"{name} cannot be written: .*{reason}"):
            write_text(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 3


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    for text in ("one", "two"):
        write_text(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "file").read_text() == "two"


@pytest.mark.parametrize("use", [write_json, open_growing], ids=["whole", "growing"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, use: object) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a cannot be written: File exists\. Free"):
        use(tmp_path / "file" / "a", False)  # type: ignore[operator]


def test_of_two_that_make_a_folder_the_first_stays(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "made") as second:
        with atomic_folder(tmp_path / "made") as first:
            write_text(first / "first", "")
        write_text(second / "second", "")
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "first"]


def test_threads_that_write_one_file_leave_one_of_theirs(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.json", [f"{number}" * 1000 for number in range(3)]

    def write_often(text: str) -> None:
        for _ in range(30):
            write_text(path, text)

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(write_often, texts)) == [None] * 3
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]
