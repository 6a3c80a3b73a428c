"""Images per update: the recipe's number, whatever the devices, unless another is asked for."""

from dataclasses import replace

from detr_fast.config import RECIPE_BATCH, ModelConfig, TrainConfig, require

MOST_IMAGES = 32
"""Images of a batch on one device: more would not make a GPU busier, and images of like shape are then
harder to find."""
CPU_PX = 2 * 800 * 1333
"""Pixels of a batch on a CPU, two images of DETR's largest size: its time does not depend on the batch,
its memory does."""


def with_batches(options: TrainConfig, config: ModelConfig, device: str, processes: int, images: int) -> TrainConfig:
    """Return the options with a `batch_size` and `accumulate` of at least 1, for `images` training images.

    With a batch size alone, these are what was asked for. Else batch_size x accumulate x `processes` is the effective
    batch, in batches as large as one device takes; what does not fit into a GPU's memory is computed in micro-batches,
    which changes no number but live batch norm's. Where none is asked for and all epochs together have too few images
    for one update of the recipe's size, it is smaller. Raises UserError where it cannot be divided evenly.
    """
    if options.batch_size and not options.effective_batch:
        return replace(options, accumulate=options.accumulate or 1)
    given = (options.batch_size or 1) * (options.accumulate or 1) * processes
    largest = options.effective_batch or RECIPE_BATCH
    for effective in range(largest, 0 if not options.effective_batch else largest - 1, -given):
        chosen = shared_out(options, effective, given, config, device, processes, images)
        if options.epochs * (images // (chosen.batch_size * processes)) >= chosen.accumulate:
            return chosen
    return shared_out(options, largest, given, config, device, processes, images)


def shared_out(
    options: TrainConfig, effective: int, given: int, config: ModelConfig, device: str, processes: int, images: int
) -> TrainConfig:
    """Return the options with `effective` images an update, of which those asked for make `given`."""
    own, rest = divmod(effective, given)
    asked = f"--batch-size {options.batch_size} --accumulate {options.accumulate} (0: free)"
    require(
        rest == 0 and (own == 1 or not options.batch_size or not options.accumulate),
        f"An update of {effective} images cannot be made by {processes} processes with {asked}: give an "
        f"--effective-batch that is a multiple of {given}, or --batch-size and --accumulate alone.",
    )
    if options.batch_size:
        batch_size, accumulate = options.batch_size, options.accumulate or own
    elif options.accumulate:
        batch_size, accumulate = own, options.accumulate
    else:
        batch_size = largest_divisor(own, min(most_images(options, config, device), images // processes))
        accumulate = own // batch_size
    return replace(options, batch_size=batch_size, accumulate=accumulate, effective_batch=effective)


def most_images(options: TrainConfig, config: ModelConfig, device: str) -> int:
    """Return the most images of a batch on one device, where no number is asked for."""
    image_px = max(options.train_sizes) * (options.max_size or config.max_size)
    return MOST_IMAGES if device == "cuda" else min(MOST_IMAGES, CPU_PX // image_px)


def largest_divisor(number: int, most: int) -> int:
    return next((each for each in range(min(most, number), 1, -1) if number % each == 0), 1)


def lr_factor(options: TrainConfig, processes: int) -> float:
    """Return the factor of the learning rates: 1, or with --scale-lr the effective batch over the recipe's.

    (Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.1.)
    """
    effective = options.batch_size * options.accumulate * processes
    return effective / RECIPE_BATCH if options.scale_lr else 1.0


def batch_line(options: TrainConfig, processes: int, micro_batches: int) -> str:
    """Describe an update's batches, and how they differ from the recipe."""
    effective = options.batch_size * options.accumulate * processes
    factor = lr_factor(options, processes)
    notes = [
        f"{options.batch_size} x {options.accumulate} accumulated x {processes} processes = {effective} images a step"
    ]
    if micro_batches > 1:
        notes.append(f"each batch in {micro_batches} micro-batches to fit into the memory")
    if effective != RECIPE_BATCH:
        scaled = f"times {factor:g}" if options.scale_lr else "not scaled"
        notes.append(f"the recipe has {RECIPE_BATCH}: learning rates are {scaled}")
    return ", ".join(notes)
