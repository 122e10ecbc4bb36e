"""Residual networks for 32x32 images (the CIFAR-100 distillation protocol) and for ImageNet.

He et al., "Deep residual learning for image recognition", CVPR 2016. The CIFAR family follows the networks
of Tian et al., "Contrastive representation distillation", ICLR 2020: depth 6n + 2 and 1x1 projection
shortcuts where the shape changes (the original pads with zeros). The ImageNet family is v1.5: a
bottleneck strides in its 3x3 convolution. `resnet18_cifar` and `resnet50_cifar` are its blocks behind the
stem of the CIFAR family, as in the pair ResNet-50 -> MobileNetV2 of the same protocol.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.errors import UserError, unknown
from jkd.nn.builder import Make, builder
from jkd.nn.layers import (
    ConvNorm,
    Images,
    check_classes,
    check_images,
    check_width,
    global_average_pool,
    head,
    keep,
)
from jkd.nn.outputs import Outputs

Maps = Float[Array, "batch height width channels"]
BLOCKS = ("basic", "bottleneck")
STEMS = ("cifar", "imagenet")


class BasicUnit(nn.Module):
    """relu(shortcut(x) + norm(conv3x3(relu(norm(conv3x3(x)))))), the stride in the first convolution."""

    features: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Float[Array, "batch new_height new_width features"]:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        layer = functools.partial(ConvNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        y = nn.relu(layer(self.features, 3, self.stride, name="layer1")(x, train))
        y = layer(self.features, 3, name="layer2")(y, train)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = layer(self.features, 1, self.stride, name="shortcut")(x, train)
        return nn.relu(x + y)


class BottleneckUnit(nn.Module):
    """1x1, strided 3x3, 1x1 convolutions around the shortcut; the output has 4 * `features` channels."""

    features: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Float[Array, "batch new_height new_width new_channels"]:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), 4 * features]."""
        layer = functools.partial(ConvNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        y = nn.relu(layer(self.features, 1, name="layer1")(x, train))
        y = nn.relu(layer(self.features, 3, self.stride, name="layer2")(y, train))
        y = layer(4 * self.features, 1, name="layer3")(y, train)
        if self.stride > 1 or x.shape[-1] != 4 * self.features:
            x = layer(4 * self.features, 1, self.stride, name="shortcut")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, len(units) blocks of residual units (all but the first halve the map), mean, linear head.

    Attributes:
      num_classes: at least 2.
      units: residual units in each block.
      widths: channels of the stem, then of each block (a "bottleneck" block puts out four times its own).
      block: "basic" (two 3x3 convolutions a unit) or "bottleneck".
      stem: "cifar" (3x3 convolution) or "imagenet" (7x7 stride 2, then 3x3 max pooling stride 2).
      dtype: of the convolutions; the pooled vector and the logits are float32 at least.
      param_dtype: of the parameters; the running statistics are float32 at least.

    Raises:
      UserError: where a field is not as above, or the images are not floating [batch, height, width,
        channels].
    """

    num_classes: int
    units: tuple[int, ...]
    widths: tuple[int, ...]
    block: str = "basic"
    stem: str = "cifar"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_classes(self.num_classes)
        for width in self.widths:
            check_width(width)
        if self.block not in BLOCKS:
            raise unknown("block", self.block, BLOCKS)
        if self.stem not in STEMS:
            raise unknown("stem", self.stem, STEMS)
        if len(self.widths) != len(self.units) + 1:
            raise UserError(
                f"widths must name the stem and each block: {len(self.units) + 1} of them for"
                f" units={self.units}, got {self.widths}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Returns logits and the features "stem", "block1" ... "blockN" and "pool"."""
        unit = BasicUnit if self.block == "basic" else BottleneckUnit
        x = self._stem(check_images(images, rank=4), train)
        features = {"stem": x}
        for b, (count, width) in enumerate(zip(self.units, self.widths[1:], strict=True), start=1):
            for u in range(count):
                stride = 2 if b > 1 and u == 0 else 1
                x = keep(unit(width, stride, self.dtype, self.param_dtype, name=f"block{b}_{u}")(x, train))
            features[f"block{b}"] = x
        features["pool"] = global_average_pool(x)
        return Outputs(head(features["pool"], self.num_classes, self.param_dtype), features)

    def _stem(self, images: Maps, train: bool) -> Float[Array, "batch new_height new_width new_channels"]:
        size, stride = (3, 1) if self.stem == "cifar" else (7, 2)
        stem = ConvNorm(self.widths[0], size, stride, self.dtype, self.param_dtype, name="stem")
        x = nn.relu(stem(images, train))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return keep(x)


def _cifar(depth: int, *multiples: int) -> Make[ResNet]:
    """Blocks of (depth - 2) / 6 basic units; stem and blocks have `multiples` times the width."""

    def make(num_classes: int, width: int, *types: DTypeLike) -> ResNet:
        widths = tuple(multiple * width for multiple in multiples)
        return ResNet(num_classes, ((depth - 2) // 6,) * 3, widths, "basic", "cifar", *types)

    return make


def _imagenet(units: tuple[int, ...], block: str, stem: str = "imagenet") -> Make[ResNet]:
    """Four blocks, of `units` units; the channels of the stem double from block to block."""

    def make(num_classes: int, width: int, *types: DTypeLike) -> ResNet:
        widths = (width, width, 2 * width, 4 * width, 8 * width)
        return ResNet(num_classes, units, widths, block, stem, *types)

    return make


_SLIM = "CIFAR ResNet of depth {}: blocks of `width`, 2 and 4 times `width` channels."
_TIMES4 = "CIFAR ResNet of depth {}, wide: a stem of `width`, blocks of 2, 4 and 8 times `width` channels."
_FOUR = "ResNet-{}, {}: a stem of `width` channels, which double from block to block."

resnet8 = builder("resnet8", _cifar(8, 1, 1, 2, 4), _SLIM.format(8), width=16)
resnet14 = builder("resnet14", _cifar(14, 1, 1, 2, 4), _SLIM.format(14), width=16)
resnet20 = builder("resnet20", _cifar(20, 1, 1, 2, 4), _SLIM.format(20), width=16)
resnet32 = builder("resnet32", _cifar(32, 1, 1, 2, 4), _SLIM.format(32), width=16)
resnet44 = builder("resnet44", _cifar(44, 1, 1, 2, 4), _SLIM.format(44), width=16)
resnet56 = builder("resnet56", _cifar(56, 1, 1, 2, 4), _SLIM.format(56), width=16)
resnet110 = builder("resnet110", _cifar(110, 1, 1, 2, 4), _SLIM.format(110), width=16)
resnet8x4 = builder("resnet8x4", _cifar(8, 1, 2, 4, 8), _TIMES4.format(8), width=32)
resnet32x4 = builder("resnet32x4", _cifar(32, 1, 2, 4, 8), _TIMES4.format(32), width=32)
resnet18_cifar = builder(
    "resnet18_cifar",
    _imagenet((2, 2, 2, 2), "basic", "cifar"),
    _FOUR.format(18, "for 32x32 images"),
    num_classes=100,
    width=64,
)
resnet50_cifar = builder(
    "resnet50_cifar",
    _imagenet((3, 4, 6, 3), "bottleneck", "cifar"),
    _FOUR.format(50, "for 32x32 images"),
    num_classes=100,
    width=64,
)
resnet18 = builder(
    "resnet18",
    _imagenet((2, 2, 2, 2), "basic"),
    _FOUR.format(18, "for ImageNet"),
    num_classes=1000,
    width=64,
)
resnet34 = builder(
    "resnet34",
    _imagenet((3, 4, 6, 3), "basic"),
    _FOUR.format(34, "for ImageNet"),
    num_classes=1000,
    width=64,
)
resnet50 = builder(
    "resnet50",
    _imagenet((3, 4, 6, 3), "bottleneck"),
    _FOUR.format(50, "v1.5 for ImageNet"),
    num_classes=1000,
    width=64,
)

BUILDERS = (
    resnet8,
    resnet14,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    resnet8x4,
    resnet32x4,
    resnet18_cifar,
    resnet50_cifar,
    resnet18,
    resnet34,
    resnet50,
)
