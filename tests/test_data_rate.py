"""`--data-only`: images are read and made a model's input, counted, and nothing is trained or written."""

import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from detr_fast import train
from detr_fast.data.batch import Batch
from detr_fast.data.loader import on_device
from detr_fast.options import RuntimeOptions
from detr_fast.runtime import choose_runtime
from detr_fast.training import data_rate
from detr_fast.training.build import make_batches, make_data
from detr_fast.training.distributed import World
from detr_fast.training.recipes import RECIPES
from tests.planted_clock import PlantedClock


def test_it_says_how_many_images_a_second(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(data_rate, "SECONDS", 0.3)
    output = str(tmp_path / "run")
    options = RECIPES["tiny"].but(data=str(shapes_root), output=output, data_only=True, workers=1)
    assert train.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip().split("  ")[0] for line in lines] == ["read", "read and prepared"]
    rates = [float(re.search(r"([\d.]+) images/s \(1 workers", line).group(1)) for line in lines]  # type: ignore[union-attr]
    assert all(rate > 0 for rate in rates) and "padding overhead 0.0%" in lines[0]
    assert not (tmp_path / "run").exists()


def test_reading_is_compared_with_an_earlier_runs_training(tmp_path: Path) -> None:
    """Its log has 80 images/s on two devices, where a fifth of the time went by waiting: without, each takes 50."""
    assert data_rate.training_rate(tmp_path / "none.csv", 1) is None
    log = tmp_path / "metrics.csv"
    columns = "kind,epoch,step,seconds,images_per_second,data_wait_fraction"
    log.write_text(f"{columns}\ntrain,1,1,1,80,0.2\nval,1,1,1,,\ntrain,1,2,2,80,0.2\n")
    assert data_rate.training_rate(log, 2) == pytest.approx(50)
    assert data_rate.verdict(60, 50) == "reading keeps up" and "--workers" in data_rate.verdict(40, 50)


def test_a_slow_reader_is_seen(shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images a second as read are those that came, over the time that it took."""
    clock = PlantedClock()
    monkeypatch.setattr(data_rate, "time", clock)
    monkeypatch.setattr(data_rate, "SECONDS", 0.4)
    options = RECIPES["tiny"].but(data=str(shapes_root), batch_size=2)
    runtime = choose_runtime(RuntimeOptions(device="cpu", precision="fp32"))
    train_set, _, config = make_data(options)
    batches = make_batches(options, train_set, runtime, World(), (0, 0))

    def slow() -> Batch:
        clock.sleep(0.05)
        return next(batches)

    console = Console(record=True, width=200)
    data_rate.measure_data(iter(slow, None), config, runtime, 0, console)
    rate = float(re.search(r"read\s+(\d+) images/s", console.export_text()).group(1))  # type: ignore[union-attr]
    assert rate == 40  # two images in 50 ms


def test_batches_on_a_cpu_pass_as_they_are(shapes_root: Path) -> None:
    options = RECIPES["tiny"].but(data=str(shapes_root), batch_size=2)
    runtime = choose_runtime(RuntimeOptions(device="cpu", precision="fp32"))
    train_set, _, _ = make_data(options)
    given = [next(make_batches(options, train_set, runtime, World(), (0, start))) for start in (0, 3)]
    passed = list(on_device(given, torch.device("cpu")))
    assert [batch.image_ids for batch in passed] == [batch.image_ids for batch in given]
    assert all(
        torch.equal(a, b)
        for one, other in zip(given, passed, strict=True)
        for a, b in zip(one.tensors(), other.tensors(), strict=True)
    )
