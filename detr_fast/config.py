"""Every fact about a model or a run, stated once: frozen dataclasses, named presets, checked when made."""

import difflib
import math
import reprlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self, get_type_hints

import tyro
from typeguard import TypeCheckError, check_type


class UserError(Exception):
    """Something the user can mend: the message names the file, id or option and says what to do."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a misspelt `name`, with the nearest of `known`."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return UserError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")


def require(condition: bool, message: str) -> None:
    """Raises UserError(`message`) unless `condition` holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class Checked:
    """A dataclass that goes to a dict, and comes from one whose keys and types are those of its fields."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises UserError for a key that is no field, with the nearest name, for one that is missing, and for a value
        of another type."""
        if not isinstance(values, dict):
            raise UserError(f"{cls.__name__} is made of names and values, not of {reprlib.repr(values)}.")
        kinds = get_type_hints(cls)
        hints = {each.name: kinds[each.name] for each in fields(cls)}
        needed = [each.name for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING]
        missing = [name for name in needed if name not in values]
        require(not missing, f"{cls.__name__} lacks {', '.join(missing)}.")
        tupled = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        for key, value in tupled.items():
            if key not in hints:
                raise unknown_name(f"{cls.__name__} key", str(key), hints)
            try:
                check_type(value, hints[key])
            except TypeCheckError as error:
                raise UserError(f"{cls.__name__} key {key!r}: {reprlib.repr(value)} {error}.") from error
        return cls(**tupled)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The architecture and what it expects of its input; stored in every checkpoint. Defaults are DETR's (Carion et al.
    2020, section A.4)."""

    backbone: str = "resnet50"
    """resnet50, resnet101, tiny, or the name of a timm model."""
    dilation: bool = False
    """DC5: the last stage's stride becomes dilation."""
    num_classes: int = 91
    """Logits have one entry more, "no object", the last."""
    num_queries: int = 100
    hidden_dim: int = 256
    num_heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward_dim: int = 2048
    dropout: float = 0.1
    source_position: bool = False
    """Add the position to the encoder's input too, not to queries and keys alone. Not in DETR; a shallow backbone
    needs it."""
    image_size: int = 800
    """Shorter side at evaluation and prediction, in pixels."""
    max_size: int = 1333
    """Bound on the longer side, in pixels."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_queries", "hidden_dim", "num_heads", "feedforward_dim", "decoder_layers"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        require(self.encoder_layers >= 0, f"encoder_layers must not be negative, got {self.encoder_layers}.")
        require(
            self.hidden_dim % (2 * self.num_heads) == 0 and self.hidden_dim % 4 == 0,
            f"hidden_dim {self.hidden_dim} must be divisible by 4 and by twice num_heads ({self.num_heads}).",
        )
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}.")
        require(
            1 <= self.image_size <= self.max_size,
            f"image_size {self.image_size} must be between 1 and max_size {self.max_size}. "
            "Give a smaller --image-size, or a larger --max-size too.",
        )
        require(self.max_size < 1 << 31, f"max_size must be less than 2147483648, got {self.max_size}.")
        finite = all(map(math.isfinite, (*self.image_mean, *self.image_std)))
        require(
            finite and min(self.image_std) > 0,
            f"image_mean {self.image_mean} and image_std {self.image_std} must be finite, and image_std positive.",
        )


MODELS = {
    "detr_r50": ModelConfig(),
    "detr_r50_dc5": ModelConfig(dilation=True),
    "detr_r101": ModelConfig(backbone="resnet101"),
    "detr_r101_dc5": ModelConfig(backbone="resnet101", dilation=True),
    "detr_tiny": ModelConfig(
        backbone="tiny",
        num_classes=6,
        num_queries=10,
        hidden_dim=128,
        num_heads=4,
        encoder_layers=2,
        decoder_layers=3,
        feedforward_dim=256,
        dropout=0.0,
        source_position=True,
        image_size=64,
        max_size=64,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.25, 0.25, 0.25),
    ),
}


def model_config(name: str, **changes: Any) -> ModelConfig:
    """The preset `name`, or DETR's defaults around the timm backbone `name`, with `changes`. Raises UserError if
    unknown."""
    if name in MODELS:
        return replace(MODELS[name], **changes)
    try:
        import timm
    except ModuleNotFoundError as error:
        hint = unknown_name("model", name, MODELS)
        raise UserError(f"{hint} Other names are timm backbones: pip install 'detr-fast[timm]'.") from error
    if not timm.is_model(name):
        raise unknown_name("model", name, [*MODELS, *difflib.get_close_matches(name, timm.list_models(), n=3)])
    data = timm.get_pretrained_cfg(name)
    statistics = {"image_mean": tuple(data.mean), "image_std": tuple(data.std)} if data else {}
    return replace(ModelConfig(backbone=name), **(statistics | changes))


@dataclass(frozen=True)
class Idle:
    """An option that has no effect beside others: `detr_fast.command.run` refuses it where it is given by name."""

    option: str
    when: Callable[[Any], bool]
    """Whether these options leave it without effect."""
    why: str
    """Names the other option, and after a colon what to do."""

    def message(self) -> str:
        name = f"--{self.option.replace('_', '-')}"
        return f"{name} has no effect {self.why}, or leave {name} out."


Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Kernels = Literal["auto", "triton", "ref"]
Attention = Literal["auto", "blocked", "sdpa", "xformers", "triton", "ref"]
HostAllocator = Literal["auto", "keep", "system"]


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(Checked):
    """How a model runs: the same words in train, evaluate and predict."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("tune", lambda o: o.tune and o.kernels == "ref", "with --kernels ref: give --kernels auto"),
    )
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
    """auto: what was measured to win on this device, else sdpa; sdpa: torch's scaled_dot_product_attention; blocked:
    ours for dropout on a CPU; xformers: FlashAttention; triton: our kernel; ref: with materialised weights."""
    tune: bool = True
    """Use what `python -m detr_profiling tune` measured here; training on a GPU that has no such entry measures first,
    for at most a minute."""
    host_allocator: HostAllocator = "auto"
    """keep: freed memory of the host is kept by the process, in large pages; system: glibc as it is; auto: keep on a
    CPU with glibc. It holds for the whole process."""


@dataclass(frozen=True, kw_only=True)
class DataLocation(Checked):
    """Where images come from."""

    data: str = "shapes:64"
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
class DataOptions(DataLocation):
    """Where images come from and how they are read."""

    image_size: int | None = None
    """Shorter side at evaluation in pixels; default: the model's (800)."""
    max_size: int | None = None
    """Bound on the longer side in pixels; default: the model's (1333)."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What to do with an image that cannot be decoded."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataOptions, RuntimeOptions):
    """One training run. Defaults are the recipe of DETR's authors (Carion et al. 2020, section A.4); detr_tiny has its
    own."""

    idle: ClassVar[tuple[Idle, ...]] = (
        *RuntimeOptions.idle,
        Idle(
            "data", lambda o: o.train_images and o.val_images, "beside --train-images and --val-images: give it alone"
        ),
        Idle("profile", lambda o: o.data_only, "with --data-only, which makes no step: leave that out"),
        Idle("lr_drop", lambda o: o.schedule != "step", "with --schedule cosine: give --schedule step"),
        Idle("crop_range", lambda o: not o.crop_sizes, "without --crop-sizes: give them too"),
        Idle("backbone_weights", lambda o: o.weights, "beside --weights, which hold the backbone's: give one of them"),
        Idle(
            "backbone_weights",
            lambda o: o.model == "detr_tiny" and o.backbone_weights == "imagenet",
            "with --model detr_tiny, which nobody trained on ImageNet: give a file, or none",
        ),
        Idle(
            "train_sizes",
            lambda o: max(o.train_sizes) > (o.max_size or MODELS.get(o.model, ModelConfig()).max_size),
            "where a size is above --max-size, the bound on the longer side: give a larger --max-size too",
        ),
    )
    seed: int = 42
    """Seed of weights, data order, augmentation and dropout."""
    model: str = "detr_r50"
    """detr_r50, detr_r50_dc5, detr_r101, detr_r101_dc5, detr_tiny, or a timm backbone's name."""
    num_classes: int | None = None
    """Default: what the data has. More than the largest category id, as DETR's 91 for COCO: labels are the ids
    themselves."""
    num_queries: int | None = None
    """Default: the model's (100)."""
    encoder_layers: int | None = None
    """Default: the model's (6); fewer learn faster from little data, and so do fewer of the next."""
    decoder_layers: int | None = None
    source_position: bool = False
    """Add positions to the encoder's input too, as detr_tiny does. Learns faster, but is no longer DETR."""
    weights: str | None = None
    """Start from these detector weights (own, facebookresearch or Hugging Face), the class head fitted to the data."""
    backbone_weights: str = "imagenet"
    """imagenet (downloaded), none (random), or a file."""
    output: str = "runs/default"
    """Folder for everything a run leaves behind."""
    resume: str | None = None
    """A checkpoint to continue, or auto: the output folder's last one, if there is one."""

    epochs: int = 300
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
    clip: float = 0.1
    """Largest norm of all gradients together; 0: no clipping."""
    schedule: Literal["step", "cosine"] = "step"
    lr_drop: int = 200
    """Epochs after which, each time, the step schedule divides the learning rates by ten."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rates rise from zero."""
    ema: float = 0.0
    """Decay of the averaged weights, which are then evaluated and kept beside the trained ones; 0: none."""
    dropout: float | None = None
    """Default: the model's (0.1)."""
    checkpoint_activations: bool = False
    """Recompute the transformer's activations in the backward pass: less memory, more time."""
    no_object_weight: float = 0.1
    """Weight of "no object" among the classes in the loss."""

    train_sizes: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Shorter sides to draw from, in pixels."""
    crop_sizes: tuple[int, ...] = (400, 500, 600)
    """Shorter sides to draw from before a random crop, in half of the images; empty: no crops."""
    crop_range: tuple[int, int] = (384, 600)
    """Smallest and largest side of that crop, in pixels."""
    buckets: bool = True
    """Batches of images of like shape, so that little is padding; without, of any."""
    capture: bool | None = None
    """Replay the optimizer step as CUDA graphs, one for each shape of batch; needs a GPU. Without the option: where it
    was measured to be faster here."""
    data_only: bool = False
    """Only read and resize the training images for some seconds, and say how many a second."""
    profile: int = 0
    """Write a trace of that many steps, after the first three, as Chrome and Perfetto read it: trace.json in the
    output folder."""

    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    log_every: int = 10
    """Optimizer steps between log lines; the only times that the step's values are read."""
    save_every: int = 0
    """Optimizer steps between checkpoints within an epoch; 0: at epoch ends alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                require(value >= least, f"{option} must be at least {least}, got {value}.")
                require(value <= most, f"{option} must be at most {most}, got {value}.")
        require(self.no_object_weight > 0, f"--no-object-weight must be positive, got {self.no_object_weight}.")
        require(self.ema < 1, f"--ema must be in [0, 1), got {self.ema}.")
        require(len(self.train_sizes) > 0 and min(self.train_sizes) > 0, "--train-sizes needs positive sizes.")
        require(min(self.crop_sizes, default=1) > 0, "--crop-sizes needs positive sizes.")
        low, high = self.crop_range
        require(0 < low <= high, f"--crop-range {low} {high}: the smaller side comes first.")


LARGEST_INT = 2**53
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("epochs", "lr_drop", "eval_every", "log_every"), (1, LARGEST_INT)),
    **dict.fromkeys(
        ("batch_size", "accumulate", "effective_batch", "warmup_steps", "save_every", "profile"), (0, LARGEST_INT)
    ),
    **dict.fromkeys(("lr", "lr_backbone", "weight_decay", "clip", "no_object_weight"), (0, sys.float_info.max)),
    **dict.fromkeys(("num_classes", "num_queries", "decoder_layers", "image_size", "max_size"), (1, LARGEST_INT)),
    **{"encoder_layers": (0, LARGEST_INT), "ema": (0, 1), "dropout": (0, 1)},
    **{"workers": (0, 1024), "seed": (-(2**63), 2**63 - 1)},
}
"""Least and most of every number that training is given; NaN is neither."""
RECIPE_BATCH = 16
"""Images an update that the recipes' learning rates are made for: the original's published runs have 2 on each of 8
GPUs."""
RECIPES = {
    "detr_tiny": TrainConfig(
        model="detr_tiny",
        source_position=MODELS["detr_tiny"].source_position,
        backbone_weights="none",
        epochs=6,
        lr=5e-4,
        lr_backbone=5e-4,
        schedule="cosine",
        warmup_steps=200,
        train_sizes=(64,),
        crop_sizes=(),
        eval_every=3,
        log_every=20,
    )
}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataOptions, RuntimeOptions):
    """Evaluate a detector on a data set's validation (or test) images."""

    idle: ClassVar[tuple[Idle, ...]] = (
        *RuntimeOptions.idle,
        Idle("train_images", lambda o: o.split != "train", "without --split train: give that too"),
        Idle("val_images", lambda o: o.split != "val", "with another --split than val: give --split val"),
        Idle("data", lambda o: o.train_images and o.split == "train", "beside --train-images: give one of them"),
        Idle("data", lambda o: o.val_images and o.split == "val", "beside --val-images: give one of them"),
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

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size >= 1, f"--batch-size must be at least 1, got {self.batch_size}.")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(RuntimeOptions):
    """Find objects in photographs."""

    images: tyro.conf.Positional[str]
    """An image or a folder of images."""
    weights: str
    """Own checkpoint, facebookresearch .pth, Hugging Face folder or .safetensors."""
    categories: str | None = None
    """A COCO json that names the weights' classes, where they do not: ids are labels."""
    out: str = "runs/predictions"
    """Folder for predictions.json and the pictures."""
    threshold: float = 0.7
    """Least score of a box that is kept."""
    batch_size: int = 1
