"""The kernel distance of two sets of features: an unbiased estimate, unlike the Frechet distance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jkd.checks import Tensor
from jkd.errors import UserError
from jkd.metrics.distances import MAX_PAIRS, feature_pair, rows_at_once


def _kernel_mean(x: Array, y: Array, *, same: bool, max_pairs: int) -> Array:
    """The mean of k(x_i, y_j) - 1 over all pairs, without i = j where the two are the `same`."""

    @jax.checkpoint
    def row(i: Array) -> Array:
        s = jnp.matmul(y, x[i], precision=jax.lax.Precision.HIGHEST) / y.shape[1]
        # (s + 1)^3 - 1: the ones cancel in the estimate, and float32 keeps the digits that they would take.
        values = s * (s * (s + 3) + 3)
        return jnp.where(same & (jnp.arange(len(y)) == i), 0, values).sum() / (len(y) - same)

    return jax.lax.map(row, jnp.arange(len(x)), batch_size=rows_at_once(max_pairs, len(x), len(y))).mean()


def _estimate(x: Array, y: Array, max_pairs: int) -> Array:
    within = (_kernel_mean(a, a, same=True, max_pairs=max_pairs) for a in (x, y))
    return sum(within) - 2 * _kernel_mean(x, y, same=False, max_pairs=max_pairs)


def kid(
    x: Float[Tensor, "rows dim"], y: Float[Tensor, "columns dim"], *, max_pairs: int = MAX_PAIRS
) -> Float[Array, ""]:
    """The unbiased estimate of the squared maximum mean discrepancy with a cubic kernel, over all samples.

        k(a, b) = (a.b / dim + 1)^3
        KID = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    Its expectation is 0 where both come from one distribution, whatever the number of samples, so it is below 0
    about as often as above. In float32 at least; a NaN gives NaN. Gradients pass through both sets. The
    published numbers take the features of one Inception network: say which ones these are.

    Args:
      x: features of one set, one sample a row.
      y: of the other; the two need not have the same size.
      max_pairs: kernel values held at once (but those of one row at least); static. The result is the same.

    Raises:
      UserError: if one is no floating point matrix of at least 2 rows, their widths differ, or `max_pairs` is not
        positive.

    Reference: Binkowski, Sutherland, Arbel and Gretton, Demystifying MMD GANs, ICLR 2018.
    """
    return _estimate(*feature_pair(("x", "y"), x, y, 2), max_pairs)


class SubsetKid(NamedTuple):
    """The mean of the estimates over random subsets, and their standard deviation (the number in the denominator)."""

    mean: Float[Array, ""]
    std: Float[Array, ""]


def kid_over_subsets(
    key: Key[Array, ""],
    x: Float[Tensor, "rows dim"],
    y: Float[Tensor, "columns dim"],
    *,
    number: int = 100,
    size: int = 1000,
    max_pairs: int = MAX_PAIRS,
) -> SubsetKid:
    """`kid` of random subsets of both sets, as it is usually reported; one after the other.

    Each subset is drawn without replacement, anew from all samples. The standard deviation is that of one subset's
    estimate; the subsets share samples, so it does not give the error of the mean.

    Args:
      key: draws the subsets.
      x: features of one set, one sample a row.
      y: of the other.
      number: of subsets; static.
      size: of each subset, of x as of y; static.
      max_pairs: kernel values held at once; static.

    Raises:
      UserError: as `kid`, or if `number` is not positive, or `size` is not in [2, samples].

    Reference: Binkowski, Sutherland, Arbel and Gretton, Demystifying MMD GANs, ICLR 2018.
    """
    first, second = feature_pair(("x", "y"), x, y, 2)
    smaller = min(len(first), len(second))
    if not 2 <= size <= smaller:
        raise UserError(f"size must lie in [2, {smaller}], got {size}.")
    if number < 1:
        raise UserError(f"number must be positive, got {number}.")

    def one(key: Array) -> Array:
        keys = jax.random.split(key)
        x, y = (a[jax.random.permutation(k, len(a))[:size]] for k, a in zip(keys, (first, second), strict=True))
        return _estimate(x, y, max_pairs)

    found = jax.lax.map(one, jax.random.split(key, number))
    return SubsetKid(found.mean(), found.std())
