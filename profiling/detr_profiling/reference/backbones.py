"""The plain reference's backbones: ResNet with frozen batch norm, operation by operation, the tiny one that learns
from scratch (He et al. 2016), and timm's.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class FixedNorm(nn.Module):
    """Batch norm whose statistics and affine terms are constants."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (buffer[:, None, None] for buffer in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Bottleneck(nn.Module):
    """ResNet's bottleneck, stride and dilation in its 3x3 convolution (He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), FixedNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = FixedNorm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), FixedNorm(4 * width)
        self.downsample = nn.Sequential()
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False), FixedNorm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """Gives the maps of `strides`, and has no stage behind them; with `dilation` (DC5) the last keeps its stride."""

    def __init__(self, name: str, dilation: bool, strides: Sequence[int]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), FixedNorm(64)
        channels = 64
        self.taken = [int(math.log2(stride)) - 2 for stride in sorted(strides)] or [3]  # stages, from 0
        for stage, blocks in enumerate(NUM_BLOCKS[name][: max(self.taken) + 1]):
            dilated = dilation and stage == 3
            layer = nn.Sequential()
            for index in range(blocks):
                stride = 2 if index == 0 and stage > 0 and not dilated else 1
                # the first block still sees the features of the stage before, so it is not dilated yet
                layer.append(Bottleneck(channels, 64 * 2**stage, stride, 2 if dilated and index > 0 else 1))
                channels = 256 * 2**stage
            self.add_module(f"layer{stage + 1}", layer)
        self.out_channels = sum(256 * 2**stage for stage in self.taken)
        for parameter_name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter_name[:6] in ("layer2", "layer3", "layer4"))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(max(self.taken) + 1):
            x = self.get_submodule(f"layer{stage + 1}")(x)
            maps.append(x)
        return [maps[stage] for stage in self.taken]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.downsample = nn.Sequential()
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class TinyNet(nn.Module):
    """Three blocks of 32, 64 and 128 channels at strides 2, 4 and 8; batch norm is live and all of it is trained."""

    out_channels = 128

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.layers = nn.Sequential(BasicBlock(32, 32, 1), BasicBlock(32, 64, 2), BasicBlock(64, 128, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.layers(F.relu(self.bn1(self.conv1(x))))]


def build_backbone(name: str, dilation: bool, strides: Sequence[int], folded: bool) -> Any:
    """Make the backbone `name`, which gives its maps of `strides`, finest first, or its last one.

    `out_channels` are those of all maps.
    """
    if name == "tiny":
        return TinyNet()
    return ResNet(name, dilation, strides) if name in NUM_BLOCKS else timm_net(name, dilation, strides, folded)


def side_by_side(maps: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """Give each cell of the first map the channels of the others: of the cell over it, or the mean of those under."""
    height, width = maps[0].shape[2:]
    cells = [maps[0]]
    for features, stride in zip(maps[1:], strides[1:], strict=True):
        if stride > strides[0]:
            times = stride // strides[0]
            rows, columns = torch.arange(height) // times, torch.arange(width) // times
            cells.append(features[:, :, rows][:, :, :, columns])
        else:
            times = strides[0] // stride
            means = [
                [features[:, :, y : y + times, x : x + times].mean((2, 3)) for x in range(0, times * width, times)]
                for y in range(0, times * height, times)
            ]
            cells.append(torch.stack([torch.stack(row, -1) for row in means], -2))
    return torch.cat(cells, 1)


def timm_net(name: str, dilation: bool, asked_strides: Sequence[int], folded: bool) -> nn.Module:
    """Make a timm model, batch norm frozen, that returns its maps of `asked_strides`, or its last one.

    `folded`: each batch norm was made part of the convolution before it, which has a bias then; only the norm's
    activation is left. Stages behind the last map are cut off, and nothing learns up to the map of stride 4.
    """
    import timm
    from timm.layers import freeze_batch_norm_2d

    asked: dict[str, Any] = {"output_stride": 16} if dilation else {}
    info = timm.create_model(name, pretrained=False, features_only=True, **asked).feature_info
    strides, made_by = info.reduction(), info.module_name()
    numbers = [strides.index(stride) for stride in sorted(asked_strides)] or [len(strides) - 1]
    body: Any = timm.create_model(name, pretrained=False, features_only=True, out_indices=numbers, **asked)
    if asked_strides and hasattr(body, "blocks"):  # timm cuts other models by itself
        body.blocks = body.blocks[: int(made_by[numbers[-1]].split(".")[1]) + 1]
    body = fold_away_norms(body) if folded else freeze_batch_norm_2d(body)
    body.out_channels = sum(info.channels()[number] for number in numbers)
    if 4 in strides[: numbers[-1]]:
        early, names = made_by[strides.index(4)], [key for key, _ in body.named_parameters()]
        last = max(index for index, key in enumerate(names) if key.replace("_", ".").startswith(f"{early}."))
        for parameter in list(body.parameters())[: last + 1]:
            parameter.requires_grad_(False)
    return body


def fold_away_norms(body: nn.Module) -> nn.Module:
    """Give each convolution with a batch norm behind it a bias, and leave of the norm only its activation."""
    conv = None
    for name, module in list(body.named_modules()):
        if isinstance(module, nn.Conv2d):
            conv = module
        elif isinstance(module, nn.BatchNorm2d):
            assert conv is not None
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
            body.set_submodule(name, getattr(module, "act", nn.Identity()))
    return body
