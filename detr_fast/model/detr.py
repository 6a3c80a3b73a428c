"""The detector: backbone, transformer, class and box heads (DETR, Carion et al. 2020, section 3.2)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detr_kernels import Selection
from torch import Tensor, nn
from torch.nn import functional as F

from detr_fast.config import ModelConfig, require
from detr_fast.model.backbone import build_backbone
from detr_fast.model.backends import Selectable
from detr_fast.model.position_encoding import sine_position_encoding, unpadded_position_encoding
from detr_fast.model.transformer import Transformer
from detr_fast.recording import Recordings
from detr_fast.stages import stage

if TYPE_CHECKING:
    from detr_fast.data.coco import Category
    from detr_fast.evaluation.prediction import Detections


class BoxHead(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x))
        x = F.relu(self.layers[1](x))
        return self.layers[2](x)


class DETR(Selectable):
    """Images in, a fixed set of class scores and boxes out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.categories: tuple[Category, ...] | None = None
        """What each label stands for, in label order; None: labels are the data set's own ids."""
        self.notes: tuple[str, ...] = ()
        """Sentences on what was assumed where its file did not say it."""
        self.frozen = False
        """For inference alone: see `detr_fast.model.freezing`."""
        self.recordings: Recordings | None = None
        """Of its forward pass: see `detr_fast.evaluation.inference`. Void where its memory or its forms change."""
        self.backbone = build_backbone(config.backbone, config.dilation)
        dim = config.hidden_dim
        self.input_proj = nn.Conv2d(self.backbone.out_channels, dim, 1)  # type: ignore[arg-type]
        self.transformer = Transformer(
            dim,
            config.num_heads,
            config.encoder_layers,
            config.decoder_layers,
            config.feedforward_dim,
            config.dropout,
        )
        self.query_embed = nn.Embedding(config.num_queries, dim)
        self.class_embed = nn.Linear(dim, config.num_classes + 1)
        self.bbox_embed = BoxHead(dim)

    def use(self, selection: Selection) -> None:
        super().use(selection)
        self.recordings = None

    def _apply(self, *args: Any, **kwargs: Any) -> "DETR":
        """What `to` and its like do: weights come to lie elsewhere."""
        self.recordings = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: their weights lie elsewhere."""
        return {**self.__dict__, "recordings": None}

    def train(self, mode: bool = True) -> "DETR":
        """Raises UserError for a model that is frozen."""
        require(not (mode and self.frozen), "This model was made for inference alone: load it without optimize=True.")
        return super().train(mode)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Images (B, 3, H, W) normalised; mask (B, H, W) bool, True where padded, or None where nothing is.

        Returns `pred_logits` (B, Q, num_classes + 1), `pred_boxes` (B, Q, 4) cxcywh in [0, 1] of the image without its
        padding, both float32, and under `aux_outputs` the same for the decoder's earlier layers, first to last.
        """
        with stage("backbone"):
            features = self.input_proj(self.backbone(images))  # (B, D, h, w)
        padding, position = self._places(mask, features)
        source = features.flatten(2).transpose(1, 2)  # (B, N, D)
        if self.config.source_position:
            source = source + position
        states = self.transformer(source, padding, self.query_embed.weight, position)  # (L, B, Q, D)
        with stage("heads"):
            logits = self.class_embed(states).float()
            boxes = self.bbox_embed(states).float().sigmoid()
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]
        return {**layers[-1], "aux_outputs": layers[:-1]}

    def _places(self, mask: Tensor | None, features: Tensor) -> tuple[Tensor | None, Tensor]:
        """Tokens that are padding (B, N), by nearest neighbour, and positions (B, N, D); without a mask, (1, N, D)."""
        (height, width), dim = features.shape[-2:], self.config.hidden_dim
        if mask is None:
            return None, unpadded_position_encoding(height, width, dim, features.dtype, features.device)
        small_mask = F.interpolate(mask[None].float(), size=(height, width))[0].bool()
        return small_mask.flatten(1), sine_position_encoding(small_mask, dim).flatten(1, 2).to(features.dtype)

    def predict(self, images: Sequence[Any] | Any, threshold: float = 0.7) -> "list[Detections]":
        """Objects in photographs: paths, PIL images or (H, W, 3) uint8 arrays, one or a list of them.

        Returns for each image its labels, class names, scores above `threshold` and boxes xyxy in pixels.
        Raises UserError for a file that is no image.
        """
        from detr_fast.evaluation.prediction import predict

        return predict(self, images, threshold)
