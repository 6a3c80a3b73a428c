"""Every fact about a model, stated once: a frozen dataclass, checked when it is made, and named presets."""

import difflib
import math
import reprlib
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal, Self, get_type_hints

from typeguard import TypeCheckError, check_type


class UserError(Exception):
    """Something the user can mend: the message names the file, id or option and says what to do."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Make the error for a misspelt `name`, with the nearest of `known`."""
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
        hints = cls.field_types()
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
        return cls(**cls.arguments(tupled))

    @classmethod
    def field_types(cls) -> dict[str, Any]:
        """Return the type of each field by its name."""
        hints = get_type_hints(cls)
        return {each.name: hints[each.name] for each in fields(cls)}

    @classmethod
    def arguments(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return `values`, one for each field, as the constructor takes them."""
        return values

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
    token_stride: int | None = None
    """Pixels a token is wide: the backbone's feature map of that stride. None: its last map."""
    feature_strides: tuple[int, ...] = ()
    """Strides of feature maps whose channels every token has too (Hariharan et al. 2015, "hypercolumns"): a deep map
    tells classes apart, a shallow one sees small objects."""
    fold_norms: bool = False
    """Make the frozen batch norms of a timm backbone part of its convolutions, whose biases then learn."""
    size_divisible: int = 1
    """Images are padded, right and below, so that their sides are multiples of it: "same" convolutions, TensorFlow's,
    pad by what a size leaves over, and features lie elsewhere in an image of another size."""
    num_classes: int = 91
    num_queries: int = 100
    queries: Literal["learned", "encoder"] = "learned"
    """learned: the same queries for every image. encoder: the tokens with the best class scores, each of which proposes
    a box and has a loss of its own (Zhu et al. 2021, "two-stage"; Zhang et al. 2023, "query selection")."""
    query_positions: Literal["learned", "boxes"] = "learned"
    """boxes: made anew in every decoder layer from the boxes it corrects (Liu et al. 2022, DAB-DETR)."""
    box_refinement: bool = False
    """Each decoder layer corrects the boxes of the one before (Zhu et al. 2021); without, all correct the first."""
    layer_heads: bool = False
    """Every decoder layer has class and box heads of its own, instead of one pair for all."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: logits have one entry more than classes, "no object", the last. sigmoid: each class by itself, with the
    focal loss (Lin et al. 2017)."""
    hidden_dim: int = 256
    num_heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward_dim: int = 2048
    dropout: float = 0.1
    source_position: bool = False
    """Add the position to the encoder's input too, not to queries and keys alone. Not in DETR; a shallow backbone
    needs it."""
    position_temperature: float = 10000.0
    """Base of the periods of sine positions; 20 tells near places apart better."""
    token_norm: bool = False
    """Norm the tokens before the encoder: a timm backbone's features are of any size."""
    image_size: int = 800
    """Shorter side at evaluation and prediction, in pixels."""
    max_size: int = 1333
    """Bound on the longer side, in pixels."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in (
            *("num_classes", "num_queries", "hidden_dim", "num_heads", "feedforward_dim", "decoder_layers"),
            "size_divisible",
        ):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        require(self.encoder_layers >= 0, f"encoder_layers must not be negative, got {self.encoder_layers}.")
        require(
            self.hidden_dim % (2 * self.num_heads) == 0 and self.hidden_dim % 4 == 0,
            f"hidden_dim {self.hidden_dim} must be divisible by 4 and by twice num_heads ({self.num_heads}).",
        )
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}.")
        require(
            self.position_temperature > 1, f"position_temperature must be above 1, got {self.position_temperature}."
        )
        require(
            self.queries == "learned" or (self.scores, self.query_positions) == ("sigmoid", "boxes"),
            'queries "encoder" need scores "sigmoid" and query_positions "boxes".',
        )
        require(not (self.dilation and self.token_stride), "dilation and token_stride both set the stride: give one.")
        require(
            not self.feature_strides or self.token_stride is not None,
            "feature_strides join maps at token_stride: give that, too.",
        )
        require(
            all(
                stride >= 1 and 0 in (stride % self.map_strides[0], self.map_strides[0] % stride)
                for stride in self.feature_strides
            ),
            f"feature_strides {self.feature_strides} must be multiples or divisors of the token_stride, "
            f"{self.token_stride}.",
        )
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

    @property
    def beyond_detr(self) -> dict[str, Any]:
        """Return what is chosen otherwise than DETR has it, by field; sizes and the backbone are not among it."""
        usual = {each.name: each.default for each in fields(self)}
        return {name: value for name in BEYOND_DETR if (value := getattr(self, name)) != usual[name]}

    @property
    def map_strides(self) -> tuple[int, ...]:
        """Return the strides of the feature maps that tokens are made of, their own first; none: the last map."""
        return () if self.token_stride is None else tuple(dict.fromkeys((self.token_stride, *self.feature_strides)))

    @property
    def num_logits(self) -> int:
        """Count the class head's outputs."""
        return self.num_classes + (self.scores == "softmax")

    @property
    def corrects_boxes(self) -> bool:
        """Tell whether the decoder's boxes are corrections of others, instead of boxes themselves."""
        return self.box_refinement or self.query_positions == "boxes"


BEYOND_DETR = (
    *("token_stride", "feature_strides", "size_divisible", "fold_norms", "token_norm", "source_position"),
    *("position_temperature", "queries", "query_positions", "box_refinement", "layer_heads", "scores"),
)
"""Fields of ModelConfig whose defaults are DETR's and whose other values make another architecture of it."""

SAME_PADDING_STEP = 32
"""Stride of the last map: images whose sides are multiples of it are all padded alike by "same" convolutions."""

MODELS = {
    "detr_r50": ModelConfig(),
    "detr_r50_dc5": ModelConfig(dilation=True),
    "detr_r101": ModelConfig(backbone="resnet101"),
    "detr_r101_dc5": ModelConfig(backbone="resnet101", dilation=True),
    "detr_lite": ModelConfig(
        backbone="tf_efficientnet_lite0",
        token_stride=16,
        feature_strides=(8, 32),
        size_divisible=SAME_PADDING_STEP,
        fold_norms=True,
        num_queries=60,
        queries="encoder",
        query_positions="boxes",
        box_refinement=True,
        layer_heads=True,
        scores="sigmoid",
        hidden_dim=128,
        encoder_layers=1,
        decoder_layers=3,
        feedforward_dim=512,
        dropout=0.0,
        source_position=True,
        position_temperature=20.0,
        token_norm=True,
        image_size=288,
        max_size=504,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    ),
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
    """Return the preset `name`, or DETR's defaults around the timm backbone `name`, with `changes`.

    Raises UserError where it is unknown.
    """
    if name in MODELS:
        return replace(MODELS[name], **changes)
    import timm  # which takes a second

    if not timm.is_model(name):
        raise unknown_name("model", name, [*MODELS, *difflib.get_close_matches(name, timm.list_models(), n=3)])
    data = timm.get_pretrained_cfg(name)
    statistics = {"image_mean": tuple(data.mean), "image_std": tuple(data.std)} if data else {}
    step = {"size_divisible": SAME_PADDING_STEP} if pads_by_size(name) else {}
    return replace(ModelConfig(backbone=name), **(statistics | step | changes))


def pads_by_size(name: str) -> bool:
    """Tell whether convolutions or pools of a timm model pad by what an image's size leaves over."""
    import timm
    import torch

    with torch.device("meta"):  # without weights
        body = timm.create_model(name, pretrained=False)
    return any(type(module).__name__.endswith("Same") for module in body.modules())
