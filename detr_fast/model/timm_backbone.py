"""Any timm model as a backbone: some of its feature maps, its batch norms frozen or folded into its convolutions."""

import copy
from typing import Any

import torch
from detr_kernels import depthwise_conv
from detr_kernels.convolution.depthwise import is_slow
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from detr_fast.config import require
from detr_fast.model.backends import Selectable
from detr_fast.model.feature_maps import joined

FROZEN_STRIDE = 4
"""Stride of the map up to which nothing learns, as of DETR's ResNet (Carion et al. 2020, A.4)."""
PROBE_SIZE = 3, 128, 96
FOLDED_CLOSE = 1e-3
"""Largest error of a map after folding, relative to its largest value: rounding alone is a thousandth of it."""


def strides_of(name: str) -> list[int]:
    """Return the strides of a timm model's feature maps, first to last."""
    import timm

    with torch.device("meta"):  # without weights
        return timm.create_model(name, pretrained=False, features_only=True).feature_info.reduction()


class DepthwiseConvolution(nn.Conv2d, Selectable):
    """A depthwise convolution of a timm model, with its parameters and its padding, by our operation."""

    operations = ("depthwise_convolution",)

    def __init__(self, conv: nn.Conv2d, same: bool) -> None:
        channels, padding = conv.in_channels, conv.padding
        with torch.device("meta"):
            super().__init__(channels, channels, conv.kernel_size, conv.stride, padding, groups=channels)  # type: ignore[arg-type]
        self.weight, self.bias, self.same = conv.weight, conv.bias, same

    def forward(self, input: Tensor) -> Tensor:
        from timm.layers import pad_same

        x = pad_same(input, self.kernel_size, self.stride) if self.same else input
        backend = self.backend("depthwise_convolution", x.device, x.dtype)
        return depthwise_conv(x, self.weight, self.bias, self.stride[0], int(self.padding[0]), backend)


def use_depthwise(body: nn.Module) -> None:
    """Replace the depthwise convolutions of `body` whose gradients the library is slow at by ours."""
    from timm.layers import Conv2dSame

    for parent in list(body.modules()):
        for name, conv in parent.named_children():
            if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, Conv2dSame):
                continue
            depthwise = conv.groups == conv.in_channels == conv.out_channels
            symmetric = len({*conv.stride}) == len({*conv.padding}) == 1
            plain = conv.dilation == (1, 1) and conv.padding_mode == "zeros"
            if depthwise and symmetric and plain and is_slow(conv.kernel_size[1], conv.stride[0]):
                setattr(parent, name, DepthwiseConvolution(conv, type(conv) is Conv2dSame))


class TimmBackbone(nn.Module):
    """A feature map of a timm model, (B, 3, H, W) -> (B, out_channels, h, w): the last one, or those of `strides`,
    joined at the size of the first.

    Raises UserError for a model that takes no images of any size, has no such map, or whose norms do not fold.
    """

    def __init__(self, name: str, dilation: bool, strides: tuple[int, ...] = (), fold_norms: bool = False) -> None:
        super().__init__()
        import timm
        from timm.layers import freeze_batch_norm_2d

        asked: dict[str, Any] = {"output_stride": 16} if dilation else {}
        if strides:
            there = strides_of(name)
            for stride in strides:
                require(stride in there, f"{name} has no feature map of stride {stride}: it has {there}.")
            asked["out_indices"] = [there.index(each) for each in sorted({FROZEN_STRIDE, *strides}) if each in there]
        body = timm.create_model(name, pretrained=False, features_only=True, **asked)
        made = body.feature_info.reduction()
        self.strides = strides or (made[-1],)
        self.taken = [made.index(stride) for stride in strides] or [len(made) - 1]
        channels: list[int] = body.feature_info.channels()
        self.out_channels = sum(channels[index] for index in self.taken)
        if strides and isinstance(getattr(body, "blocks", None), nn.Sequential):
            last = int(body.feature_info.module_name()[-1].rpartition(".")[2])
            body.blocks = body.blocks[: last + 1]  # timm cuts other models by itself
        self.body: Any = freeze_batch_norm_2d(body)
        use_depthwise(self.body)
        self.made_of, self.folded = (name, dilation, strides), False
        self._freeze_early(made)
        if fold_norms:
            require(self.fold_norms(), f"--fold-norms: {name}'s batch norms are not each behind a convolution.")

    def forward(self, images: Tensor) -> Tensor:
        maps = self.body(images)
        return joined([maps[index] for index in self.taken], self.strides)

    def _probed(self) -> list[Tensor]:
        """Return the maps of a gray image, as in evaluation."""
        training, weight = self.body.training, next(self.body.parameters())
        try:
            maps = self.body.eval()(torch.full((1, *PROBE_SIZE), 0.5, device=weight.device, dtype=weight.dtype))
            channels = sum(maps[index].shape[1] for index in self.taken)
        except (AssertionError, RuntimeError, ValueError):
            maps, channels = [], 0
        suitable = channels == self.out_channels
        require(suitable, f"--model {self.made_of[0]} takes no images of any size: choose a convolutional one.")
        self.body.train(training)
        return maps

    def _freeze_early(self, strides: list[int]) -> None:
        """Let nothing learn that the map of stride 4 is computed by."""
        maps, parameters = self._probed(), list(self.body.parameters())
        if FROZEN_STRIDE not in strides[:-1]:
            return
        early = torch.autograd.grad(maps[strides.index(FROZEN_STRIDE)].sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, early, strict=True):
            parameter.requires_grad_(gradient is None)

    @torch.no_grad()
    def fold_norms(self) -> bool:
        """Make every batch norm part of the convolution before it: nothing is left to run but its activation.

        Returns False, and changes nothing, where the map would not be the same: what a convolution computes may go
        elsewhere, too.
        """
        unfolded, before = copy.deepcopy(self.body), self._probed()
        for conv, norm_name in self._normed_convolutions():
            norm = self.body.get_submodule(norm_name)
            learns = conv.weight.requires_grad
            statistics = norm.running_mean, norm.running_var, norm.eps
            weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
            conv.weight, conv.bias = nn.Parameter(weight, learns), nn.Parameter(bias, learns)
            parent, _, attribute = norm_name.rpartition(".")
            setattr(self.body.get_submodule(parent), attribute, getattr(norm, "act", nn.Identity()))
        now = self._probed()
        pairs = [(now[index], before[index]) for index in self.taken]
        error = torch.stack([(one - other).abs().max() / other.abs().max().clamp(min=1e-12) for one, other in pairs])
        self.folded = error.is_meta or bool((error < FOLDED_CLOSE).all())  # without data there is nothing to see
        if not self.folded:
            self.body = unfolded
        return self.folded

    def _normed_convolutions(self) -> list[tuple[nn.Conv2d, str]]:
        """List each convolution whose result goes to a batch norm, and that norm's name."""
        from timm.layers import FrozenBatchNormAct2d
        from torchvision.ops import FrozenBatchNorm2d

        kinds = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
        made_by: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensors are held, so that no other has their id
        found: list[tuple[nn.Conv2d, str]] = []
        hooks = []
        for name, module in self.body.named_modules():
            if isinstance(module, nn.Conv2d):
                note = lambda conv, _, y: made_by.update({id(y): (conv, y)})  # noqa: E731
                hooks.append(module.register_forward_hook(note))
            elif isinstance(module, kinds):

                def pair(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                    if id(inputs[0]) in made_by:
                        found.append((made_by[id(inputs[0])][0], name))

                hooks.append(module.register_forward_pre_hook(pair))
        try:
            self._probed()
        finally:
            for hook in hooks:
                hook.remove()
        return found
