"""Residual networks for 32x32 images (the CIFAR-100 distillation protocol) and for ImageNet.

He et al., "Deep residual learning for image recognition", CVPR 2016. The CIFAR family follows the networks
of Tian et al., "Contrastive representation distillation", ICLR 2020: depth 6n + 2 and 1x1 projection
shortcuts where the shape changes (the original pads with zeros). The ImageNet family is v1.5: a
bottleneck strides in its 3x3 convolution.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.errors import UserError, unknown
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


def _cifar(depth: int, widths: tuple[int, ...], num_classes: int, *types: DTypeLike) -> ResNet:
    return ResNet(num_classes, ((depth - 2) // 6,) * 3, widths, "basic", "cifar", *types)


def _slim(depth: int, width: int, num_classes: int, *types: DTypeLike) -> ResNet:
    return _cifar(depth, (width, width, 2 * width, 4 * width), num_classes, *types)


def _times4(depth: int, width: int, num_classes: int, *types: DTypeLike) -> ResNet:
    return _cifar(depth, (width, 2 * width, 4 * width, 8 * width), num_classes, *types)


def _imagenet(units: tuple[int, ...], block: str, width: int, num_classes: int, *types: DTypeLike) -> ResNet:
    widths = (width, width, 2 * width, 4 * width, 8 * width)
    return ResNet(num_classes, units, widths, block, "imagenet", *types)


def resnet8(
    num_classes: int = 100,
    *,
    width: int = 16,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> ResNet:
    """CIFAR ResNet of depth 8: blocks of `width`, 2 and 4 times `width` channels."""
    return _slim(8, width, num_classes, dtype, param_dtype)


def resnet14(
    num_classes: int = 100,
    *,
    width: int = 16,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> ResNet:
    """CIFAR ResNet of depth 14: blocks of `width`, 2 and 4 times `width` channels."""
    return _slim(14, width, num_classes, dtype, param_dtype)


def resnet20(
    num_classes: int = 100,
    *,
    width: int = 16,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> ResNet:
    """CIFAR ResNet of depth 20: blocks of `width`, 2 and 4 times `width` channels."""
    return _slim(20, width, num_classes, dtype, param_dtype)


def resnet32(
    num_classes: int = 100,
    *,
    width: int = 16,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> ResNet:
    """CIFAR ResNet of depth 32: blocks of `width`, 2 and 4 times `width` channels."""
    return _slim(32, width, num_classes, dtype, param_dtype)


def resnet44(
    num_classes: int = 100,
    *,
    width: int = 16,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> ResNet:
    """CIFAR ResNet of depth 44: blocks of `width`, 2 and 4 times `width` channels."""
    return _slim(44, width, num_classes, dtype, param_dtype)


def resnet56(
    num_classes: int = 100,
    *,
    width: int = 16,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> ResNet:
    """CIFAR ResNet of depth 56: blocks of `width`, 2 and 4 times `width` channels."""
    return _slim(56, width, num_classes, dtype, param_dtype)


def resnet110(
    num_classes: int = 100,
    *,
    width: int = 16,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> ResNet:
    """CIFAR ResNet of depth 110: blocks of `width`, 2 and 4 times `width` channels."""
    return _slim(110, width, num_classes, dtype, param_dtype)


def resnet8x4(
    num_classes: int = 100,
    *,
    width: int = 32,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> ResNet:
    """CIFAR ResNet of depth 8, wide: a stem of `width`, blocks of 2, 4 and 8 times `width` channels."""
    return _times4(8, width, num_classes, dtype, param_dtype)


def resnet32x4(
    num_classes: int = 100,
    *,
    width: int = 32,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> ResNet:
    """CIFAR ResNet of depth 32, wide: a stem of `width`, blocks of 2, 4 and 8 times `width` channels."""
    return _times4(32, width, num_classes, dtype, param_dtype)


def resnet18(
    num_classes: int = 1000,
    *,
    width: int = 64,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> ResNet:
    """ImageNet ResNet-18: a stem of `width` channels, which double from block to block."""
    return _imagenet((2, 2, 2, 2), "basic", width, num_classes, dtype, param_dtype)


def resnet34(
    num_classes: int = 1000,
    *,
    width: int = 64,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> ResNet:
    """ImageNet ResNet-34: a stem of `width` channels, which double from block to block."""
    return _imagenet((3, 4, 6, 3), "basic", width, num_classes, dtype, param_dtype)


def resnet50(
    num_classes: int = 1000,
    *,
    width: int = 64,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> ResNet:
    """ImageNet ResNet-50, v1.5: a stem of `width` channels, which double from block to block."""
    return _imagenet((3, 4, 6, 3), "bottleneck", width, num_classes, dtype, param_dtype)
