"""The batches of a workload: photographs and boxes, drawn from the seed, on the host and on their way to the device."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from detr_kernels import PackedImages

from detr_fast.data.batch import Batch, Targets
from detr_fast.data.loader import on_device
from detr_fast.training.build import shape_step_px
from detr_profiling.mixed_sizes import BatchShape, typical_shapes
from detr_profiling.workload import WorkloadOptions

SOURCE_FRACTION = 0.6
"""Side of a photograph over the side that it is resized to: 480x640 becomes 800x1066, as with most of COCO."""
EXACT_LEVELS = 16
"""Pixels that are multiples of it stay whole numbers where a side is doubled bilinearly, at every step of the way."""


def batch_shapes(options: WorkloadOptions) -> list[BatchShape]:
    """List one batch, the later half of whose images is an eighth narrower; or those that represent mixed sizes."""
    options = options.resolved()
    (height, width), images = options.height_width, options.batch_size or 1
    if options.mix.size_mix == "same":
        narrow = [index >= (images + 1) // 2 for index in range(images)]
        return [BatchShape([(height, width - width // 8 * less) for less in narrow], (height, width))]
    buckets, runtime = options.mix.buckets, options.runtime
    rounded = buckets and options.mode == "training"  # evaluation does not round
    step = shape_step_px(runtime.device, bool(runtime.compile)) if rounded else 1
    shapes = typical_shapes(images, options.seed, buckets, min(height, width))
    return [shape.in_steps(step) for shape in shapes]


def make_batches(options: WorkloadOptions, num_classes: int) -> list[Batch]:
    """Draw photographs and boxes on the host, pinned beside a GPU.

    detr_tiny's photographs have their size already, as those of the embedded data set that it is for.
    """
    fraction = 1.0 if options.network.model == "detr_tiny" else SOURCE_FRACTION
    generator = torch.Generator().manual_seed(options.seed)
    batches = []
    for shape in batch_shapes(options):
        sources = [(max(1, round(fraction * h)), max(1, round(fraction * w))) for h, w in shape.sizes]
        hflip = options.mode == "training"
        batches.append(draw_batch(shape, sources, hflip, options.objects, num_classes, generator))
    return [batch.pin_memory() for batch in batches] if options.resolved().runtime.device == "cuda" else batches


def observed_batch(options: WorkloadOptions, num_classes: int) -> Batch:
    """Draw what is compared with the reference, on the host.

    Photographs' sides are doubled, or kept where the result is odd, and their levels are such that nothing is rounded:
    elsewhere an implementation that rounds once and one that rounds after each axis differ by a level.
    """
    options = options.observed()
    generator = torch.Generator().manual_seed(options.seed)
    [shape] = batch_shapes(options)
    sources = [(exact_source_side(h), exact_source_side(w)) for h, w in shape.sizes]
    return draw_batch(shape, sources, True, options.objects, num_classes, generator, EXACT_LEVELS)


def exact_source_side(side: int) -> int:
    """Return the side from which one of `side` pixels is resized without rounding."""
    return side if side % 2 else side // 2


def draw_batch(
    shape: BatchShape,
    sources: Sequence[tuple[int, int]],
    hflip: bool,
    objects: int,
    num_classes: int,
    generator: torch.Generator,
    level_step: int = 1,
) -> Batch:
    """Draw photographs of the sizes `sources` that are resized to those of `shape`; `hflip`: every other is flipped.

    Levels are multiples of `level_step`. Each image has 1 to `objects` objects.
    """
    images = len(shape.sizes)
    photographs = [
        torch.randint(256 // level_step, (*size, 3), dtype=torch.uint8, generator=generator) * level_step
        for size in sources
    ]
    low = torch.rand(images, objects, 2, generator=generator) * 0.6
    extent = torch.rand(images, objects, 2, generator=generator) * 0.3 + 0.05
    labels = torch.randint(num_classes, (images, objects), generator=generator)
    counts = torch.randint(1, objects + 1, (images,), generator=generator)
    targets = Targets(labels, torch.cat((low + extent / 2, extent), -1), counts)
    packed = PackedImages.from_list(photographs, shape.sizes, [hflip and index % 2 == 1 for index in range(images)])
    return Batch(packed, shape.padded_size, targets, list(range(images)), torch.tensor(sources))


def copied_ahead(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on `device`, over and over; a GPU gets one ahead, beside the step, as in training."""
    return on_device(itertools.cycle(batches), device)
