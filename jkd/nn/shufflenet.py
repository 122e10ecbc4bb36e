"""ShuffleNets for 32x32 images, as students of the CIFAR-100 distillation protocol.

Zhang et al., "ShuffleNet: an extremely efficient convolutional neural network for mobile devices", CVPR 2018;
Ma et al., "ShuffleNet V2: practical guidelines for efficient CNN architecture design", ECCV 2018. Instead of
the papers' strided 3x3 stem and pooling there is a 1x1 convolution that keeps the resolution. Convolutions
start as PyTorch's do: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.errors import UserError
from jkd.nn.builder import builder
from jkd.nn.layers import (
    ConvNorm,
    Images,
    check_classes,
    check_images,
    check_width,
    global_average_pool,
    head,
    keep,
    uniform_fan_in,
)
from jkd.nn.outputs import Outputs

Maps = Float[Array, "batch height width channels"]
HalvedMaps = Float[Array, "batch new_height new_width features"]


def channel_shuffle(x: Maps, groups: int) -> Maps:
    """Channel c of group g moves from g * (C / groups) + c to c * groups + g."""
    *shape, channels = x.shape
    return x.reshape(*shape, groups, channels // groups).swapaxes(-1, -2).reshape(x.shape)


def _layers(module: Any) -> Callable[..., ConvNorm]:
    """ConvNorm in the dtypes of `module`, with PyTorch's initial values."""
    return functools.partial(ConvNorm, dtype=module.dtype, param_dtype=module.param_dtype, kernel_init=uniform_fan_in)


def _check_units(units: tuple[int, int, int]) -> None:
    if min(units) < 1:
        raise UserError(f"units must be at least 1 in each block, got {units}.")


class ShuffleUnit(nn.Module):
    """V1: 1x1 in groups, shuffle, depthwise 3x3, 1x1 in groups, around a shortcut.

    With stride 2 the shortcut is the 3x3 mean, concatenated behind the convolutions' channels; otherwise it
    is added.
    """

    features: int
    stride: int
    first_groups: int
    groups: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> HalvedMaps:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        layer = _layers(self)
        made = self.features - (x.shape[-1] if self.stride == 2 else 0)
        mid = made // 4
        y = nn.relu(layer(mid, 1, groups=self.first_groups, name="layer1")(x, train))
        y = channel_shuffle(y, self.first_groups)
        y = nn.relu(layer(mid, 3, self.stride, groups=mid, name="layer2")(y, train))
        y = layer(made, 1, groups=self.groups, name="layer3")(y, train)
        if self.stride == 1:
            return nn.relu(x + y)
        shortcut = nn.avg_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return nn.relu(jnp.concatenate([y, shortcut], axis=-1))


class ShuffleNetV1(nn.Module):
    """A 1x1 stem, three blocks of shuffle units (the first of each halves the map), mean, linear head.

    Convolutions are in three groups, except for the first unit's first.

    Attributes:
      num_classes: at least 2.
      width: channels of the stem, a multiple of 12; the blocks have 10, 20 and 40 times as many.
      units: of each block.
      dtype: of the convolutions; the pooled vector and the logits are float32 at least.
      param_dtype: of the parameters; the running statistics are float32 at least.

    Raises:
      UserError: where a field is not as above, or the images are not floating [batch, height, width,
        channels].
    """

    num_classes: int
    width: int = 24
    units: tuple[int, int, int] = (4, 8, 4)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_classes(self.num_classes)
        _check_units(self.units)
        if self.width < 12 or self.width % 12:
            raise UserError(f"width must be a multiple of 12, such as 24, for three groups, got {self.width}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Returns logits and the features "stem", "block1" ... "block3" and "pool"."""
        types = self.dtype, self.param_dtype
        x = keep(nn.relu(_layers(self)(self.width, 1, name="stem")(check_images(images, rank=4), train)))
        features = {"stem": x}
        for b, (count, times) in enumerate(zip(self.units, (10, 20, 40), strict=True), start=1):
            for u in range(count):
                first = 1 if b == 1 and u == 0 else 3
                stride = 1 if u else 2
                unit = ShuffleUnit(times * self.width, stride, first, 3, *types, name=f"block{b}_{u}")
                x = keep(unit(x, train))
            features[f"block{b}"] = x
        features["pool"] = global_average_pool(x)
        return Outputs(head(features["pool"], self.num_classes, self.param_dtype), features)


class SplitUnit(nn.Module):
    """V2: the second half of the channels goes through 1x1, depthwise 3x3, 1x1; then both are shuffled.

    With stride 2 all channels go there, and through a second branch: depthwise 3x3, 1x1.
    """

    features: int
    stride: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> HalvedMaps:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        layer, half = _layers(self), self.features // 2
        if self.stride == 1:
            left, x = x[..., :half], x[..., half:]
        else:
            left = layer(x.shape[-1], 3, 2, groups=x.shape[-1], name="left1")(x, train)
            left = nn.relu(layer(half, 1, name="left2")(left, train))
        y = nn.relu(layer(half, 1, name="layer1")(x, train))
        y = layer(half, 3, self.stride, groups=half, name="layer2")(y, train)
        y = nn.relu(layer(half, 1, name="layer3")(y, train))
        return channel_shuffle(jnp.concatenate([left, y], axis=-1), 2)


class ShuffleNetV2(nn.Module):
    """A 1x1 stem, three blocks of split units (the first of each halves the map), 1x1, mean, linear head.

    Attributes:
      num_classes: at least 2.
      widths: channels of the stem, of each block (even) and of the last 1x1 convolution.
      units: of each block.
      dtype: of the convolutions; the pooled vector and the logits are float32 at least.
      param_dtype: of the parameters; the running statistics are float32 at least.

    Raises:
      UserError: where a field is not as above, or the images are not floating [batch, height, width,
        channels].
    """

    num_classes: int
    widths: tuple[int, int, int, int, int] = (24, 116, 232, 464, 1024)
    units: tuple[int, int, int] = (4, 8, 4)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_classes(self.num_classes)
        for width in self.widths:
            check_width(width)
        _check_units(self.units)
        if any(width % 2 for width in self.widths[1:4]):
            raise UserError(f"the widths of the blocks must be even, got {self.widths[1:4]}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Returns logits and the features "stem", "block1" ... "block3" and "pool"."""
        layer = _layers(self)
        stem, *blocks, last = self.widths
        x = keep(nn.relu(layer(stem, 1, name="stem")(check_images(images, rank=4), train)))
        features = {"stem": x}
        for b, (count, width) in enumerate(zip(self.units, blocks, strict=True), start=1):
            for u in range(count):
                unit = SplitUnit(width, 1 if u else 2, self.dtype, self.param_dtype, name=f"block{b}_{u}")
                x = keep(unit(x, train))
            features[f"block{b}"] = x
        x = keep(nn.relu(layer(last, 1, name="last")(x, train)))
        features["pool"] = global_average_pool(x)
        return Outputs(head(features["pool"], self.num_classes, self.param_dtype), features)


def _v1(num_classes: int, width: int, *types: DTypeLike) -> ShuffleNetV1:
    return ShuffleNetV1(num_classes, width, (4, 8, 4), *types)


def _v2(num_classes: int, width: int, *types: DTypeLike) -> ShuffleNetV2:
    return ShuffleNetV2(num_classes, (24, width, 2 * width, 4 * width, 1024), (4, 8, 4), *types)


shufflenet_v1 = builder(
    "shufflenet_v1",
    _v1,
    "ShuffleNetV1 with 3 groups: a stem of `width` channels (a multiple of 12), blocks of 10, 20 and 40 times that.",
    width=24,
)
shufflenet_v2 = builder(
    "shufflenet_v2",
    _v2,
    "ShuffleNetV2: a stem of 24 channels, blocks of `width` (48: 0.5x, 116: 1x, 176: 1.5x), 2 and 4 times `width`.",
    width=116,
)

BUILDERS = (shufflenet_v1, shufflenet_v2)
