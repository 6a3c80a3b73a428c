"""torchvision's Faster R-CNN as a referee: trained on the same data, from the same backbone's weights, as long.

Its model, losses and anchors are torchvision's; the recipe is its reference script's (SGD, flips, a warm-up, one drop),
scaled to small images. It leaves a folder with a metrics.csv as `train` does. `python -m
detr_profiling.baselines.faster_rcnn_training` is what `accuracy` starts.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from detr_fast.command import run
from detr_fast.data.batch import Batch
from detr_fast.data.coco import CocoDataset, build_dataset
from detr_fast.data.loader import evaluation_loader
from detr_fast.evaluation.coco_metrics import METRICS, evaluate_detector
from detr_fast.model.timm_backbone import TimmBackbone
from detr_fast.option_groups import Options
from detr_fast.options import DataOptions
from detr_fast.training.metrics_log import MetricsLog
from detr_fast.weights import load_backbone_weights
from detr_profiling.baselines.other_detectors import boxes_px

BACKBONE, STRIDES = "tf_efficientnet_lite0", (8, 16, 32)
PYRAMID_WIDTH, HEAD_WIDTH = 128, 512
ANCHORS_PX = ((16,), (32,), (64,), (128,))
BATCH, LR, WARM_UP_STEPS, DROP_AFTER = 4, 0.005, 100, 0.7
"""Learning rate 0.02 for 16 images, as torchvision's reference has it; it drops by ten for the last 0.3 of the time."""
MOST_DETECTIONS = 100


@dataclass(frozen=True, kw_only=True)
class RefereeOptions(Options):
    """Train torchvision's Faster R-CNN on the backbone that detr_lite has."""

    output: str
    """Folder for metrics.csv."""
    minutes: float = 10
    """Length of the training, evaluations apart."""
    eval_every: int = 1
    """Epochs between evaluations."""
    seed: int = 0

    dataset: DataOptions = DataOptions(image_size=192, max_size=320)


class Pyramid(nn.Module):
    """Maps of three strides, and a pyramid of them: what torchvision's detector takes for a backbone."""

    out_channels: ClassVar[int] = PYRAMID_WIDTH

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        whole = TimmBackbone(BACKBONE, dilation=False)
        load_backbone_weights(whole, BACKBONE, "imagenet")
        self.body = whole.body
        info = self.body.feature_info
        self.taken = [info.reduction().index(stride) for stride in STRIDES]
        channels = [info.channels()[index] for index in self.taken]
        self.pyramid = FeaturePyramidNetwork(channels, PYRAMID_WIDTH, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        return self.pyramid({str(number): maps[index] for number, index in enumerate(self.taken)})


def faster_rcnn(num_classes: int, options: RefereeOptions) -> nn.Module:
    """Build it for `num_classes`, without the background."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    return FasterRCNN(
        Pyramid(),
        rpn_anchor_generator=AnchorGenerator(ANCHORS_PX, ((0.5, 1.0, 2.0),) * len(ANCHORS_PX)),
        box_roi_pool=MultiScaleRoIAlign([str(number) for number in range(len(STRIDES))], 7, 2),
        box_head=TwoMLPHead(PYRAMID_WIDTH * 7 * 7, HEAD_WIDTH),
        box_predictor=FastRCNNPredictor(HEAD_WIDTH, num_classes + 1),
        min_size=options.dataset.image_size,
        max_size=options.dataset.max_size,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        rpn_pre_nms_top_n_train=1000,
        rpn_post_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=300,
        box_batch_size_per_image=64,
    )


class Judged:
    """Gives `evaluate_detector` the detections of a batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def detect(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores (B, 100), labels and boxes xyxy in pixels of the original images; without a box, score 0."""
        self.model.eval()
        images = [image.permute(2, 0, 1) / 255 for image in batch.images]
        scores = torch.zeros(len(images), MOST_DETECTIONS)
        labels, boxes = torch.zeros_like(scores, dtype=torch.int64), torch.zeros(*scores.shape, 4)
        for number, (found, image) in enumerate(zip(self.model(images), images, strict=True)):
            kept = len(found["scores"][:MOST_DETECTIONS])
            scale = batch.original_sizes[number].flip(0) / torch.tensor(image.shape[:0:-1])
            scores[number, :kept] = found["scores"][:kept]
            labels[number, :kept] = found["labels"][:kept] - 1
            boxes[number, :kept] = found["boxes"][:kept] * scale.repeat(2)
        self.model.train()
        return scores, labels, boxes


def batches(dataset: CocoDataset, seed: int) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]], int]]:
    """Yield images (3, h, w) in [0, 1], half of them flipped, their targets, and the epoch, without end."""
    order, epoch = random.Random(seed), 0
    while True:
        indices = order.sample(range(len(dataset)), len(dataset))
        for first in range(0, len(indices) - BATCH + 1, BATCH):
            images, targets = [], []
            for index in indices[first : first + BATCH]:
                sample = dataset[0, index]
                image, boxes = sample.image.float() / 255, sample.boxes_cxcywh.clone()
                if order.random() < 0.5:
                    image, boxes[:, 0] = image.flip(-1), 1 - boxes[:, 0]
                images.append(image)
                targets.append({"boxes": boxes_px(boxes, image), "labels": sample.labels + 1})
            yield images, targets, epoch
        epoch += 1


def lr_factor(step: int, fraction: float) -> float:
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (0.1 if fraction >= DROP_AFTER else 1.0)


def main(options: RefereeOptions) -> int:
    torch.manual_seed(options.seed)
    train_set = build_dataset(options.dataset, "train")
    val_set = build_dataset(options.dataset, "val", categories=train_set.categories)
    model = faster_rcnn(train_set.num_classes, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, LR, momentum=0.9, weight_decay=1e-4)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(folder / "metrics.csv", folder / "tensorboard", (*METRICS, "trained_seconds"), 0)
    model.train()
    seconds, step, epoch, budget = 0.0, 0, 0, 60 * options.minutes
    feed = batches(train_set, options.seed)
    while seconds < budget:
        began = time.perf_counter()
        images, targets, now = next(feed)
        for group in optimizer.param_groups:
            group["lr"] = LR * lr_factor(step, seconds / budget)
        optimizer.zero_grad()
        torch.stack(list(model(images, targets).values())).sum().backward()
        optimizer.step()
        step += 1
        seconds += time.perf_counter() - began
        if (now > epoch and now % options.eval_every == 0) or seconds >= budget:
            found = evaluate_detector(Judged(model), val_set, evaluation_loader(val_set, BATCH, 0))
            log.write("val", now, step, seconds, found.measured | {"trained_seconds": seconds})
            print(f"{seconds:.0f} s, epoch {now}: {found.line()}", flush=True)
        epoch = now
    log.close()
    return 0


if __name__ == "__main__":
    run(main, RefereeOptions)
