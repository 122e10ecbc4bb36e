"""Euclidean distances of every row of one array to every row of another, and the bound on how many are held at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jkd.checks import Tensor, as_float
from jkd.errors import UserError

MAX_PAIRS = 2**22  # 16 MiB of float32


def feature_pair(
    names: tuple[str, str], first: Tensor, second: Tensor, minimum: int = 1
) -> tuple[Float[Array, "rows dim"], Float[Array, "columns dim"]]:
    """Two sets of features as floating point matrices of one width.

    Raises:
      UserError: if they are not, or one of them has fewer than `minimum` rows.
    """
    for name, features in zip(names, (first, second), strict=True):
        if jnp.ndim(features) != 2 or jnp.shape(features)[0] < minimum or jnp.shape(features)[1] < 1:
            raise UserError(
                f"{name} must have the shape [samples, dim] with at least {minimum} samples, "
                f"got {list(jnp.shape(features))}."
            )
    if jnp.shape(first)[1] != jnp.shape(second)[1]:
        raise UserError(
            f"{names[0]} and {names[1]} must have features of the same length, "
            f"got {list(jnp.shape(first))} and {list(jnp.shape(second))}."
        )
    return as_float(names[0], first), as_float(names[1], second)


def rows_at_once(max_pairs: int, rows: int, columns: int) -> int:
    """How many of `rows` to compare with all `columns` at once: `max_pairs` pairs at most, but one row at least.

    Raises:
      UserError: if `max_pairs` is not positive.
    """
    if max_pairs < 1:
        raise UserError(f"max_pairs must be positive, got {max_pairs}.")
    return min(rows, max(1, max_pairs // columns))


def in_tiles(fn: Callable[[Any], Any], rows: Any, at_once: int) -> Any:
    """`fn` of `at_once` rows of a tree of arrays after the other, and of the rest; its results are joined."""
    leaves = jax.tree.leaves(rows)
    whole = len(leaves[0]) // at_once * at_once
    parts = []
    if whole:
        tiles = jax.tree.map(lambda x: x[:whole].reshape(-1, at_once, *x.shape[1:]), rows)
        parts.append(jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), jax.lax.map(fn, tiles)))
    if whole < len(leaves[0]):
        parts.append(fn(jax.tree.map(lambda x: x[whole:], rows)))
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def squared_distances(row: Float[Array, " dim"], columns: Float[Array, "columns dim"]) -> Float[Array, " columns"]:
    """|x - y|^2 of one row to many, >= 0, as |x|^2 - 2 x.y + |y|^2: one matrix product where rows are mapped over.

    The error is about eps (|x|^2 + |y|^2), so center the features first; sums of small integers are exact.
    """
    products = jnp.matmul(columns, row, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.square(row).sum() - 2 * products + jnp.square(columns).sum(axis=1), 0)


def euclidean_distances(
    a: Float[Tensor, " rows *shape"], b: Float[Tensor, " columns *shape"]
) -> Float[Array, "rows columns"]:
    """The Euclidean distance of every row of `a` to every row of `b`, whatever shape a row has.

        d_ij = |vec a_i - vec b_j|_2

    In float32 at least, from differences, one row of `a` after the other: copies are at distance 0 exactly, with a
    gradient of 0, and memory is that of the result and one copy of `b`.

    Raises:
      UserError: if `a` or `b` is not floating point, or their rows differ in shape.
    """
    if jnp.ndim(a) < 1 or jnp.ndim(b) < 1 or jnp.shape(a)[1:] != jnp.shape(b)[1:]:
        raise UserError(
            f"the rows of a and b must have the same shape, got {list(jnp.shape(a))} and {list(jnp.shape(b))}."
        )
    first, second = (x.reshape(x.shape[0], -1) for x in (as_float("a", a), as_float("b", b)))
    squares = jax.lax.map(lambda row: jnp.square(row[None] - second).sum(axis=1), first)
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))
