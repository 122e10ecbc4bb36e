"""One signature for the functions that build the networks of a family."""

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

M = TypeVar("M", bound=nn.Module)
M_co = TypeVar("M_co", bound=nn.Module, covariant=True)
Make = Callable[..., M]


@runtime_checkable
class Builder(Protocol[M_co]):
    """A function (num_classes, *, width, dtype, param_dtype) that returns a model."""

    def __call__(
        self, num_classes: int = ..., *, width: int = ..., dtype: DTypeLike = ..., param_dtype: DTypeLike = ...
    ) -> M_co:
        """Builds the model."""


def builder(name: str, make: Make[M], doc: str, *, num_classes: int = 100, width: int) -> Builder[M]:
    """Returns the builder `name`, which calls `make(num_classes, width, dtype, param_dtype)`.

    Args:
      name: of the function, and of the model in the registry.
      make: defined in the module that the builder will be a part of.
      doc: its docstring; says what `width` counts.
      num_classes: its default number of classes.
      width: its default width.
    """

    def build(
        num_classes: int = num_classes,
        *,
        width: int = width,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ) -> M:
        return make(num_classes, width, dtype, param_dtype)

    build.__name__ = build.__qualname__ = name
    build.__module__, build.__doc__ = make.__module__, doc
    return build
