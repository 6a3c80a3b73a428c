"""Backbones: ResNet with frozen batch norm as DETR uses it, a tiny one to train from scratch, and any timm model.

ResNet: He et al. 2016, with torchvision's parameter names. DC5: DETR (Carion et al. 2020), section 4.1.
"""

from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from detr_fast.config import UserError
from detr_fast.model.normalization import FrozenBatchNorm2d, conv_norm

STAGE_WIDTHS = (64, 128, 256, 512)
DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def shortcut(in_channels: int, out_channels: int, stride: int, norm: type[nn.Module]) -> nn.Sequential | None:
    """The projection of a block's input, where the block changes its shape."""
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

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else conv_norm(x, *self.downsample)
        x = conv_norm(x, self.conv1, self.bn1).relu_()
        x = conv_norm(x, self.conv2, self.bn2).relu_()
        return conv_norm(x, self.conv3, self.bn3).add_(identity).relu_()


class ResNet(nn.Module):
    """Images (B, 3, H, W) to the last stage's features (B, out_channels, ceil(H/32), ceil(W/32)); DC5: stride 16."""

    def __init__(self, depths: tuple[int, ...], dilation: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = FrozenBatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.out_channels = 64
        for stage, (depth, width) in enumerate(zip(depths, STAGE_WIDTHS, strict=True), start=1):
            dilated = dilation and stage == 4
            stride = 1 if stage == 1 or dilated else 2
            # the first block of a dilated stage keeps the dilation of the stage before, as torchvision's does
            dilations = [1] + [2 if dilated else 1] * (depth - 1)
            blocks = []
            for index in range(depth):
                block_stride = stride if index == 0 else 1
                blocks.append(Bottleneck(self.out_channels, width, block_stride, dilations[index], FrozenBatchNorm2d))
                self.out_channels = width * Bottleneck.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        initialize_convolutions(self)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(conv_norm(images, self.conv1, self.bn1).relu_())
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[operator]


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
        identity = x if self.downsample is None else conv_norm(x, *self.downsample)
        x = conv_norm(x, self.conv1, self.bn1).relu()
        return (conv_norm(x, self.conv2, self.bn2) + identity).relu()


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
        return self.layers(conv_norm(images, self.conv1, self.bn1).relu())


def initialize_convolutions(module: nn.Module) -> None:
    """He initialisation by fan-out, as torchvision initialises a ResNet."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")


class TimmBackbone(nn.Module):
    """The last feature map of a timm model, its batch norms frozen."""

    def __init__(self, name: str, dilation: bool) -> None:
        super().__init__()
        import timm
        from timm.layers import freeze_batch_norm_2d

        stride = {"output_stride": 16} if dilation else {}
        body = timm.create_model(name, pretrained=False, features_only=True, **stride)
        self.out_channels: int = body.feature_info.channels()[-1]
        self.body = freeze_batch_norm_2d(body)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)[-1]


def build_backbone(name: str, dilation: bool) -> nn.Module:
    """A backbone with random weights and an `out_channels` attribute: resnet50, resnet101, tiny or a timm name."""
    if name in DEPTHS:
        return ResNet(DEPTHS[name], dilation)
    if name == "tiny":
        return TinyResNet()
    return TimmBackbone(name, dilation)


def load_backbone_weights(backbone: nn.Module, name: str, source: str) -> None:
    """Fills `backbone` from `source`: "imagenet" (torchvision's for a ResNet, timm's otherwise), "none", or a file.

    A file holds a plain state dict of the classifier (torchvision, timm); its head is left out. Raises UserError where
    the download fails or the file does not fit: random weights are used only when asked for as "none".
    """
    if source == "none" or (source == "imagenet" and name == "tiny"):
        return
    target = backbone.body if isinstance(backbone, TimmBackbone) else backbone
    state = download_weights(name) if source == "imagenet" else read_weights(Path(source))
    fill_backbone(target, state, source)


def download_weights(name: str) -> dict[str, Tensor]:
    """ImageNet weights of `name`. Raises UserError that names the two ways without a download."""
    try:
        if name in DEPTHS:
            import torchvision

            weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
            return weights.get_state_dict(progress=False, check_hash=True)
        import timm

        return timm.create_model(name, pretrained=True).state_dict()
    except (URLError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"Could not download ImageNet weights for {name}: {reason}\n"
            "Give a file with --backbone-weights PATH, or start from random weights with --backbone-weights none."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in `path`. Raises UserError where the file cannot be read as one."""
    from detr_fast.weights import read_state_dict

    return read_state_dict(path)


def fill_backbone(body: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads by name; where no name agrees, in order, as long as every shape does (ports that renamed the layers)."""
    own = body.state_dict()
    chosen = {key: state[key] for key in own if key in state}
    if not chosen:
        usable = [value for key, value in state.items() if not key.endswith("num_batches_tracked")]
        keys = [key for key in own if not key.endswith("num_batches_tracked")]
        chosen = dict(zip(keys, usable, strict=False))
    missing = [key for key in own if key not in chosen and not key.endswith("num_batches_tracked")]
    differing = [key for key, value in chosen.items() if own[key].shape != value.shape]
    if missing or differing:
        raise UserError(
            f"--backbone-weights {source} do not fit the backbone: {len(missing)} missing (first {missing[:2]}), "
            f"{len(differing)} of another shape (first {differing[:2]}). Give the weights of the same architecture."
        )
    with torch.no_grad():
        body.load_state_dict(chosen, strict=False)
