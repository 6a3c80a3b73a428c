"""Detectors that no one here wrote, as their packages have them: transformers' DETR, torchvision's Faster R-CNN."""

from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.config import ModelConfig, UserError, require
from detr_fast.data.batch import Batch
from detr_fast.model.detr import DETR
from detr_fast.weights import export_state_dict
from detr_profiling.baselines.plain_loop import PlainBatch, autocast, box_targets, inference, plain_feed, training_step
from detr_profiling.batches import copied_ahead, make_batches, observed_batch
from detr_profiling.observation import Observation, on_host, stacked_layers
from detr_profiling.workload import Workload, WorkloadOptions, stepping


def hugging_face_workload(name: str, ours: DETR, options: WorkloadOptions) -> Workload:
    """Build transformers' DETR with our weights: hf-eager, hf-sdpa, or hf-compiled, which is the latter compiled.

    Trains with its own loss and `auxiliary_loss`, as people do; that feeds normed states on, which is not DETR's
    function (docs/specification.md), so only its inference is compared.
    """
    training, device = options.mode == "training", torch.device(options.runtime.device)
    model = hugging_face_model(ours, "eager" if name == "hf-eager" else "sdpa", auxiliary_loss=training).to(device)
    compiled: Any = torch.compile(model) if options.runtime.compile else model
    batches = make_batches(options, ours.config.num_classes)

    def loss(placed: PlainBatch) -> Tensor:
        labels = [{"class_labels": each["labels"], "boxes": each["boxes"]} for each in placed.targets]
        with autocast(options):
            return compiled(pixel_values=placed.images, pixel_mask=(~placed.mask).long(), labels=labels).loss

    def forward(placed: PlainBatch) -> dict[str, Any]:
        with autocast(options):
            outputs = compiled(pixel_values=placed.images, pixel_mask=(~placed.mask).long())
        return {"pred_logits": outputs.logits.float(), "pred_boxes": outputs.pred_boxes.float()}

    @torch.no_grad()
    def observe() -> Observation:
        observed = PlainBatch.of(observed_batch(options, ours.config.num_classes), ours.config)
        return on_host(stacked_layers([forward(observed.to(device))]))

    step = training_step(model, loss) if training else inference(model, forward)
    run = stepping(step, plain_feed(batches, ours.config, device), len(batches))
    return Workload(name, options, model, run, None if training else observe)


def hugging_face_model(ours: DETR, attention: str, auxiliary_loss: bool) -> nn.Module:
    """Build it without a download. Raises UserError where transformers is not there."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UserError("Hugging Face's DETR needs transformers: pip install 'detr-fast[reference]'.") from error
    config = transformers.DetrConfig(
        use_pretrained_backbone=False,
        backbone=ours.config.backbone,
        dilation=ours.config.dilation,
        num_labels=ours.config.num_classes,
        auxiliary_loss=auxiliary_loss,
        attn_implementation=attention,
    )
    model = transformers.DetrForObjectDetection(config)
    model.load_state_dict(export_state_dict(ours, "huggingface"))
    return model


def faster_rcnn_workload(config: ModelConfig, options: WorkloadOptions) -> Workload:
    """Build it with a ResNet-50 and a feature pyramid, random weights, on the same photographs, which its own first
    module resizes on the device. Raises UserError for mixed sizes, which it would make one."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    require(options.mix.size_mix == "same", "fasterrcnn resizes all images to one size: leave out --size-mix mixed.")
    device, (height, width) = torch.device(options.runtime.device), options.height_width
    model = fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=config.num_classes,
        min_size=min(height, width),
        max_size=max(height, width),
    ).to(device)
    [batch] = make_batches(options, config.num_classes)
    targets = [
        {"labels": each["labels"].clamp(min=1), "boxes": boxes_px(each["boxes"], image)}
        for each, image in zip(box_targets(batch), photographs(batch), strict=True)
    ]

    def loss(placed: Batch) -> Tensor:
        wanted = [{name: value.to(device) for name, value in each.items()} for each in targets]
        return torch.stack(list(model(photographs(placed), wanted).values())).sum()

    @torch.no_grad()
    def infer(placed: Batch) -> Any:
        return model(photographs(placed))

    step = training_step(model, loss) if options.mode == "training" else infer
    model.train(options.mode == "training")
    return Workload("fasterrcnn", options, model, stepping(step, copied_ahead([batch], device), 1))


def photographs(batch: Batch) -> list[Tensor]:
    """List the images as they were read, (3, h, w) in [0, 1], flipped where they are to be."""
    images = (image.permute(2, 0, 1) / 255 for image in batch.images)
    return [image.flip(-1) if slot.hflip else image for image, slot in zip(images, batch.images.slots, strict=True)]


def boxes_px(boxes_cxcywh: Tensor, image: Tensor) -> Tensor:
    """Convert relative boxes (T, 4) to xyxy in pixels of `image` (3, H, W)."""
    height, width = image.shape[1:]
    center, extent = (boxes_cxcywh * torch.tensor([width, height, width, height])).split(2, -1)
    return torch.cat((center - extent / 2, center + extent / 2), -1)
