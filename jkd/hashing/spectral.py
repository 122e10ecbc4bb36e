"""Spectral embedding of anchor graphs: leading eigenvectors of H H^T through the small H^T H.

All work with centered factors, C H with C = I - 11^T / n, so that the constant eigenvector is none of those found. Rows
may be sharded over devices: only sums over rows, [anchors, anchors] and [anchors, bits], cross.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Key

from jkd.checks import Tensor, as_float, concrete
from jkd.errors import UserError
from jkd.hashing.anchors import HIGHEST, SparseRows
from jkd.hashing.baselines import fix_signs
from jkd.linalg import eigh

Factor = Float[Tensor, "rows anchors"] | SparseRows


class Embedding(NamedTuple):
    """The leading left singular vectors of a centered factor.

    Attributes:
      vectors: orthonormal columns that sum to 0, in the order of the singular values.
      singular: their singular values, descending, in [0, 1]; 0 where the factor's rank is used up.
    """

    vectors: Float[Array, "rows bits"]
    singular: Float[Array, " bits"]


def product(left: Array, right: Array) -> Array:
    """A matrix product to the last digit."""
    return jnp.matmul(left, right, precision=HIGHEST)


def centered(columns: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
    """The columns without their means."""
    return columns - columns.mean(0, keepdims=True)


def centered_times(factor: Factor, right: Float[Array, "anchors width"]) -> Float[Array, "rows width"]:
    """C H W."""
    return centered(factor.times(right) if isinstance(factor, SparseRows) else product(jnp.asarray(factor), right))


def centered_transposed_times(factor: Factor, right: Float[Array, "rows width"]) -> Float[Array, "anchors width"]:
    """H^T C M."""
    right = centered(right)
    return factor.transposed_times(right) if isinstance(factor, SparseRows) else product(jnp.asarray(factor).T, right)


def centered_gram(factor: Factor) -> Float[Array, "anchors anchors"]:
    """H^T C H."""
    if isinstance(factor, SparseRows):
        sums = factor.column_sums()
        return factor.gram() - sums[:, None] * sums[None] / factor.shape[0]
    rows = centered(jnp.asarray(factor))
    return product(rows.T, rows)


def check_factor(factor: Factor, bits: int) -> Array | SparseRows:
    """A factor that so many bits can be read from.

    Raises:
      UserError: if it is no floating point matrix, has not more rows and more anchors with neighbors than bits, is
        known not to be finite, or `bits` is below 1.
    """
    if bits < 1:
        raise UserError(f"bits must be at least 1, got {bits}.")
    if not isinstance(factor, SparseRows):
        if jnp.ndim(factor) != 2:
            raise UserError(f"a factor must have the shape [rows, anchors], got {list(jnp.shape(factor))}.")
        factor = as_float("factor", factor)
    used, known = factor.shape[1], concrete(factor.values if isinstance(factor, SparseRows) else factor)
    if known is not None:
        if not np.isfinite(known).all():
            raise UserError("a factor must be finite, but holds NaN or inf.")
        if isinstance(factor, SparseRows):
            used = len(np.unique(np.asarray(factor.indices)[known != 0]))
        else:
            used = int((known != 0).any(0).sum())
    if min(factor.shape[0], used) < bits + 1:
        raise UserError(
            f"{bits} bits need at least {bits + 1} rows and as many anchors with neighbors, got {factor.shape[0]} "
            f"rows and {used} anchors: ask for fewer bits, or give more."
        )
    return factor


def orthonormal(
    key: Key[Array, ""], columns: Float[Array, "rows bits"], sound: Bool[Array, " bits"]
) -> Float[Array, "rows bits"]:
    """Orthonormal columns that sum to 0, with the span of the sound ones; the others are replaced by random ones.

    Sound columns must be nearly orthonormal: they are moved as little as possible.
    """
    unit = jnp.eye(len(sound), dtype=columns.dtype)

    def polished(_: Array | int, x: Array) -> Array:
        return product(x, 1.5 * unit - 0.5 * product(x.T, x))  # Newton's iteration for X (X^T X)^(-1/2)

    def separated(_: Array | int, x: Array) -> Array:
        x = centered(x)
        x = x - product(found, product(found.T, x))
        norms = jnp.sqrt(jnp.square(x).sum(0, keepdims=True))
        x = x / jnp.where(norms == 0, 1, norms)
        # A little more than X^T X, so that what rounding leaves of it has a root; the next round makes up for it.
        ridge = len(unit) * jnp.finfo(x.dtype).eps
        root = jnp.linalg.cholesky(product(x.T, x) + jnp.diag(jnp.where(sound, 1, ridge).astype(x.dtype)))
        return product(x, solve_triangular(root, unit, lower=True).T)

    found = jax.lax.fori_loop(0, 4, polished, centered(jnp.where(sound[None], columns, 0)))
    random = jax.random.normal(key, columns.shape, columns.dtype)
    return found + jax.lax.fori_loop(0, 3, separated, jnp.where(sound[None], 0, random))


def left_singular(
    key: Key[Array, ""],
    gram: Float[Array, "width width"],
    times: Callable[[Float[Array, "width bits"]], Float[Array, "rows bits"]],
    bits: int,
) -> Embedding:
    """The leading left singular vectors of a centered M from M^T M and W -> M W: eigh, then V = M W / s.

    Of a singular value that is 0 up to rounding random vectors take the place, orthogonal to all others.
    """
    values, vectors = eigh(gram)
    values, vectors = values[::-1][:bits], vectors[:, ::-1][:, :bits]
    rounding = 10 * len(gram) * jnp.finfo(gram.dtype).eps
    sound = values > rounding * jnp.maximum(values[0], rounding)
    singular = jnp.where(sound, jnp.sqrt(jnp.where(sound, values, 1)), 0)
    columns = times(vectors / jnp.where(sound, singular, 1)[None])
    return Embedding(orthonormal(key, columns, sound), singular)


def spectral_embedding(
    factor: Factor, bits: int, *, key: Key[Array, ""] | None = None, gram: Float[Array, "anchors anchors"] | None = None
) -> Embedding:
    """The eigenvectors of A = H H^T with the largest eigenvalues, without the constant one; float32 at least.

        H^T C H w = s^2 w,    v = C H w / s

    So the cost is rows x anchors^2, and no [rows, rows] matrix exists. The entry of the largest size of each vector is
    positive. Vectors of equal eigenvalues are any basis of their space: compare V V^T. Where fewer than `bits`
    eigenvalues are positive, random vectors orthogonal to all others complete them, with singular value 0.

    Args:
      factor: H of `graph_factor`; it is centered here.
      bits: how many vectors; static.
      key: draws what completes them; by default a fixed one.
      gram: H^T C H where it is known.

    Raises:
      UserError: if the factor is no floating point matrix, there are not more rows and more anchors with neighbors
        than bits, or a value is known not to be finite.
    """
    factor = check_factor(factor, bits)
    gram = centered_gram(factor) if gram is None else gram
    key = jax.random.key(0) if key is None else key
    vectors, singular = left_singular(key, gram, lambda right: centered_times(factor, right), bits)
    return Embedding(fix_signs(vectors), singular)
