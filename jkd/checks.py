"""Checks of values that are known when a function is called (traced values pass), and the types of what is accepted."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Num

from jkd.errors import UserError

Tensor = jax.Array | np.ndarray
Scalar = int | float | np.number | Num[Tensor, ""]


def concrete(value: ArrayLike) -> np.ndarray | None:
    """The host copy of `value`, or None where it is traced or lies partly on other hosts."""
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    return np.asarray(value)


def check_positive(name: str, value: ArrayLike) -> None:
    """Stops a value that is known here and not a finite number > 0.

    Raises:
      UserError: if so. A traced value passes: a bad one shows as NaN or inf in the result.
    """
    known = concrete(value)
    if known is not None and not np.all(np.isfinite(known) & (known > 0)):
        raise UserError(f"{name} must be positive and finite, got {value}.")


def check_share(name: str, value: ArrayLike) -> None:
    """Stops a value that is known here and not in [0, 1].

    Raises:
      UserError: if so, or if it is NaN.
    """
    known = concrete(value)
    if known is not None and not np.all((known >= 0) & (known <= 1)):
        raise UserError(f"{name} must lie in [0, 1], got {value}.")


def as_float(name: str, values: ArrayLike) -> Array:
    """`values` as a jax array of at least float32: bfloat16 and float16 are too coarse for losses and measures.

    Raises:
      UserError: if the values are not floating point.
    """
    if not jnp.issubdtype(jnp.result_type(values), jnp.floating):
        raise UserError(f"{name} must be floating point, got {jnp.result_type(values)}.")
    array = jnp.asarray(values)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
