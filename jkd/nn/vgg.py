"""VGG with batch normalization for 32x32 images.

Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015, in
the form of the CIFAR-100 distillation protocol: one linear layer on the mean of the last maps, and fewer
poolings, so that a 32x32 image ends as 4x4 maps.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jkd.errors import UserError
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


class VGG(nn.Module):
    """Five stages of 3x3 convolutions (with bias), each normalized and rectified; mean, linear head.

    2x2 max pooling follows the first three stages; images of 64 pixels or more are pooled after the fourth
    too (the original always is, and once more after the fifth). The taps are read before the pooling that
    follows a stage: "stem" is the first stage, at the resolution of the images.

    Attributes:
      num_classes: at least 2.
      layers: convolutions of each of the five stages.
      widths: channels of each stage.
      dtype: of the convolutions; the pooled vector and the logits are float32 at least.
      param_dtype: of the parameters; the running statistics are float32 at least.

    Raises:
      UserError: where a field is not as above, or the images are not floating [batch, height, width,
        channels] of at least 8 pixels.
    """

    num_classes: int
    layers: tuple[int, int, int, int, int]
    widths: tuple[int, int, int, int, int]
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_classes(self.num_classes)
        for width in self.widths:
            check_width(width)
        if min(self.layers) < 1:
            raise UserError(f"layers must be at least 1 in each stage, got {self.layers}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Returns logits and the features "stem", "block1" ... "block4" and "pool"."""
        x = check_images(images, rank=4)
        size = min(x.shape[1:3])
        if size < 8:
            raise UserError(f"images must have at least 8 pixels a side, which are halved 3 times, got {x.shape}.")
        layer = functools.partial(ConvNorm, dtype=self.dtype, param_dtype=self.param_dtype, use_bias=True)
        features = {}
        for b, (count, width) in enumerate(zip(self.layers, self.widths, strict=True)):
            stage = f"block{b}" if b else "stem"
            if 1 <= b <= 3 or (b == 4 and size >= 64):
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i in range(count):
                x = keep(nn.relu(layer(width, name=f"{stage}_{i}")(x, train)))
            features[stage] = x
        features["pool"] = global_average_pool(x)
        inits = {"kernel_init": nn.initializers.normal(0.01), "bias_init": nn.initializers.zeros}
        return Outputs(head(features["pool"], self.num_classes, self.param_dtype, **inits), features)


def _vgg(layers: tuple[int, int, int, int, int]) -> Make[VGG]:
    def make(num_classes: int, width: int, *types: DTypeLike) -> VGG:
        widths = (width, 2 * width, 4 * width, 8 * width, 8 * width)
        return VGG(num_classes, layers, widths, *types)

    return make


_DOC = "VGG-{} with batch normalization: stages of `width`, 2, 4, 8 and 8 times `width` channels."

vgg8 = builder("vgg8", _vgg((1, 1, 1, 1, 1)), _DOC.format(8), width=64)
vgg11 = builder("vgg11", _vgg((1, 1, 2, 2, 2)), _DOC.format(11), width=64)
vgg13 = builder("vgg13", _vgg((2, 2, 2, 2, 2)), _DOC.format(13), width=64)
vgg16 = builder("vgg16", _vgg((2, 2, 3, 3, 3)), _DOC.format(16), width=64)
vgg19 = builder("vgg19", _vgg((2, 2, 4, 4, 4)), _DOC.format(19), width=64)

BUILDERS = (vgg8, vgg11, vgg13, vgg16, vgg19)
