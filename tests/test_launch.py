"""Where Triton can run, and the one way to a launch."""

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import detr_kernels
import pytest
import torch
from detr_kernels import OPERATIONS, Facts
from detr_kernels import launch as launcher
from detr_kernels.launch import cdiv, launch, launches_to, next_power_of_2

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LOSS = OPERATIONS["set_loss"]


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is asked of one, answered as an H200 would; nothing runs on it."""
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    launcher._no_launcher.cache_clear()
    yield
    launcher._no_launcher.cache_clear()


@pytest.mark.usefixtures("a_gpu")
def test_what_triton_lacks_is_named_and_auto_does_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="set loss by triton: Triton needs a C compiler: sudo apt install gcc"):
        LOSS.choose(Facts(CUDA), "triton")
    backend, reason = LOSS.choose(Facts(CUDA))
    assert backend == "ref" and "C compiler" in reason


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("INSTALLED", False, "pip install triton"), ("INTERPRETED", False, "no CPU backend")],
)
def test_triton_that_cannot_run_on_a_cpu_says_why(
    attribute: str, value: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, attribute, value)
    with pytest.raises(RuntimeError, match=message):
        LOSS.choose(Facts(CPU), "triton")
    with pytest.raises(RuntimeError, match=message):
        launch(None, (1,), torch.zeros(1))
    assert message in LOSS.choose(Facts(CPU)).reason


def test_the_interpreter_is_not_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="unset it"):
        LOSS.choose(Facts(CUDA), "triton")


def test_no_mark_for_the_compiler_lies_on_a_cache() -> None:
    """Dynamo traces what a cache wraps, and never sees a mark on the wrapper."""
    packages = pkgutil.walk_packages(detr_kernels.__path__, "detr_kernels.")
    modules = [import_module(each.name) for each in packages]
    marked = [each for module in modules for each in vars(module).values() if hasattr(each, "_dynamo_marked_constant")]
    assert len(marked) >= 4 and not [each for each in marked if hasattr(each, "cache_info")]


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
