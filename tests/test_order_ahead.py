"""The thread that makes the order of training, in a process that starts others, or ends early."""

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from detr_fast.data.buckets import Buckets
from detr_fast.data.coco import CocoDataset
from detr_fast.data.loader import evaluation_loader, train_loader
from detr_fast.data.sampler import EpochSampler
from detr_fast.data.transforms import EvaluationTransform, TrainTransform


def named_threads() -> int:
    return sum(thread.name.startswith("one ahead") for thread in threading.enumerate())


def test_workers_are_forked_beside_it_and_it_ends_with_its_loader(shapes_root: Path) -> None:
    """An evaluation in mid-training starts workers of its own, while the order of training is made."""
    annotations = shapes_root / "annotations"
    training = CocoDataset(shapes_root / "train", annotations / "train.json", TrainTransform((48, 64), 96, (), (1, 1)))
    validation = CocoDataset(shapes_root / "val", annotations / "val.json", EvaluationTransform(64, 64))
    buckets = Buckets(lambda epoch, images: training.augmentations(epoch, images).sizes)
    for workers in (0, 2):
        batches = train_loader(training, 4, workers, seed=3, buckets=buckets)
        for _ in range(2):
            assert len(list(itertools.islice(batches, 3))) == 3 and named_threads() == 1
            assert len(list(evaluation_loader(validation, 4, workers=2))) == 3
        del batches
        assert named_threads() == 0


def leave_at_work() -> None:
    def slow(epoch: int, images: np.ndarray) -> np.ndarray:
        time.sleep(0.1 * epoch)
        return np.ones((len(images), 2), dtype=np.int64)

    batches = iter(EpochSampler(4, 2, seed=1, buckets=Buckets(slow)))
    kept.append(batches)
    assert [batch[0].epoch for batch in itertools.islice(batches, 3)] == [0, 0, 1] and named_threads() > 0


kept: list[Iterator] = []
"""What lives as long as its process."""


def test_a_process_ends_that_leaves_it_at_work_or_has_lost_it_in_a_fork() -> None:
    """At its end a process waits for its threads; of its parent's it has only the traces."""
    batches = iter(EpochSampler(64, 2, seed=1))
    next(batches)
    for work in (leave_at_work, os.getpid):
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join(120)
        assert child.exitcode == 0, work
