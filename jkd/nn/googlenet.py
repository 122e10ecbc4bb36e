"""GoogLeNet for ImageNet.

Szegedy et al., "Going deeper with convolutions", CVPR 2015, in torchvision's form: batch normalization (with an epsilon
of 0.001) after every convolution, 3x3 where the paper has 5x5, no auxiliary heads. torchvision's dropout before the
head is left out, and its trained weights expect images in [-1, 1].
"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.channels import narrowed
from jkd.errors import UserError
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
STEM = (64, 64, 192)
# Of each inception unit: 1x1; 1x1 then 3x3; 1x1 then 3x3 again; 1x1 behind the pooling.
WIDTHS = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
POOLS = (3, 2)  # sizes of the max pooling in front of the second and the third block


_layer = functools.partial(ConvNorm, kernel_init=nn.initializers.normal(0.01), epsilon=1e-3)


def _halve(x: Maps, size: int) -> Float[Array, "batch new_height new_width channels"]:
    """Max pooling with stride 2 that leaves no pixel out: the last window may hang over the far side."""
    missing = [max(-(-(side - size) // 2), 0) * 2 + size - side for side in x.shape[1:3]]
    return nn.max_pool(x, (size, size), (2, 2), padding=tuple((0, pixels) for pixels in missing))


class InceptionUnit(nn.Module):
    """Four branches, whose channels come one behind the other.

    conv1x1; conv3x3(conv1x1); conv3x3(conv1x1); conv1x1 of the 3x3 maximum. Normalization and ReLU follow each.

    Attributes:
      widths: channels of the six convolutions, in this order.
      dtype: of the convolutions.
      param_dtype: of the parameters.
    """

    widths: tuple[int, ...]
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Float[Array, "batch height width new_channels"]:
        """Maps [B, H, W, C] to [B, H, W, D], D the sum of the first, third, fifth and sixth of `widths`."""
        layer = functools.partial(_layer, dtype=self.dtype, param_dtype=self.param_dtype)
        one, reduce2, three2, reduce3, three3, last = self.widths
        parts = [nn.relu(layer(one, 1, name="branch1")(x, train))]
        for branch, reduced, width in ((2, reduce2, three2), (3, reduce3, three3)):
            y = nn.relu(layer(reduced, 1, name=f"branch{branch}_0")(x, train))
            parts.append(nn.relu(layer(width, 3, name=f"branch{branch}_1")(y, train)))
        y = nn.max_pool(x, (3, 3), (1, 1), padding=((1, 1), (1, 1)))
        parts.append(nn.relu(layer(last, 1, name="branch4")(y, train)))
        return jnp.concatenate(parts, axis=-1)


class GoogLeNet(nn.Module):
    """A stem of three convolutions, blocks of inception units, mean, linear head.

    The stem halves the map three times; max pooling in front of each block but the first halves it again.

    Attributes:
      num_classes: at least 2.
      stem_widths: channels of the convolutions of the stem: 7x7 with stride 2, 1x1, 3x3.
      widths: of each of at most three blocks, and of each of its units, the channels of the six convolutions; see
        `InceptionUnit`.
      dtype: of the convolutions; the pooled vector and the logits are float32 at least.
      param_dtype: of the parameters; the running statistics are float32 at least.

    Raises:
      UserError: where a field is not as above, or the images are not floating [batch, height, width,
        channels].
    """

    num_classes: int
    stem_widths: tuple[int, ...] = STEM
    widths: tuple[tuple[tuple[int, ...], ...], ...] = WIDTHS
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_classes(self.num_classes)
        if not 1 <= len(self.widths) <= len(POOLS) + 1 or not all(self.widths):
            raise UserError(f"widths must name the units of one to three blocks, got {self.widths}.")
        if len(self.stem_widths) != len(STEM):
            raise UserError(f"stem_widths must name three convolutions, got {self.stem_widths}.")
        if any(len(unit) != 6 for block in self.widths for unit in block):
            raise UserError(f"widths must name the six convolutions of each unit, got {self.widths}.")
        for width in (*self.stem_widths, *(c for block in self.widths for unit in block for c in unit)):
            check_width(width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Returns logits and the features "stem", "block1" ... "blockN" and "pool"."""
        x = keep(self._stem(check_images(images, rank=4), train))
        features = {"stem": x}
        for b, units in enumerate(self.widths, start=1):
            if b > 1:
                x = _halve(x, POOLS[b - 2])
            for u, widths in enumerate(units):
                x = keep(InceptionUnit(widths, self.dtype, self.param_dtype, name=f"block{b}_{u}")(x, train))
            features[f"block{b}"] = x
        features["pool"] = global_average_pool(x)
        start = {"kernel_init": nn.initializers.normal(0.01)}
        return Outputs(head(features["pool"], self.num_classes, self.param_dtype, **start), features)

    def _stem(self, images: Maps, train: bool) -> Float[Array, "batch new_height new_width new_channels"]:
        layer = functools.partial(_layer, dtype=self.dtype, param_dtype=self.param_dtype)
        first, second, third = self.stem_widths
        x = _halve(nn.relu(layer(first, 7, 2, name="stem1")(images, train)), 3)
        x = nn.relu(layer(second, 1, name="stem2")(x, train))
        return _halve(nn.relu(layer(third, 3, name="stem3")(x, train)), 3)


def googlenet(
    num_classes: int = 1000,
    *,
    multiplier: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> GoogLeNet:
    """GoogLeNet: channels are `multiplier` times the paper's, rounded up.

    Raises:
      UserError: where `multiplier` is not positive, or there are fewer than two classes.
    """
    if not 0 < multiplier < float("inf"):
        raise UserError(f"multiplier must be positive and finite, got {multiplier}.")
    stem = tuple(narrowed(width, multiplier) for width in STEM)
    widths = tuple(tuple(tuple(narrowed(c, multiplier) for c in unit) for unit in block) for block in WIDTHS)
    return GoogLeNet(num_classes, stem, widths, dtype, param_dtype)
