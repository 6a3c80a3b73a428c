"""Backbones: ResNet with frozen batch norm as DETR uses it, a tiny one to train from scratch, and any timm model.

ResNet: He et al. 2016, with torchvision's parameter names. DC5: DETR (Carion et al. 2020), section 4.1.
"""

from collections.abc import Sequence

from detr_kernels import residual_stage
from detr_kernels.convolution.stage import blocks_of
from torch import Tensor, nn

from detr_fast.config import ModelConfig, require
from detr_fast.model.backends import Selectable
from detr_fast.model.feature_maps import joined
from detr_fast.model.normalization import Fold, FrozenBatchNorm2d, computed_in, conv_norm_act, folded_together
from detr_fast.model.timm_backbone import TimmBackbone, strides_of

STAGE_WIDTHS = (64, 128, 256, 512)
DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def shortcut(in_channels: int, out_channels: int, stride: int, norm: type[nn.Module]) -> nn.Sequential | None:
    """Make the projection of a block's input, where the block changes its shape; None where it does not."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


class Bottleneck(nn.Module):
    """1x1, 3x3 (stride and dilation here), 1x1 with four times the width."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, norm: type[nn.Module]) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride, norm)

    def convolutions(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """List each convolution with its norm; the shortcut's is last."""
        shortcut = [] if self.downsample is None else [tuple(self.downsample)]
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3), *shortcut]  # type: ignore[list-item]

    def forward(self, x: Tensor, folds: Sequence[Fold | None] = (None,) * 4) -> Tensor:
        """Compute the block; `folds` are its convolutions' folded weights, where they were computed before."""
        identity = x
        if self.downsample is not None:
            identity = conv_norm_act(x, *self.downsample, relu=False, fold=folds[3])  # type: ignore[misc]
        x = conv_norm_act(x, self.conv1, self.bn1, fold=folds[0])
        x = conv_norm_act(x, self.conv2, self.bn2, fold=folds[1])
        return conv_norm_act(x, self.conv3, self.bn3, identity, fold=folds[2])


class Stage(nn.Sequential, Selectable):
    """Bottleneck blocks, the first of which changes the shape."""

    operations = ("residual_stage",)

    def forward(self, x: Tensor) -> Tensor:
        blocks: list[Bottleneck] = list(self)  # type: ignore[arg-type]
        first = blocks[0]
        if not (isinstance(first.bn1, FrozenBatchNorm2d) and first.bn1.folds):
            return super().forward(x)
        dtype = computed_in(x, first.conv1.weight)
        folds = folded_together([pair for block in blocks for pair in block.convolutions()], dtype)  # type: ignore[misc]
        backend = self.backend("residual_stage", x.device, dtype)
        if backend != "ref":
            weights, biases = zip(*folds, strict=True)
            dilations = [block.conv2.dilation[0] for block in blocks]
            return residual_stage(x.to(dtype), weights, biases, first.conv2.stride[0], dilations, backend)
        for block, its_folds in zip(blocks, blocks_of(folds), strict=True):
            x = block(x, its_folds)
        return x


class ResNet(nn.Module):
    """ResNet: images (B, 3, H, W) to features (B, out_channels, ceil(H/32), ceil(W/32)); DC5: stride 16.

    With `strides`, the feature maps of these are joined, at the size of the first; stages that none takes are left out.
    """

    def __init__(self, depths: tuple[int, ...], dilation: bool = False, strides: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = FrozenBatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.strides, channels = strides or (32,), 64
        self.taken = [f"layer{STAGE_OF_STRIDE[stride]}" for stride in self.strides]
        depths = depths[: STAGE_OF_STRIDE[max(self.strides)]]
        for stage, (depth, width) in enumerate(zip(depths, STAGE_WIDTHS, strict=False), start=1):
            dilated = dilation and stage == 4
            stride = 1 if stage == 1 or dilated else 2
            # the first block of a dilated stage keeps the dilation of the stage before, as torchvision's does
            dilations = [1] + [2 if dilated else 1] * (depth - 1)
            blocks = []
            for index in range(depth):
                block_stride = stride if index == 0 else 1
                blocks.append(Bottleneck(channels, width, block_stride, dilations[index], FrozenBatchNorm2d))
                channels = width * Bottleneck.expansion
            self.add_module(f"layer{stage}", Stage(*blocks))
        self.stages = [f"layer{stage}" for stage in range(1, len(depths) + 1)]
        self.out_channels = sum(STAGE_WIDTHS[self.stages.index(name)] * Bottleneck.expansion for name in self.taken)
        initialize_convolutions(self)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(conv_norm_act(images, self.conv1, self.bn1))
        maps = {}
        for stage in self.stages:
            maps[stage] = x = getattr(self, stage)(x)
        return joined([maps[stage] for stage in self.taken], self.strides)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        self.downsample = shortcut(in_channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        identity = (
            x if self.downsample is None else conv_norm_act(x, *self.downsample, relu=False)  # type: ignore[misc]
        )
        x = conv_norm_act(x, self.conv1, self.bn1)
        return conv_norm_act(x, self.conv2, self.bn2, identity)


class TinyResNet(nn.Module):
    """A stride-8 residual network with live batch norm, to train from scratch on small images; every layer learns."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layers = nn.Sequential(
            *(
                BasicBlock(widths[max(i - 1, 0)], width, 1 if i == 0 else 2, nn.BatchNorm2d)
                for i, width in enumerate(widths)
            )
        )
        self.out_channels = widths[-1]
        initialize_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(conv_norm_act(images, self.conv1, self.bn1))


def initialize_convolutions(module: nn.Module) -> None:
    """Initialise convolutions by fan-out (He et al. 2015), as torchvision does a ResNet's."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")


STAGE_OF_STRIDE = {8: 2, 16: 3, 32: 4}
"""Stride of a ResNet's feature map -> the stage that makes it, from 1."""


def build_backbone(
    name: str, dilation: bool = False, strides: tuple[int, ...] = (), fold_norms: bool = False
) -> nn.Module:
    """Build resnet50, resnet101, tiny or a timm backbone with random weights and an `out_channels` attribute.

    `strides`: of the feature maps that it gives, joined at the size of the first; none: the last. `fold_norms`: of a
    timm backbone. Raises UserError where it has no map of such a stride.
    """
    if name in DEPTHS:
        for stride in strides:
            require(stride in STAGE_OF_STRIDE, f"{name} has no feature map of stride {stride}: 8, 16, 32.")
        return ResNet(DEPTHS[name], dilation, strides)
    if name == "tiny":
        require(set(strides) <= {8}, f"tiny has a feature map of stride 8 alone, not {sorted(set(strides) - {8})}.")
        return TinyResNet()
    return TimmBackbone(name, dilation, strides, fold_norms)


def token_stride(config: ModelConfig) -> int:
    """Return how many pixels a token is wide, without building the network."""
    if config.token_stride is not None or config.backbone == "tiny":
        return config.token_stride or 8
    return 16 if config.dilation else 32 if config.backbone in DEPTHS else strides_of(config.backbone)[-1]
