"""Ranks along the last axis: exact ones, and smooth ones that have a gradient."""

import jax
import jax.numpy as jnp
from jax.scipy.stats import rankdata
from jaxtyping import Array, Float

from jkd.checks import Scalar, Tensor, as_float, check_positive
from jkd.errors import UserError


def hard_ranks(x: Float[Tensor, "*batch classes"]) -> Float[Array, "*batch classes"]:
    """The ascending ranks 1..K along the last axis: the largest value has rank K.

    Equal values share the mean of their ranks, so that the ranks move with any permutation of the values and
    always add up to K (K + 1) / 2. A NaN makes the ranks of its whole row NaN; infinities are ordered.
    Ranks are piecewise constant: no gradient passes. In float32 at least; O(K log K) a row.

    Raises:
      UserError: if `x` is a scalar or not floating point.
    """
    x = _rows(x)
    return jax.lax.stop_gradient(rankdata(x, axis=-1).astype(x.dtype))


def soft_ranks(
    x: Float[Tensor, "*batch classes"], tau: Scalar = 1.0, *, chunk: int | None = None
) -> Float[Array, "*batch classes"]:
    """Differentiable ascending ranks in (1/2, K) along the last axis.

        r_k = 1/2 + sum_m sigmoid((x_k - x_m) / tau)

    They add up to K (K + 1) / 2 and tend to `hard_ranks` as tau -> 0. A NaN makes the ranks of its whole row NaN,
    and so does an infinite value. In float32 at least.

    Args:
      x: values to be ranked.
      tau: > 0, in the unit of `x`: differences well above it are told apart. A gradient reaches it.
      chunk: how many rows are ranked at a time. None ranks all at once, with K^2 numbers a row where the compiler keeps
        them: 1 GB for 256 rows of 1,000 classes. With `chunk` memory is that of `chunk` rows, in the gradient too,
        where the ranks are computed a second time. Leave it None where rows are split over devices: chunks follow one
        another.

    Raises:
      UserError: if `x` is a scalar or not floating point, `tau` is known not to be positive, or `chunk` is below 1.
    """
    x = _rows(x)
    check_positive("tau", tau)
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk must be at least 1, got {chunk}.")
    width = jnp.asarray(tau, x.dtype)

    def rank(row: Array) -> Array:
        return 0.5 + jax.nn.sigmoid((row[..., :, None] - row[..., None, :]) / width).sum(-1)

    if chunk is None:
        return rank(x)
    # Without the checkpoint the gradient would keep the K^2 numbers of every chunk.
    ranks = jax.lax.map(jax.checkpoint(rank), x.reshape(-1, x.shape[-1]), batch_size=chunk)
    return ranks.reshape(x.shape)


def _rows(x: Tensor) -> Array:
    if jnp.ndim(x) == 0:
        raise UserError("x must have at least one axis, got a scalar.")
    return as_float("x", x)
