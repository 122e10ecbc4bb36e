"""Densely connected networks for ImageNet.

Huang et al., "Densely connected convolutional networks", CVPR 2017, in the form with bottlenecks and compression
(DenseNet-BC), with torchvision's layers and initial values.
"""

import functools
import math

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.errors import UserError
from jkd.nn.builder import Make, builder
from jkd.nn.layers import (
    ConvNorm,
    Images,
    batch_norm,
    check_classes,
    check_images,
    check_width,
    conv,
    global_average_pool,
    head,
    keep,
)
from jkd.nn.outputs import Outputs

Maps = Float[Array, "batch height width channels"]
kaiming_normal_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_conv = functools.partial(conv, kernel_init=kaiming_normal_fan_in)


class DenseLayer(nn.Module):
    """conv3x3(a(conv1x1(a(x)))) where a = relu(norm(.)): what a dense block adds to its channels.

    Attributes:
      features: channels of the output.
      bottleneck: channels between the two convolutions.
      dtype: of the convolutions.
      param_dtype: of the parameters.
    """

    features: int
    bottleneck: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Float[Array, "batch height width features"]:
        """Maps [B, H, W, C] to [B, H, W, features]."""
        norm = functools.partial(batch_norm, train, dtype=self.dtype, param_dtype=self.param_dtype)
        layer = functools.partial(_conv, dtype=self.dtype, param_dtype=self.param_dtype)
        y = layer(self.bottleneck, 1, name="conv1")(nn.relu(norm(name="norm1")(x)))
        return layer(self.features, 3, name="conv2")(nn.relu(norm(name="norm2")(y)))


class Transition(nn.Module):
    """mean2x2(conv1x1(relu(norm(x)))) between two dense blocks; an odd last row or column is left out."""

    features: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Float[Array, "batch new_height new_width features"]:
        """Maps [B, H, W, C] to [B, H // 2, W // 2, features]."""
        active = nn.relu(batch_norm(train, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(x))
        layer = _conv(self.features, 1, dtype=self.dtype, param_dtype=self.param_dtype, name="conv")
        return nn.avg_pool(layer(active), (2, 2), (2, 2))


class DenseNet(nn.Module):
    """A strided 7x7 stem and max pooling, dense blocks with transitions between them, mean, linear head.

    A layer of a block reads what entered the block and all that the layers before it put out, as channels one behind
    the other. The taps "block1" ... "blockN" are all channels at the end of a block, before the normalization and ReLU
    that follow. Each transition halves the map.

    Attributes:
      num_classes: at least 2.
      units: dense layers in each block.
      widths: channels that enter each block: those of the stem, then of each transition.
      growth: channels that each layer adds.
      bottleneck: channels inside each layer.
      dtype: of the convolutions; the pooled vector and the logits are float32 at least.
      param_dtype: of the parameters; the running statistics are float32 at least.

    Raises:
      UserError: where a field is not as above, or the images are not floating [batch, height, width,
        channels] that can be halved so often.
    """

    num_classes: int
    units: tuple[int, ...]
    widths: tuple[int, ...]
    growth: int
    bottleneck: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_classes(self.num_classes)
        for width in (*self.widths, self.growth, self.bottleneck):
            check_width(width)
        if not self.units or min(self.units) < 1:
            raise UserError(f"units must be at least 1 in each block, got {self.units}.")
        if len(self.widths) != len(self.units):
            raise UserError(
                f"widths must name what enters each block: {len(self.units)} of them for units={self.units},"
                f" got {self.widths}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Returns logits and the features "stem", "block1" ... "blockN" and "pool"."""
        types = self.dtype, self.param_dtype
        x = self._stem(check_images(images, rank=4), train)
        features = {"stem": x}
        for b, (count, width) in enumerate(zip(self.units, self.widths, strict=True), start=1):
            if b > 1:
                x = keep(Transition(width, *types, name=f"transition{b - 1}")(x, train))
            parts = [x]  # joined anew by every layer: what is kept for the gradient grows with the block, not squared
            for u in range(count):
                layer = DenseLayer(self.growth, self.bottleneck, *types, name=f"block{b}_{u}")
                parts.append(keep(layer(jnp.concatenate(parts, axis=-1), train)))
            x = features[f"block{b}"] = jnp.concatenate(parts, axis=-1)
        norm = batch_norm(train, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        features["pool"] = global_average_pool(nn.relu(norm(x)))
        zeros = nn.initializers.zeros
        return Outputs(head(features["pool"], self.num_classes, self.param_dtype, bias_init=zeros), features)

    def _stem(self, images: Maps, train: bool) -> Float[Array, "batch new_height new_width new_channels"]:
        if math.ceil(min(images.shape[1:3]) / 4) >> (len(self.units) - 1) < 1:
            raise UserError(f"images must have at least {2 ** (len(self.units) + 1) - 3} pixels, got {images.shape}.")
        stem = ConvNorm(
            self.widths[0], 7, 2, self.dtype, self.param_dtype, kernel_init=kaiming_normal_fan_in, name="stem"
        )
        x = nn.relu(stem(images, train))
        return keep(nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1))))


def _dense(units: tuple[int, ...]) -> Make[DenseNet]:
    """A transition keeps half of the channels, rounded down."""

    def make(num_classes: int, width: int, *types: DTypeLike) -> DenseNet:
        widths = [2 * width]
        for count in units[:-1]:
            widths.append((widths[-1] + count * width) // 2)
        return DenseNet(num_classes, units, tuple(widths), width, 4 * width, *types)

    return make


_DOC = "DenseNet-{}: layers that add `width` channels, a stem of 2 times that; transitions keep half of the channels."

densenet121 = builder("densenet121", _dense((6, 12, 24, 16)), _DOC.format(121), num_classes=1000, width=32)
densenet169 = builder("densenet169", _dense((6, 12, 32, 32)), _DOC.format(169), num_classes=1000, width=32)

BUILDERS = (densenet121, densenet169)
