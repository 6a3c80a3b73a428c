"""Every option of the commands, stated once: frozen dataclasses, composed of groups, checked when made."""

import sys
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import tyro

from detr_fast.augmentation_options import COMPOSING, AugmentationOptions
from detr_fast.config import MODELS, ModelConfig, model_config, require
from detr_fast.option_groups import Idle, Options

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Kernels = Literal["auto", "triton", "ref"]
Attention = Literal["auto", "blocked", "sdpa", "xformers", "triton", "ref"]
HostAllocator = Literal["auto", "keep", "system"]
Recipe = Literal["paper", "small", "tiny"]
SigmoidLoss = Literal["focal", "varifocal"]
Output = Annotated[str, tyro.conf.arg(aliases=("--out",))]
"""A file or folder to write; --out is short for --output."""


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(Options):
    """Choose device, precision and backends: the same words in train, evaluate and predict."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("tune", lambda o: o.tune and o.kernels == "ref", "with --kernels ref: give --kernels auto"),
    )
    switches: ClassVar[tuple[str, ...]] = (
        *("precision", "kernels", "attention", "compile", "channels_last", "host_allocator"),
    )
    """Its options on which the speed of a step depends."""
    device: Device = "auto"
    """auto: the GPU where there is one."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware multiplies in it, else fp32."""
    compile: bool | None = None
    """Compile the model with torch.compile; needs a C++ compiler on a CPU. Without the option: where it was measured to
    be faster here."""
    channels_last: bool | None = None
    """Convolutions in NHWC order. Without the option: unless NCHW was measured to be faster here."""
    kernels: Kernels = "auto"
    """auto: what was measured to be fastest on this device; triton: every kernel of ours; ref: DETR's own sequence of
    operations, nothing fused or folded."""
    attention: Attention = "auto"
    """auto: what was measured to win on this device, else sdpa, on a CPU in bf16 blocked; sdpa: torch's
    scaled_dot_product_attention; blocked: ours for a CPU; xformers: FlashAttention; triton: our kernel; ref: with
    materialised weights."""
    tune: bool = True
    """Use what `python -m detr_profiling tune` measured here; training on a GPU that has no such entry measures first,
    for at most a minute."""
    host_allocator: HostAllocator = "auto"
    """keep: freed memory of the host is kept by the process, in large pages; system: glibc as it is; auto: keep on a
    CPU with glibc. It holds for the whole process."""

    def asked(self) -> dict[str, Any]:
        """Return, by name, the switches that are not left open: what is measured with them serves such runs alone."""
        return {name: value for name in self.switches if (value := getattr(self, name)) not in (None, "auto")}


@dataclass(frozen=True, kw_only=True)
class LocationOptions(Options):
    """Say where images lie."""

    data: str = "shapes:128"
    """A folder in COCO layout, or shapes:SIDE, the embedded data set at that image side."""
    train_images: str | None = None
    """Folder of the training images, instead of the one found under --data; likewise the next three."""
    train_annotations: str | None = None
    val_images: str | None = None
    val_annotations: str | None = None
    workers: int | None = None
    """Processes that read images; default: beside a GPU a core each, one left to it; none on a CPU, whose cores the
    model needs itself."""
    follow_links: bool = False
    """Read images that are symbolic links out of their folder (DVC, git-annex): of a data set that you trust."""

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers >= 0, f"--workers must be at least 0, got {self.workers}.")
        require(
            (self.train_images is None) == (self.train_annotations is None),
            "Give --train-images and --train-annotations together.",
        )
        require(
            (self.val_images is None) == (self.val_annotations is None),
            "Give --val-images and --val-annotations together.",
        )


@dataclass(frozen=True, kw_only=True)
class DataOptions(LocationOptions):
    """Say where images lie and how they are read."""

    image_size: int | None = None
    """Shorter side at evaluation in pixels; default: the model's (800)."""
    max_size: int | None = None
    """Bound on the longer side in pixels; default: the model's (1333)."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Treatment of an image that cannot be decoded: end with an error, or leave it out and go on."""

    def sizes_given(self) -> dict[str, Any]:
        """Return the fields of ModelConfig that are asked for."""
        asked = {"image_size": self.image_size, "max_size": self.max_size}
        return {name: value for name, value in asked.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ArchitectureOptions(Options):
    """Choose the network. An option that is not given is as the model has it."""

    model: str = "detr_r50"
    """detr_r50, detr_r50_dc5, detr_r101, detr_r101_dc5, detr_lite, detr_tiny, or a timm backbone's name."""
    num_classes: int | None = None
    num_queries: int | None = None
    encoder_layers: int | None = None
    """Fewer learn faster from little data, and so do fewer of the next."""
    decoder_layers: int | None = None
    dropout: float | None = None
    source_position: bool | None = None
    """Add positions to the encoder's input too. Learns faster, but is no longer DETR; likewise all that follow."""
    token_stride: int | None = None
    """Pixels a token is wide: the backbone's feature map of that stride."""
    feature_strides: tuple[int, ...] | None = None
    """Strides of more feature maps that every token is made of too, as 32 beside 16."""
    size_divisible: int | None = None
    """Pad images to multiples of so many pixels, as a backbone needs whose convolutions pad by an image's size."""
    token_norm: bool | None = None
    """Norm the tokens before the encoder."""
    fold_norms: bool | None = None
    """Make the frozen batch norms of a timm backbone part of its convolutions, whose biases then learn."""
    position_temperature: float | None = None
    """Base of the periods of sine positions: DETR's 10,000, or 20."""
    queries: Literal["learned", "encoder"] | None = None
    """learned: the same for every image; encoder: the tokens that propose the best boxes."""
    query_positions: Literal["learned", "boxes"] | None = None
    """boxes: made anew in every decoder layer from the boxes that it corrects."""
    box_refinement: bool | None = None
    """Each decoder layer corrects the boxes of the one before."""
    layer_heads: bool | None = None
    """Class and box heads of its own for every decoder layer."""
    scores: Literal["softmax", "sigmoid"] | None = None
    """softmax: one class a query, or no object; sigmoid: each class by itself, with the focal loss."""

    def changes(self) -> dict[str, Any]:
        """Return the fields of ModelConfig that are asked for."""
        names = ArchitectureOptions.field_types().keys() - {"model"}
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def config(self, **changes: Any) -> ModelConfig:
        """Return the model's configuration with `changes`. Raises UserError for a model that there is not."""
        return model_config(self.model, **(self.changes() | changes))


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(ArchitectureOptions):
    """Choose the network, and the weights that it begins with. An option that is not given is as the model has it; the
    classes are the data's. With more of them than the largest category id, as DETR's 91 for COCO, the labels are those
    ids themselves."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("backbone_weights", lambda o: o.weights, "beside --weights, which hold the backbone's: give one of them"),
        Idle(
            "backbone_weights",
            lambda o: o.model == "detr_tiny" and o.backbone_weights == "imagenet",
            "with --model detr_tiny, which nobody trained on ImageNet: give a file, or none",
        ),
    )
    weights: str | None = None
    """Start from these detector weights (own, facebookresearch or Hugging Face), the class head fitted to the data."""
    backbone_weights: str = "imagenet"
    """imagenet (downloaded, but detr_lite's), none (random), or a file."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options):
    """Set how long to train, on how many images a step, and by which rule."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("lr_drop", lambda o: o.schedule != "step", "with --schedule cosine: give --schedule step"),
        Idle("epochs", lambda o: o.minutes, "beside --minutes: give one of them"),
    )
    epochs: int = 300
    minutes: float = 0
    """Train for that long, evaluations apart, instead of --epochs: the schedule ends within it. Two such runs differ;
    what one came to, it says as --epochs."""
    batch_size: int = 0
    """Images a step on each device, before accumulation; 0: as many as the effective batch leaves to a device."""
    accumulate: int = 0
    """Batches whose gradients make one optimizer step; 0: 1, or with an effective batch as many as it takes."""
    effective_batch: int = 0
    """Images an update, of all devices and accumulated batches; 0: the recipe's 16 where no --batch-size is given."""
    scale_lr: bool = False
    """Multiply the learning rates by the effective batch over the recipe's 16; give --warmup-steps with it."""
    lr: float = 1e-4
    lr_backbone: float = 1e-5
    weight_decay: float = 1e-4
    muon: bool = False
    """Orthogonalize the updates of the transformer's matrices (Muon; Jordan et al. 2024), at AdamW's learning rate; all
    else stays with AdamW."""
    clip: float = 0.1
    """Largest norm of all gradients together; 0: no clipping."""
    schedule: Literal["step", "cosine"] = "step"
    lr_drop: int = 200
    """Epochs after which, each time, the step schedule divides the learning rates by ten."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rates rise from zero."""
    ema: float = 0.0
    """Decay of the EMA model, which is then evaluated and kept beside the trained one; 0: none."""
    no_object_weight: float = 0.1
    """Weight of "no object" among the classes in the loss."""
    class_loss: SigmoidLoss = "focal"
    """Loss of sigmoid scores; varifocal: of an object, the IoU of its box is the score to reach."""
    groups: int = 1
    """Sets of queries to train, each matched by itself; all but the first are left behind with training."""
    denoise: int = 0
    """Sets of queries to train that are noised targets; they are left behind, too."""


@dataclass(frozen=True, kw_only=True)
class TrainRuntimeOptions(RuntimeOptions):
    """Choose device, precision and backends of the training step, and of the evaluations between."""

    switches: ClassVar[tuple[str, ...]] = (*RuntimeOptions.switches, "capture")
    capture: bool | None = None
    """Replay the optimizer step as CUDA graphs, one for each shape of batch; needs a GPU. Without the option: where it
    was measured to be faster here."""
    checkpoint_activations: bool = False
    """Recompute the transformer's activations in the backward pass: less memory, more time."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """Train a detector. All defaults are the recipe's."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(
            "class_loss",
            lambda o: o.network.config().scores == "softmax",
            "on softmax scores: give --scores sigmoid, or --model detr_lite",
        ),
        Idle("profile", lambda o: o.data_only, "with --data-only, which makes no step: leave that out"),
        Idle(
            "data",
            lambda o: o.dataset.train_images and o.dataset.val_images,
            "beside --train-images and --val-images: give it alone",
        ),
        Idle(
            "train_sizes",
            lambda o: (
                max(o.augmentation.train_sizes)
                > (o.dataset.max_size or MODELS.get(o.network.model, ModelConfig()).max_size)
            ),
            "where a size is above --max-size, the bound on the longer side: give a larger --max-size too",
        ),
    )
    recipe: Recipe = "paper"
    """Defaults of all other options. paper: those of DETR's authors (Carion et al. 2020, section A.4); small: for some
    hundred photographs, detr_lite's; tiny: detr_tiny's."""
    output: str = "runs/default"
    """Folder for everything a run leaves behind."""
    resume: str | None = None
    """A checkpoint to continue, or auto: the output folder's last one, if there is one."""
    seed: int = 42
    """Seed of weights, data order, augmentation and dropout."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    log_every: int = 10
    """Optimizer steps between log lines; the only times that the step's values are read."""
    save_every: int = 0
    """Optimizer steps between checkpoints within an epoch; 0: at epoch ends alone."""
    data_only: bool = False
    """Only read and resize the training images for some seconds, and say how many a second."""
    profile: int = 0
    """Write a trace of that many steps, after the first three, as Chrome and Perfetto read it: trace.json in the
    output folder."""

    dataset: DataOptions = DataOptions()
    network: NetworkOptions = NetworkOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    augmentation: AugmentationOptions = AugmentationOptions()
    runtime: TrainRuntimeOptions = TrainRuntimeOptions()

    def __post_init__(self) -> None:
        values = self.to_dict()
        for name, (least, most) in LIMITS.items():
            value = values[name]
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                require(value >= least, f"{option} must be at least {least}, got {value}.")
                require(value <= most, f"{option} must be at most {most}, got {value}.")
        require(
            not (self.optimizer.minutes and self.augmentation.composes) or self.augmentation.compose_epochs is not None,
            f"{COMPOSING} end before a run does, and of --minutes nobody knows the epochs ahead: "
            "give --compose-epochs too.",
        )
        weight, decay = self.optimizer.no_object_weight, self.optimizer.ema
        require(weight > 0, f"--no-object-weight must be positive, got {weight}.")
        require(decay < 1, f"--ema must be in [0, 1), got {decay}.")


LARGEST_INT = 2**53
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("epochs", "lr_drop", "eval_every", "log_every", "groups"), (1, LARGEST_INT)),
    **dict.fromkeys(("batch_size", "accumulate", "effective_batch", "warmup_steps"), (0, LARGEST_INT)),
    **dict.fromkeys(("save_every", "profile", "denoise"), (0, LARGEST_INT)),
    **dict.fromkeys(("lr", "lr_backbone", "weight_decay", "clip", "no_object_weight"), (0, sys.float_info.max)),
    **dict.fromkeys(("num_classes", "num_queries", "decoder_layers", "image_size", "max_size"), (1, LARGEST_INT)),
    "size_divisible": (1, 1024),
    **{"encoder_layers": (0, LARGEST_INT), "ema": (0, 1), "dropout": (0, 1), "minutes": (0, LARGEST_INT)},
    **dict.fromkeys(("min_visible", "color_jitter", "mosaic", "mixup", "copy_paste"), (0, 1)),
    **{"token_stride": (1, LARGEST_INT), "position_temperature": (1, sys.float_info.max)},
    **{"workers": (0, 1024), "seed": (-(2**63), 2**63 - 1)},
}
"""Least and most of every number that training is given; NaN is neither."""
RECIPE_BATCH = 16
"""Images an update that the recipes' learning rates are made for: DETR's published runs have 2 on each of 8 GPUs."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """Evaluate a detector on a data set's validation (or test) images."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("train_images", lambda o: o.split != "train", "without --split train: give that too"),
        Idle("val_images", lambda o: o.split != "val", "with another --split than val: give --split val"),
        Idle(
            "data",
            lambda o: o.dataset.train_images and o.split == "train",
            "beside --train-images: give one of them",
        ),
        Idle("data", lambda o: o.dataset.val_images and o.split == "val", "beside --val-images: give one of them"),
    )
    weights: str
    """Own checkpoint, facebookresearch .pth, Hugging Face folder or .safetensors."""
    split: str = "val"
    """Which annotations to evaluate on: val, test or train."""
    categories: str | None = None
    """A COCO json that names the weights' classes, where they do not: ids are labels. With the weights' own names, it
    gives their ids."""
    output: str = "runs/evaluation"
    """Folder for evaluation.json and the pictures."""
    batch_size: int = 2
    """Images a step."""
    pycocotools: bool = False
    """Compute the numbers by COCO's own tool instead of hotcoco: the same ones, a hundred times slower."""

    dataset: DataOptions = DataOptions()
    runtime: RuntimeOptions = RuntimeOptions()

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"--batch-size must be at least 1, got {self.batch_size}.")


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Options):
    """Find objects in photographs."""

    images: tyro.conf.Positional[str]
    """An image or a folder of images."""
    weights: str
    """Own checkpoint, facebookresearch .pth, Hugging Face folder or .safetensors."""
    categories: str | None = None
    """A COCO json that names the weights' classes, where they do not: ids are labels."""
    output: Output = "runs/predictions"
    """Folder for predictions.json and the pictures."""
    threshold: float | None = None
    """Least score of a box that is kept; default: 0.7, of sigmoid scores, which are lower, 0.35."""
    batch_size: int = 1
    """Images a step."""

    runtime: RuntimeOptions = RuntimeOptions()
