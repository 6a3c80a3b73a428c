"""Who runs where: a kernel's form and its reason, and the one way to a launch."""

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import detr_kernels
import pytest
import torch
from detr_kernels import dispatch
from detr_kernels.dispatch import cdiv, choose_backend, launch, launches_to, next_power_of_2

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is asked of one, answered as an H200 would; nothing runs on it."""
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    dispatch._no_launcher.cache_clear()
    yield
    dispatch._no_launcher.cache_clear()


def test_on_a_cpu_auto_is_plain_torch_also_under_the_interpreter() -> None:
    assert choose_backend("set_loss", CPU)[0] == "ref"
    assert choose_backend("set_loss", CPU, "ref") == ("ref", "asked for")


@pytest.mark.usefixtures("a_gpu")
def test_auto_is_what_was_measured_on_that_gpu_and_for_that_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    won = ("triton", "1.2 times as fast in a whole step")
    assert choose_backend("set_loss", CUDA)[0] == "ref"
    monkeypatch.setitem(dispatch.MEASURED, "NVIDIA H200", {"set_loss": won})
    assert choose_backend("set_loss", CUDA) == won
    assert choose_backend("match_cost", CUDA)[0] == "ref"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert choose_backend("set_loss", CUDA)[0] == "ref"


@pytest.mark.usefixtures("a_gpu")
def test_what_triton_lacks_is_named_and_auto_does_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="set_loss: Triton needs a C compiler: sudo apt install gcc"):
        choose_backend("set_loss", CUDA, "triton")
    form, reason = choose_backend("set_loss", CUDA)
    assert form == "ref" and "C compiler" in reason


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("INSTALLED", False, "pip install triton"), ("INTERPRETED", False, "no CPU backend")],
)
def test_triton_that_cannot_run_on_a_cpu_says_why(
    attribute: str, value: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, attribute, value)
    with pytest.raises(RuntimeError, match=message):
        choose_backend("set_loss", CPU, "triton")
    with pytest.raises(RuntimeError, match=message):
        launch(None, (1,), torch.zeros(1))
    assert message in choose_backend("set_loss", CPU)[1]


def test_the_interpreter_is_not_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="unset it"):
        choose_backend("set_loss", CUDA, "triton")


def test_no_mark_for_the_compiler_lies_on_a_cache() -> None:
    """Dynamo traces what a cache wraps, and never sees a mark on the wrapper."""
    modules = [import_module(f"detr_kernels.{each.name}") for each in pkgutil.iter_modules(detr_kernels.__path__)]
    marked = [each for module in modules for each in vars(module).values() if hasattr(each, "_dynamo_marked_constant")]
    assert len(marked) >= 5 and not [each for each in marked if hasattr(each, "cache_info")]


def test_a_misspelt_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="tritn"):
        choose_backend("set_loss", CPU, "tritn")  # type: ignore[arg-type]


def test_launches_go_elsewhere_while_asked_to_and_empty_ones_nowhere() -> None:
    seen: list[Any] = []
    with launches_to(lambda *arguments, **options: seen.append((arguments, options))):
        launch("kernel", (2,), 1, BLOCK=4)
        launch("kernel", (0, 3), 1)
    assert seen == [(("kernel", (2,), 1), {"BLOCK": 4})]
    launch(None, (0,), torch.zeros(1))  # would fail if it ran


@pytest.mark.parametrize(("number", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (100, 128), (128, 128)])
def test_block_arithmetic(number: int, power: int) -> None:
    assert next_power_of_2(number) == power
    assert cdiv(number, 3) == (number + 2) // 3
