"""Models by name, for configs and commands."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jkd.errors import UserError, unknown
from jkd.nn import densenet, resnet, shufflenet, vgg, wide_resnet
from jkd.nn.cnn import cnn
from jkd.nn.googlenet import googlenet
from jkd.nn.inception import inception_v3
from jkd.nn.mlp import mlp
from jkd.nn.mobilenet import mobilenet
from jkd.nn.mobilenet_v2 import mobilenet_v2, mobilenet_v2_cifar

_FAMILIES: tuple[tuple[Callable[..., nn.Module], ...], ...] = (
    (cnn, mlp),
    resnet.BUILDERS,
    wide_resnet.BUILDERS,
    vgg.BUILDERS,
    shufflenet.BUILDERS,
    (mobilenet, mobilenet_v2, mobilenet_v2_cifar),
    densenet.BUILDERS,
    (googlenet, inception_v3),
)
_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder for family in _FAMILIES for builder in family
}


def names() -> list[str]:
    """The known model names, family by family: small nets, then ResNets, then the others."""
    return list(_BUILDERS)


def build(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """Builds the model `name`, the same as calling `jkd.nn.<name>(num_classes, **kwargs)`.

    Args:
      name: one of `names()`.
      num_classes: at least 2.
      **kwargs: `dtype` and `param_dtype` (floating dtypes, or their names such as "bfloat16") for every
        model; `width` (channels of the stem, or what the builder says) for convolutional ones, `multiplier`
        (of all channels) for a MobileNetV2, GoogLeNet or Inception; `hidden` (units a layer) and `norm` for "mlp".

    Raises:
      UserError: where the name or an argument is unknown, or a value is out of range.
    """
    if name not in _BUILDERS:
        raise unknown("model", name, _BUILDERS)
    builder = _BUILDERS[name]
    accepted = set(inspect.signature(builder).parameters) - {"num_classes"}
    for argument in kwargs:
        if argument not in accepted:
            raise unknown(f"argument of {name}", argument, accepted)
    for argument in kwargs.keys() & {"dtype", "param_dtype"}:
        kwargs[argument] = _floating(argument, kwargs[argument])
    return builder(num_classes, **kwargs)


def _floating(argument: str, value: Any) -> Any:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"{argument} must be floating, such as 'float32' or 'bfloat16', got {value!r}.")
    return dtype
