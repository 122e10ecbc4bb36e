"""MobileNet for ImageNet.

Howard et al., "MobileNets: efficient convolutional neural networks for mobile vision applications", 2017.
Convolutions start as PyTorch's do: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).
"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

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

# (channels as a multiple of the stem's, stride) of the units of each block.
BLOCKS = (
    ((2, 1), (4, 2), (4, 1)),
    ((8, 2), (8, 1)),
    ((16, 2),) + ((16, 1),) * 5,
    ((32, 2), (32, 1)),
)


class SeparableUnit(nn.Module):
    """A depthwise 3x3 convolution, then 1x1; normalization and ReLU follow each."""

    features: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch new_height new_width features"]:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        layer = functools.partial(ConvNorm, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=uniform_fan_in)
        x = nn.relu(layer(x.shape[-1], 3, self.stride, groups=x.shape[-1], name="layer1")(x, train))
        return nn.relu(layer(self.features, 1, name="layer2")(x, train))


class MobileNet(nn.Module):
    """A strided 3x3 stem, four blocks of depthwise separable units (each halves the map), mean, linear head.

    Attributes:
      num_classes: at least 2.
      width: channels of the stem; the blocks end with 4, 8, 16 and 32 times as many.
      dtype: of the convolutions; the pooled vector and the logits are float32 at least.
      param_dtype: of the parameters; the running statistics are float32 at least.

    Raises:
      UserError: where a field is not as above, or the images are not floating [batch, height, width,
        channels].
    """

    num_classes: int = 1000
    width: int = 32
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_classes(self.num_classes)
        check_width(self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Returns logits and the features "stem", "block1" ... "block4" and "pool"."""
        types = self.dtype, self.param_dtype
        stem = ConvNorm(self.width, 3, 2, *types, kernel_init=uniform_fan_in, name="stem")
        x = keep(nn.relu(stem(check_images(images, rank=4), train)))
        features = {"stem": x}
        for b, units in enumerate(BLOCKS, start=1):
            for u, (times, stride) in enumerate(units):
                unit = SeparableUnit(times * self.width, stride, *types, name=f"block{b}_{u}")
                x = keep(unit(x, train))
            features[f"block{b}"] = x
        features["pool"] = global_average_pool(x)
        return Outputs(head(features["pool"], self.num_classes, self.param_dtype), features)


mobilenet = builder(
    "mobilenet",
    MobileNet,
    "MobileNet, the first version: a stem of `width` channels, blocks that end with 4, 8, 16 and 32 times that.",
    num_classes=1000,
    width=32,
)
