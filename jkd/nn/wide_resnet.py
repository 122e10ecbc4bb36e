"""Wide residual networks for 32x32 images: WRN-d-k has depth d = 6n + 4 and k times the channels.

Zagoruyko and Komodakis, "Wide residual networks", BMVC 2016; pre-activation units after He et al., "Identity
mappings in deep residual networks", ECCV 2016. Layers and initial values are those of the CIFAR-100
distillation protocol: 1x1 shortcuts without normalization, no dropout, a classifier whose bias starts at 0.
(Its code computes three of the normalizations twice a training step, for taps, so that their running
statistics move by 0.19; here all move by 0.1.)
"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.errors import UserError
from jkd.nn.builder import Make, builder
from jkd.nn.layers import (
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


class PreactUnit(nn.Module):
    """x + conv3x3(a(conv3x3(a(x)))) where a = relu(norm(.)), the stride in the first convolution.

    Where the shape changes, the shortcut is a 1x1 convolution of a(x), not of x.
    """

    features: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Float[Array, "batch new_height new_width features"]:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        norm = functools.partial(batch_norm, train, dtype=self.dtype, param_dtype=self.param_dtype)
        layer = functools.partial(conv, self.features, dtype=self.dtype, param_dtype=self.param_dtype)
        active = nn.relu(norm(name="norm1")(x))
        y = layer(3, self.stride, name="conv1")(active)
        y = layer(3, name="conv2")(nn.relu(norm(name="norm2")(y)))
        if self.stride > 1 or x.shape[-1] != self.features:
            x = layer(1, self.stride, name="shortcut")(active)
        return x + y


class WideResNet(nn.Module):
    """A convolution, three blocks of pre-activation units, normalization and ReLU, mean, linear head.

    The taps "stem" and "block1" ... "block3" are what the blocks add to: no normalization or ReLU follows
    a block before the next one begins, so they have negative values.

    Attributes:
      num_classes: at least 2.
      depth: 6n + 4, at least 10: the convolutions and the head, with n units a block.
      widths: channels of the stem, then of each block.
      dtype: of the convolutions; the pooled vector and the logits are float32 at least.
      param_dtype: of the parameters; the running statistics are float32 at least.

    Raises:
      UserError: where a field is not as above, or the images are not floating [batch, height, width,
        channels].
    """

    num_classes: int
    depth: int
    widths: tuple[int, int, int, int]
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_classes(self.num_classes)
        for width in self.widths:
            check_width(width)
        if self.depth < 10 or self.depth % 6 != 4:
            raise UserError(f"depth must be 6n + 4, such as 16 or 40, got {self.depth}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Returns logits and the features "stem", "block1" ... "block3" and "pool"."""
        types = self.dtype, self.param_dtype
        layer = functools.partial(conv, dtype=self.dtype, param_dtype=self.param_dtype)
        x = keep(layer(self.widths[0], 3, name="stem")(check_images(images, rank=4)))
        features = {"stem": x}
        for b, width in enumerate(self.widths[1:], start=1):
            for u in range((self.depth - 4) // 6):
                stride = 2 if b > 1 and u == 0 else 1
                x = keep(PreactUnit(width, stride, *types, name=f"block{b}_{u}")(x, train))
            features[f"block{b}"] = x
        norm = batch_norm(train, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        features["pool"] = global_average_pool(nn.relu(norm(x)))
        zeros = nn.initializers.zeros
        return Outputs(head(features["pool"], self.num_classes, self.param_dtype, bias_init=zeros), features)


def _wrn(depth: int, k: int) -> Make[WideResNet]:
    def make(num_classes: int, width: int, *types: DTypeLike) -> WideResNet:
        return WideResNet(num_classes, depth, (width, k * width, 2 * k * width, 4 * k * width), *types)

    return make


_DOC = "WRN-{0}-{1}: depth {0}, a stem of `width` channels, blocks of {1}, {2} and {3} times that."

wrn_16_1 = builder("wrn_16_1", _wrn(16, 1), _DOC.format(16, 1, 2, 4), width=16)
wrn_16_2 = builder("wrn_16_2", _wrn(16, 2), _DOC.format(16, 2, 4, 8), width=16)
wrn_40_1 = builder("wrn_40_1", _wrn(40, 1), _DOC.format(40, 1, 2, 4), width=16)
wrn_40_2 = builder("wrn_40_2", _wrn(40, 2), _DOC.format(40, 2, 4, 8), width=16)

BUILDERS = (wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2)
