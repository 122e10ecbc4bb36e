"""A small convolutional network for digits and smoke runs."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

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


class CNN(nn.Module):
    """Three 3x3 convolutions, each with batch normalization and ReLU, global average, linear head.

    The stem keeps the resolution; "block1" and "block2" halve it and double the channels: 8x8 and 28x28
    images end as 2x2 and 7x7 maps.

    Attributes:
      num_classes: at least 2.
      width: channels of the stem.
      dtype: of the convolutions; the pooled vector and the logits are float32 at least.
      param_dtype: of the parameters; the running statistics are float32 at least.

    Raises:
      UserError: where a field is not as above, or the images are not floating [batch, height, width,
        channels].
    """

    num_classes: int = 10
    width: int = 32
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_classes(self.num_classes)
        check_width(self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Returns logits and the features "stem", "block1", "block2" and "pool"."""
        x = check_images(images, rank=4)
        features = {}
        for name, times, stride in (("stem", 1, 1), ("block1", 2, 2), ("block2", 4, 2)):
            layer = ConvNorm(times * self.width, 3, stride, self.dtype, self.param_dtype, name=name)
            x = keep(nn.relu(layer(x, train)))
            features[name] = x
        features["pool"] = global_average_pool(x)
        return Outputs(head(features["pool"], self.num_classes, self.param_dtype), features)


def cnn(
    num_classes: int = 10,
    *,
    width: int = 32,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> CNN:
    """A small convolutional network: a stem of `width` channels, blocks of 2 and 4 times that."""
    return CNN(num_classes, width, dtype, param_dtype)
