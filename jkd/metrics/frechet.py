"""The Frechet distance of two sets of features, from sums that add over batches and devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jkd.checks import Tensor, as_float, concrete
from jkd.errors import UserError

HIGHEST = jax.lax.Precision.HIGHEST


class MomentSums(NamedTuple):
    """How many samples, the sum of x - shift and that of (x - shift)(x - shift)^T: add them over batches."""

    count: Int[Tensor, ""]  # type: ignore[assignment]  # tuples have a method of that name
    total: Float[Tensor, " dim"]
    outer: Float[Tensor, "dim dim"]


def _shift(shift: Tensor | None, like: Array, dim: int) -> Float[Array, " dim"]:
    if shift is None:
        return jnp.zeros(dim, like.dtype)
    if jnp.shape(shift) != (dim,):
        raise UserError(f"shift must have the shape {[dim]}, got {list(jnp.shape(shift))}.")
    # Rounded once, here and in `moments` alike, so that what was taken away is what is added again.
    return as_float("shift", shift).astype(like.dtype)


def moment_sums(
    features: Float[Tensor, "batch dim"],
    mask: Bool[Tensor, " batch"] | None = None,
    *,
    shift: Float[Tensor, " dim"] | None = None,
) -> MomentSums:
    """The sums that mean and covariance are made of: `jax.tree.map(jnp.add, a, b)` over batches, then `moments`.

        count = sum_b mask_b,    total = sum_b mask_b (x_b - s),    outer = sum_b mask_b (x_b - s)(x_b - s)^T

    Nothing but sums over the batch, so a batch that is split over devices gives those of the whole. In
    float32 at least. The covariance is a difference of two terms of the size of |mean - s|^2: pass a `shift` near
    the mean (that of the first batch will do), the same for every batch, and float32 sums lose nothing to that.

    Args:
      features: one sample a row.
      mask: False for padding, whatever it holds; None counts every row.
      shift: s; zero by default.

    Raises:
      UserError: if `features` is no floating point matrix, or the shape of `mask` or `shift` does not fit.
    """
    if jnp.ndim(features) != 2 or jnp.shape(features)[1] < 1:
        raise UserError(f"features must have the shape [batch, dim], got {list(jnp.shape(features))}.")
    x = as_float("features", features)
    if mask is not None and jnp.shape(mask) != x.shape[:1]:
        raise UserError(f"mask must have the shape {list(x.shape[:1])}, got {list(jnp.shape(mask))}.")
    counted = jnp.ones(x.shape[0], bool) if mask is None else jnp.asarray(mask, bool)
    x = jnp.where(counted[:, None], x - _shift(shift, x, x.shape[1])[None], 0)
    return MomentSums(counted.sum(), x.sum(axis=0), jnp.matmul(x.T, x, precision=HIGHEST))


def moments(
    sums: MomentSums, *, shift: Float[Tensor, " dim"] | None = None
) -> tuple[Float[Array, " dim"], Float[Array, "dim dim"]]:
    """The mean and the covariance, with n - 1 in its denominator, of all the samples in the sums.

        mean = s + total / n,    cov = (outer - total total^T / n) / (n - 1)

    Args:
      sums: from `moment_sums`, added over all batches.
      shift: the s that they were made with.

    Raises:
      UserError: if the samples are known to be fewer than 2 (traced: NaN), or the shape of `shift` does not fit.
    """
    known = concrete(sums.count)
    if known is not None and known < 2:
        raise UserError(f"a covariance needs at least 2 samples, got {known}.")
    total, outer = jnp.asarray(sums.total), jnp.asarray(sums.outer)
    n = jnp.asarray(sums.count).astype(total.dtype)
    mean = total / n
    cov = jnp.where(n < 2, jnp.nan, (outer - jnp.outer(total, mean)) / (n - 1))
    return mean + _shift(shift, total, total.shape[0]), (cov + cov.T) / 2


def _root(cov: Array) -> Array:
    values, vectors = jnp.linalg.eigh(cov)
    return jnp.matmul(vectors * jnp.sqrt(jnp.maximum(values, 0))[None], vectors.T, precision=HIGHEST)


def _product_of_roots(cov1: Array, cov2: Array) -> tuple[Array, Array, Array]:
    root1, root2 = _root(cov1), _root(cov2)
    return root1, root2, jnp.matmul(root1, root2, precision=HIGHEST)


@jax.custom_jvp
def _trace_of_root(cov1: Array, cov2: Array) -> Array:
    # Singular values of R1 R2 are the roots of the eigenvalues of R1 C2 R1. The roots of those would turn an error
    # of eps into one of sqrt(eps), for every direction that has no variance.
    return jnp.linalg.svd(_product_of_roots(cov1, cov2)[2], compute_uv=False).sum()


@_trace_of_root.defjvp
def _trace_of_root_jvp(covs: tuple[Array, Array], changes: tuple[Array, Array]) -> tuple[Array, Array]:
    root1, root2, product = _product_of_roots(*covs)
    left, values, right = jnp.linalg.svd(product)
    alive = values > values.max() * len(values) * jnp.finfo(values.dtype).eps
    inverse = jnp.where(alive, 1 / jnp.where(alive, values, 1), 0)[None]
    sides = (jnp.matmul(root, side, precision=HIGHEST) for root, side in ((root2, right.T), (root1, left)))
    slopes = (jnp.matmul(side * inverse, side.T, precision=HIGHEST) for side in sides)
    tangents = [jnp.vdot(slope, change, precision=HIGHEST) for slope, change in zip(slopes, changes, strict=True)]
    return values.sum(), (tangents[0] + tangents[1]) / 2


def frechet_distance(
    mean1: Float[Tensor, " dim"],
    cov1: Float[Tensor, "dim dim"],
    mean2: Float[Tensor, " dim"],
    cov2: Float[Tensor, "dim dim"],
) -> Float[Array, ""]:
    """The squared Frechet (2-Wasserstein) distance of two normal distributions, >= 0.

        d = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2

    In the square of the unit of the features. The roots come from symmetric eigendecompositions, and the last
    trace is the sum of the singular values of C1^1/2 C2^1/2, so that covariances of any rank are welcome and
    nothing is complex; what rounds below 0 is 0. In float32 at least; the error is about eps dim (tr C1 + tr C2)
    where both have the same directions without variance, and up to sqrt(eps) in place of eps where not: take
    float64 for the last digits. NaN and inf give NaN.

    Gradients pass through all four. Where one of the two has no variance in a direction, the last trace has no
    derivative: it counts as constant there, and no gradient is infinite. First derivatives only.

    This is not FID, which is the name for the features of one Inception network after one way of resizing: say
    which features, and how many samples, as the distance falls as the samples grow in number.

    Args:
      mean1: m1.
      cov1: C1, symmetric; only (C1 + C1^T) / 2 counts.
      mean2: m2.
      cov2: C2, likewise.

    Raises:
      UserError: if the shapes do not fit, or an argument is not floating point.

    Reference: Dowson and Landau, The Frechet distance between multivariate normal distributions, Journal of
      Multivariate Analysis 12, 1982; for generators, Heusel et al., GANs Trained by a Two Time-Scale Update Rule
      Converge to a Local Nash Equilibrium, NeurIPS 2017.
    """
    dim = jnp.shape(mean1)
    shapes = [jnp.shape(x) for x in (mean1, cov1, mean2, cov2)]
    if len(dim) != 1 or dim[0] < 1 or shapes != [dim, 2 * dim, dim, 2 * dim]:
        raise UserError(
            "mean1, cov1, mean2 and cov2 must have the shapes [dim], [dim, dim], [dim] and [dim, dim], "
            f"got {', '.join(str(list(shape)) for shape in shapes)}."
        )
    given = as_float("mean1", mean1), as_float("cov1", cov1), as_float("mean2", mean2), as_float("cov2", cov2)
    m1, c1, m2, c2 = (x if x.ndim == 1 else (x + x.T) / 2 for x in given)
    known = jnp.array([jnp.isfinite(x).all() for x in given]).all()
    apart = jnp.square(m1 - m2).sum() + jnp.trace(c1) + jnp.trace(c2)
    return jnp.where(known, jnp.maximum(apart - 2 * _trace_of_root(c1, c2), 0), jnp.nan)
