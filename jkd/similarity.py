"""Cosine similarities whose gradients are finite everywhere."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jkd.checks import Scalar, Tensor, as_float
from jkd.errors import UserError

EPS = 1e-16


def cosine_similarity(
    a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], *, axis: int = -1, eps: Scalar = EPS
) -> Float[Array, "*reduced"]:
    """The cosine of the angle between `a` and `b` along `axis`.

        cos(a, b) = <a, b> / (sqrt(|a|^2 + eps) sqrt(|b|^2 + eps))

    In [-1, 1] up to rounding, in float32 at least; 0, with a finite gradient, where a vector is zero. Vectors much
    shorter than sqrt(eps) count as nearly zero. A NaN gives NaN. (`optax.losses.cosine_similarity` clips |a|^2 from
    below instead, which makes the gradient jump at the bound, and by default gives NaN for zero.)

    Args:
      a: vectors along `axis`.
      b: of the same shape.
      axis: the axis that is summed over.
      eps: > 0, in the square of the unit of the vectors.

    Raises:
      UserError: if the shapes differ, or one of the two is not floating point.
    """
    a, b = as_float("a", a), as_float("b", b)
    if a.shape != b.shape:
        raise UserError(f"a and b must have the same shape, got {list(a.shape)} and {list(b.shape)}.")
    norms = [jnp.sqrt(jnp.square(x).sum(axis) + eps) for x in (a, b)]
    return (a * b).sum(axis) / (norms[0] * norms[1])


def pairwise_cosine(
    a: Float[Tensor, "rows dim"], b: Float[Tensor, "columns dim"] | None = None, *, eps: Scalar = EPS
) -> Float[Array, "rows columns"]:
    """The cosine similarity of every row of `a` with every row of `b` (by default, of `a`).

    As `cosine_similarity` for each pair; memory is that of the result and one copy of the rows.

    Args:
      a: one vector a row.
      b: one vector a row, of the same length; None compares the rows of `a` with each other.
      eps: > 0, in the square of the unit of the vectors.

    Raises:
      UserError: if `a` or `b` is no floating point matrix, or their rows differ in length.
    """
    a = as_float("a", a)
    b = a if b is None else as_float("b", b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(
            f"a and b must have the shapes [rows, dim] and [columns, dim], got {list(a.shape)} and {list(b.shape)}."
        )
    # The default precision of a TPU would leave three digits, too few to tell similar vectors apart.
    return jnp.matmul(unit_rows(a, eps=eps), unit_rows(b, eps=eps).T, precision=jax.lax.Precision.HIGHEST)


def unit_rows(x: Float[Tensor, "*shape dim"], *, eps: Scalar = EPS) -> Float[Array, "*shape dim"]:
    """Vectors along the last axis divided by their lengths: x / sqrt(|x|^2 + eps).

    In float32 at least; a zero vector stays zero, with a gradient of at most 1 / sqrt(eps). A NaN gives NaN.

    Args:
      x: one vector a row.
      eps: > 0, in the square of the unit of the vectors.

    Raises:
      UserError: if `x` is not floating point.
    """
    x = as_float("x", x)
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + eps)
