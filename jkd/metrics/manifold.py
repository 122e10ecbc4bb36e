"""Fidelity and diversity apart: which share of one set of features lies within the k-nearest-neighbor balls of another.

A ball is closed: a sample at exactly the distance of the k-th neighbor lies inside. Distances are compared in squares,
which carry an error of about eps times the squared length of the centered features, so that exact ties
count as ties where the arithmetic is exact (small integers) and fall on either side where it is not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jkd.checks import Tensor
from jkd.errors import UserError
from jkd.metrics.distances import MAX_PAIRS, feature_pair, rows_at_once, squared_distances


class PrecisionRecall(NamedTuple):
    """The share of generated samples near real ones, and of real samples near generated ones; in [0, 1]."""

    precision: Float[Array, ""]
    recall: Float[Array, ""]


class DensityCoverage(NamedTuple):
    """How many real balls hold a generated sample, over k (>= 0), and the share of balls that hold any (in [0, 1])."""

    density: Float[Array, ""]
    coverage: Float[Array, ""]


def _squared_radii(features: Array, k: int, max_pairs: int) -> Array:
    """The squared distance of each row to the k-th nearest of the others; copies of a row are others."""

    def row(i: Array) -> Array:
        squares = squared_distances(features[i], features)
        others = jnp.where(jnp.arange(len(features)) == i, jnp.inf, squares)
        return -jax.lax.top_k(-others, k)[0][k - 1]

    rows = jnp.arange(len(features))
    return jax.lax.map(row, rows, batch_size=rows_at_once(max_pairs, len(rows), len(rows)))


def _balls_around(points: Array, centers: Array, squared_radii: Array, max_pairs: int) -> Int[Array, " points"]:
    """In how many balls each point lies."""

    def row(point: Array) -> Array:
        return (squared_distances(point, centers) <= squared_radii).sum()

    return jax.lax.map(row, points, batch_size=rows_at_once(max_pairs, len(points), len(centers)))


def _balls_that_hold(points: Array, centers: Array, squared_radii: Array, max_pairs: int) -> Bool[Array, " centers"]:
    """Whether each ball holds a point."""

    def row(ball: tuple[Array, Array]) -> Array:
        center, squared_radius = ball
        return (squared_distances(center, points) <= squared_radius).any()

    return jax.lax.map(row, (centers, squared_radii), batch_size=rows_at_once(max_pairs, len(centers), len(points)))


def _features(real: Tensor, generated: Tensor, k: int, *, balls_of_both: bool) -> tuple[Array, Array, Array]:
    """Both sets, centered, and whether all is finite."""
    first, second = feature_pair(("real", "generated"), real, generated)
    samples = min(len(first), len(second)) if balls_of_both else len(first)
    if not 1 <= k < samples:
        raise UserError(f"k must lie in [1, samples - 1], got {k} for {samples} samples.")
    # A median is one of the values: unlike the mean it leaves integers what they are, and so ties exact.
    center = jnp.sort(first, axis=0)[len(first) // 2][None]
    # A comparison with NaN is False, which would look like a sample outside.
    known = jnp.isfinite(first).all() & jnp.isfinite(second).all()
    return first - center, second - center, known


def manifold_precision_recall(
    real: Float[Tensor, "rows dim"], generated: Float[Tensor, "columns dim"], *, k: int = 3, max_pairs: int = MAX_PAIRS
) -> PrecisionRecall:
    """Improved precision and recall of a generator.

        precision = mean_j 1[exists i: |g_j - r_i| <= NND_k(r_i)]
        recall    = mean_i 1[exists j: |r_i - g_j| <= NND_k(g_j)]

    NND_k is the distance to the k-th nearest other sample of the same set. In float32 at least; a value that is not
    finite makes both NaN. Both depend on the numbers of samples: compare equal ones. No gradient.

    Args:
      real: features r, one sample a row.
      generated: features g.
      k: static.
      max_pairs: distances held at once (but those of one row at least); static. The result is the same.

    Raises:
      UserError: if one is no floating point matrix, their widths differ, `k` is not in [1, samples - 1] of the smaller
        set, or `max_pairs` is not positive.

    Reference: Kynkaanniemi, Karras, Laine, Lehtinen and Aila, Improved Precision and Recall Metric for Assessing
      Generative Models, NeurIPS 2019.
    """
    r, g, known = _features(real, generated, k, balls_of_both=True)
    shares = (
        (_balls_around(points, centers, _squared_radii(centers, k, max_pairs), max_pairs) > 0).mean(dtype=r.dtype)
        for points, centers in ((g, r), (r, g))
    )
    return PrecisionRecall(*(jnp.where(known, share, jnp.nan) for share in shares))


def density_coverage(
    real: Float[Tensor, "rows dim"], generated: Float[Tensor, "columns dim"], *, k: int = 5, max_pairs: int = MAX_PAIRS
) -> DensityCoverage:
    """Density and coverage: counts of balls around real samples alone, which stray generated samples cannot blow up.

        density  = 1 / (k M) sum_j #{i: |g_j - r_i| <= NND_k(r_i)},    M generated samples
        coverage = mean_i 1[exists j: |g_j - r_i| <= NND_k(r_i)]

    NND_k is the distance to the k-th nearest other real sample. Density may exceed 1. In float32 at least; a value that
    is not finite makes both NaN. No gradient. (The authors' code leaves out samples at exactly the radius.)

    Args:
      real: features r, one sample a row.
      generated: features g; one sample will do.
      k: static.
      max_pairs: distances held at once (but those of one row at least); static. The result is the same.

    Raises:
      UserError: if one is no floating point matrix, their widths differ, `k` is not in [1, real samples - 1], or
        `max_pairs` is not positive.

    Reference: Naeem, Oh, Uh, Choi and Yoo, Reliable Fidelity and Diversity Metrics for Generative Models, ICML 2020.
    """
    r, g, known = _features(real, generated, k, balls_of_both=False)
    radii = _squared_radii(r, k, max_pairs)
    density = _balls_around(g, r, radii, max_pairs).mean(dtype=r.dtype) / k
    coverage = _balls_that_hold(g, r, radii, max_pairs).mean(dtype=r.dtype)
    return DensityCoverage(*(jnp.where(known, value, jnp.nan) for value in (density, coverage)))
