"""MobileNetV2 for ImageNet, and for the 32x32 images of the CIFAR-100 distillation protocol.

Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018. The first block's unit has no
expansion there. In the network of the protocol (Tian et al., "Contrastive representation distillation", ICLR 2020) it
expands once (a 1x1 convolution more), all ReLUs are plain, and the second block does not halve the map. PyTorch's
dropout before the head is left out.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
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

UNITS = (1, 2, 3, 4, 3, 3, 1)
CHANNELS = (32, 16, 24, 32, 64, 96, 160, 320)  # of the stem and the blocks
LAST = 1280
EXPANSION = 6


class Form(NamedTuple):
    """What the two networks differ in.

    Attributes:
      strides: of each block.
      relu: the activation.
      always: whether a unit that expands once has a convolution for it.
    """

    strides: tuple[int, ...]
    relu: Callable[[Array], Array]
    always: bool


FORMS = {
    "imagenet": Form((1, 2, 2, 2, 1, 2, 1), jax.nn.relu6, False),
    "cifar": Form((1, 1, 2, 2, 1, 2, 1), jax.nn.relu, True),
}


class InvertedUnit(nn.Module):
    """norm(conv1x1(relu(norm(depthwise3x3(relu(norm(conv1x1(x)))))))), plus x where the shapes are equal.

    Attributes:
      features: channels of the output, which no ReLU follows.
      stride: of the depthwise convolution.
      expansion: channels inside, as a multiple of the input's.
      form: one of FORMS.
      dtype: of the convolutions.
      param_dtype: of the parameters.
    """

    features: int
    stride: int = 1
    expansion: int = EXPANSION
    form: str = "imagenet"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch new_height new_width features"]:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        form, hidden = FORMS[self.form], self.expansion * x.shape[-1]
        layer = functools.partial(ConvNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        y = x
        if self.expansion > 1 or form.always:
            y = form.relu(layer(hidden, 1, name="expand")(y, train))
        y = form.relu(layer(hidden, 3, self.stride, groups=hidden, name="depthwise")(y, train))
        y = layer(self.features, 1, name="project")(y, train)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class MobileNetV2(nn.Module):
    """A strided stem, blocks of inverted residual units, a 1x1 convolution, mean, linear head.

    Attributes:
      num_classes: at least 2.
      units: inverted residual units in each of at most seven blocks; those of the first expand once, the others
        6 times.
      widths: channels of the stem, of each block and of the last convolution.
      form: "imagenet" or "cifar": strides, activation and first block.
      dtype: of the convolutions; the pooled vector and the logits are float32 at least.
      param_dtype: of the parameters; the running statistics are float32 at least.

    Raises:
      UserError: where a field is not as above, or the images are not floating [batch, height, width,
        channels].
    """

    num_classes: int
    units: tuple[int, ...] = UNITS
    widths: tuple[int, ...] = (*CHANNELS, LAST)
    form: str = "imagenet"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_classes(self.num_classes)
        for width in self.widths:
            check_width(width)
        if self.form not in FORMS:
            raise unknown("form", self.form, FORMS)
        if len(self.widths) != len(self.units) + 2 or len(self.units) > len(UNITS):
            raise UserError(
                f"widths must name the stem, each block and the last convolution: {len(self.units) + 2} of them for"
                f" units={self.units} (at most {len(UNITS)} blocks), got {self.widths}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Returns logits and the features "stem", "block1" ... "blockN" and "pool".

        Those of the blocks are linear: no ReLU has followed.
        """
        form, types = FORMS[self.form], (self.dtype, self.param_dtype)
        layer = functools.partial(ConvNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        x = keep(form.relu(layer(self.widths[0], 3, 2, name="stem")(check_images(images, rank=4), train)))
        features = {"stem": x}
        for b, (count, width) in enumerate(zip(self.units, self.widths[1:-1], strict=True), start=1):
            for u in range(count):
                stride = form.strides[b - 1] if u == 0 else 1
                expansion = 1 if b == 1 else EXPANSION
                unit = InvertedUnit(width, stride, expansion, self.form, *types, name=f"block{b}_{u}")
                x = keep(unit(x, train))
            features[f"block{b}"] = x
        x = keep(form.relu(layer(self.widths[-1], 1, name="last")(x, train)))
        features["pool"] = global_average_pool(x)
        start = {"kernel_init": nn.initializers.normal(0.01), "bias_init": nn.initializers.zeros}
        return Outputs(head(features["pool"], self.num_classes, self.param_dtype, **start), features)


def mobilenet_v2(
    num_classes: int = 1000,
    *,
    multiplier: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> MobileNetV2:
    """MobileNetV2 for ImageNet: channels are `multiplier` times 32, 16, 24, .. 320, in steps of 8, as in torchvision.

    The last convolution has 1280 channels, and `multiplier` times as many where that is more.
    """
    widths = [_in_eights(multiplier * channels) for channels in CHANNELS]
    last = _in_eights(max(multiplier, 1.0) * LAST)
    return MobileNetV2(num_classes, UNITS, (*widths, last), "imagenet", dtype, param_dtype)


def mobilenet_v2_cifar(
    num_classes: int = 100,
    *,
    multiplier: float = 0.5,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> MobileNetV2:
    """The protocol's MobileNetV2 for 32x32 images: half of the channels, rounded down, and 1280 of the last layer."""
    widths = [int(multiplier * channels) for channels in CHANNELS]
    last = int(max(multiplier, 1.0) * LAST)
    return MobileNetV2(num_classes, UNITS, (*widths, last), "cifar", dtype, param_dtype)


def _in_eights(channels: float) -> int:
    """The nearest multiple of 8 that is at least 8 and at least 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8
