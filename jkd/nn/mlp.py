"""A multilayer perceptron."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jkd.nn.layers import (
    Images,
    at_least_float32,
    batch_norm,
    check_classes,
    check_images,
    check_width,
    head,
    keep,
    linear,
)
from jkd.nn.outputs import Outputs


class MLP(nn.Module):
    """Dense layers with ReLU on the flattened input, then a linear head.

    Attributes:
      hidden: units of each hidden layer; () is a linear classifier.
      num_classes: at least 2.
      norm: whether batch normalization stands before each ReLU.
      dtype: of the hidden layers; the last hidden vector ("pool") and the logits are float32 at least.
      param_dtype: of the parameters.

    Raises:
      UserError: where a field is not as above, or the images are not floating.
    """

    hidden: tuple[int, ...] = (256, 256)
    num_classes: int = 10
    norm: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_classes(self.num_classes)
        for units in self.hidden:
            check_width(units)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Returns logits and the features "hidden1" ... "hiddenN" and "pool"; `train` is for `norm` alone."""
        x = check_images(images)
        # The size is spelled out: -1 is ambiguous for an empty batch.
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        features = {}
        for i, units in enumerate(self.hidden, start=1):
            x = linear(x.shape[-1], units, self.dtype, self.param_dtype, f"hidden{i}")(x)
            if self.norm:
                x = batch_norm(train, dtype=self.dtype, param_dtype=self.param_dtype, name=f"norm{i}")(x)
            x = keep(nn.relu(x).astype(self.dtype))
            features[f"hidden{i}"] = x
        features["pool"] = x.astype(at_least_float32(self.dtype))
        return Outputs(head(features["pool"], self.num_classes, self.param_dtype), features)


def mlp(
    num_classes: int = 10,
    *,
    hidden: Sequence[int] = (256, 256),
    norm: bool = False,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> MLP:
    """A multilayer perceptron with the `hidden` layers, with batch normalization or without."""
    return MLP(tuple(hidden), num_classes, norm, dtype, param_dtype)
