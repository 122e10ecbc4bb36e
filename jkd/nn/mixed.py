"""Products that compute in a low precision and give the gradients of their weights in the weights' own.

Flax casts weights to the layer's dtype before they are used, so that a bfloat16 layer computes, and sums over all
devices, its weights' gradients in bfloat16. Here the cast is part of the product:

    nn.Dense(128, dtype=jnp.bfloat16, promote_dtype=mixed.promote, dot_general=mixed.dot_general)
    nn.Conv(
        64, (3, 3), dtype=jnp.bfloat16, promote_dtype=mixed.promote, conv_general_dilated=mixed.conv_general_dilated
    )
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jkd.nn import winograd


def promote(*args: ArrayLike | None, dtype: Any = None, inexact: bool = True) -> list[Array | None]:
    """For `promote_dtype` of Flax: casts inputs to `dtype` and leaves kernel and bias as they are.

    A bias is then added in its own precision, which the layer's output takes: cast that where there is one.
    """
    del inexact  # whether integers become floats: `dtype` decides
    inputs, *weights = (None if arg is None else jnp.asarray(arg) for arg in args)
    return [inputs if dtype is None or inputs is None else inputs.astype(dtype), *weights]


def dot_general(lhs: Array, rhs: Array, *args: Any, **options: Any) -> Array:
    """`lax.dot_general` in the dtype of `lhs`; gradients have the dtypes of `lhs` and `rhs`."""
    return _product(lambda x, w: lax.dot_general(x, w, *args, **options), lhs, rhs)


def conv_general_dilated(lhs: Array, rhs: Array, *args: Any, **options: Any) -> Array:
    """`lax.conv_general_dilated` in the dtype of `lhs`; gradients have the dtypes of `lhs` and `rhs`."""
    if winograd.fits(lhs, rhs, *args, **options):
        return winograd.conv3x3(lhs, rhs)
    return _product(lambda x, w: lax.conv_general_dilated(x, w, *args, **options), lhs, rhs)


def _product(fn: Callable[[Array, Array], Array], x: Float[Array, "..."], w: Float[Array, "..."]) -> Array:
    """The bilinear `fn(x, w)` in the dtype of x.

    dL/dw is accumulated over the batch, on one device and then over all, in the wider of the two dtypes: XLA adds the
    devices' sums in whatever dtype the product has.
    """
    if x.dtype == w.dtype:
        return fn(x, w)  # and can be differentiated forwards too
    wide = jnp.promote_types(x.dtype, w.dtype)

    @jax.custom_vjp
    def product(x: Array, w: Array) -> Array:
        return fn(x, w.astype(x.dtype))

    def forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
        return product(x, w), (x, w)

    def backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
        x, w = saved
        (x_grad,) = jax.linear_transpose(lambda x: fn(x, w.astype(x.dtype)), x)(grad)
        (w_grad,) = jax.linear_transpose(lambda w: fn(x.astype(wide), w), w.astype(wide))(grad.astype(wide))
        return x_grad, w_grad.astype(w.dtype)

    product.defvjp(forward, backward)
    return product(x, w)
