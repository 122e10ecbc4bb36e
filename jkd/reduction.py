"""The reduction that every loss shares."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jkd.errors import unknown

REDUCTIONS = ("mean", "sum", "none")


def reduce(values: Float[Array, "*shape"], reduction: str, weights: Array | None = None) -> Array:
    """Reduces per-example `values`: their mean, their sum, or the values themselves.

    With `weights` (same shape, >= 0) the mean is sum(w v) / sum(w), and 0 where all weights are 0; the
    division is by the weights of the whole (global) array, whatever its sharding.

    Raises:
      UserError: if `reduction` is not one of "mean", "sum", "none".
    """
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    if weights is not None:
        # A masked-out row may hold inf or nan: select before multiplying.
        values = jnp.where(weights > 0, values, 0) * weights
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if weights is None:
        return values.mean()
    total = weights.sum()
    return values.sum() / jnp.where(total > 0, total, 1)
