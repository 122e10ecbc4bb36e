"""Hash functions that are linear: what learned ones have to beat."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jkd.checks import Tensor, as_float, concrete
from jkd.errors import UserError
from jkd.linalg import eigh

HIGHEST = jax.lax.Precision.HIGHEST


class Projection(NamedTuple):
    """A linear hash function: bit k of x is 1 where (x - center) . weights_k >= 0.

    Attributes:
      center: subtracted first.
      weights: a direction a column.
    """

    center: Float[Tensor, " dim"]
    weights: Float[Tensor, "dim bits"]


def project(projection: Projection, x: Float[Tensor, "rows dim"]) -> Float[Array, "rows bits"]:
    """The scores (x - center) weights, in float32 at least; `to_signs` makes codes of them.

    Raises:
      UserError: if `x` is no floating point matrix of the projection's width.
    """
    features, width = as_float("x", x), len(projection.center)
    if features.ndim != 2 or features.shape[1] != width:
        raise UserError(f"x must have the shape [rows, {width}], got {list(features.shape)}.")
    return jnp.matmul(features - projection.center[None], projection.weights, precision=HIGHEST)


def fix_signs(columns: Float[Tensor, "rows bits"]) -> Float[Array, "rows bits"]:
    """Flips columns so that the entry of the largest magnitude (the first of equals) of each is positive.

    Singular vectors and rotations of codes are known up to this sign.
    """
    matrix = jnp.asarray(columns)
    largest = jnp.take_along_axis(matrix, jnp.argmax(jnp.abs(matrix), axis=0)[None], axis=0)
    return matrix * jnp.where(largest < 0, -1, 1).astype(matrix.dtype)


def lsh_projection(key: Key[Array, ""], x: Float[Tensor, "rows dim"], bits: int) -> Projection:
    """Random hyperplanes through the mean of the data: weights are drawn from N(0, 1).

    The expected share of bits in which two codes differ is the angle between their (centered) features over pi.

    Args:
      key: draws the weights.
      x: only its mean counts.
      bits: static; may exceed the width of `x`.

    Raises:
      UserError: if `x` is no floating point matrix with rows, or `bits` is not positive.

    Reference: Charikar, Similarity Estimation Techniques from Rounding Algorithms, STOC 2002.
    """
    features = _features("x", x, 1)
    if bits < 1:
        raise UserError(f"bits must be positive, got {bits}.")
    return Projection(features.mean(0), jax.random.normal(key, (features.shape[1], bits), features.dtype))


def pca_projection(x: Float[Tensor, "rows dim"], bits: int) -> Projection:
    """The directions of the largest variance: eigenvectors of the covariance, the largest eigenvalue first.

    In float32 at least. Where the data vary in fewer directions than `bits` (constant features, for one), the columns
    left over are 0, so that their bit is 1 for all. NaN gives NaN. `fix_signs` decides between the two signs of each.
    The directions cannot be differentiated.

    Args:
      x: one sample a row.
      bits: static.

    Raises:
      UserError: if `x` is no floating point matrix, or `bits` is not in [1, min(rows - 1, dim)].
    """
    features = _features("x", x, 2)
    most = min(len(features) - 1, features.shape[1])
    if not 1 <= bits <= most:
        raise UserError(f"bits must lie in [1, min(rows - 1, dim)] = [1, {most}], got {bits}.")
    center = features.mean(0)
    centered = features - center[None]
    variances, vectors = eigh(jnp.matmul(centered.T, centered, precision=HIGHEST) / len(features))
    # What rounding leaves of a variance of 0: relative to the scale of the features, not of what varies in them.
    scale = jnp.square(features).mean(0).sum()
    noise = 10 * len(center) * jnp.finfo(features.dtype).eps * jnp.maximum(variances[-1], scale * 1e-3)
    kept = jnp.where((variances <= noise)[None], 0, vectors)[:, ::-1][:, :bits]
    return Projection(center, fix_signs(kept))


def itq_rotation(key: Key[Array, ""], v: Float[Tensor, "rows bits"], iters: int = 50) -> Float[Array, "bits bits"]:
    """Iterative quantization: the rotation R of scores that brings them near their signs.

        min |B - V R|^2 over B in {-1, 1}, R^T R = I:    B = sign(V R),    R = W Q^T of V^T B = W S Q^T

    from a random orthogonal R, in turn; no step raises the error. In float32 at least. sign(0) is 1. The columns of
    the result are flipped by `fix_signs`, so R may be a reflection; flips only rename 0 and 1 of a bit. Rows may be
    sharded: what is decomposed is bits x bits. NaN gives NaN.

    Args:
      key: draws the start.
      v: V, scores centered by the caller, such as those of `pca_projection` or spectral coordinates.
      iters: static; 0 gives the random start.

    Raises:
      UserError: if `v` is no floating point matrix, has fewer rows than columns, or `iters` is negative.

    Reference: Gong and Lazebnik, Iterative Quantization: A Procrustean Approach to Learning Binary Codes, CVPR 2011.
    """
    scores = _features("v", v, 1)
    rows, bits = scores.shape
    if rows < bits:
        raise UserError(f"v must have at least as many rows as columns (bits), got {[rows, bits]}.")
    if iters < 0:
        raise UserError(f"iters must not be negative, got {iters}.")

    def closer(_: Array | int, rotation: Array) -> Array:
        signs = jnp.where(jnp.matmul(scores, rotation, precision=HIGHEST) >= 0, 1, -1).astype(scores.dtype)
        w, _, qt = jnp.linalg.svd(jnp.matmul(scores.T, signs, precision=HIGHEST))
        return jnp.matmul(w, qt, precision=HIGHEST)

    start = jnp.linalg.qr(jax.random.normal(key, (bits, bits), scores.dtype))[0]
    return fix_signs(jax.lax.fori_loop(0, iters, closer, start))


def itq_projection(key: Key[Array, ""], x: Float[Tensor, "rows dim"], bits: int, iters: int = 50) -> Projection:
    """`pca_projection`, rotated by `itq_rotation`.

    Raises:
      UserError: as these two.
    """
    found = pca_projection(x, bits)
    rotation = itq_rotation(key, project(found, x), iters)
    return found._replace(weights=jnp.matmul(found.weights, rotation, precision=HIGHEST))


def cca_projections(
    first: Float[Tensor, "rows first"], second: Float[Tensor, "rows second"], bits: int, *, max_iter: int = 2000
) -> tuple[Projection, Projection]:
    """Directions of two views of the same samples that correlate most, by scikit-learn; on the host.

    Features are standardized; the weights include that. Row i of both views is one sample.

    Args:
      first: one view.
      second: the other.
      bits: directions of each.
      max_iter: of scikit-learn's power iterations, a direction.

    Raises:
      UserError: if a view is no floating point matrix, the rows differ in number, a value is not finite, or `bits` is
        not in [1, rank] of the view that varies in fewer directions.
    """
    from sklearn.cross_decomposition import CCA  # takes a second to import

    views = [_finite(name, x) for name, x in (("first", first), ("second", second))]
    if len(views[0]) != len(views[1]):
        raise UserError(f"first and second must have equally many rows, got {len(views[0])} and {len(views[1])}.")
    centers = [x.mean(0) for x in views]
    centered = [x - c[None] for x, c in zip(views, centers, strict=True)]
    most = min(int(np.linalg.matrix_rank(x)) for x in centered)
    if not 1 <= bits <= most:
        raise UserError(f"bits must lie in [1, {most}], as many as directions in which both views vary; got {bits}.")
    scales = [np.where(np.ptp(x, axis=0) > 0, x.std(0), 1) for x in views]
    fitted = CCA(bits, scale=False, max_iter=max_iter).fit(*(x / s for x, s in zip(centered, scales, strict=True)))
    rotations = fitted.x_rotations_ / scales[0][:, None], fitted.y_rotations_ / scales[1][:, None]
    one, other = (
        Projection(c.astype(np.float32), w.astype(np.float32)) for c, w in zip(centers, rotations, strict=True)
    )
    return one, other


def _finite(name: str, x: Tensor) -> np.ndarray:
    known = concrete(_features(name, x, 2))
    if known is None:
        raise UserError(f"{name} must be an array of this host: scikit-learn cannot be traced.")
    if not np.isfinite(known).all():
        raise UserError(f"{name} must be finite.")
    return known.astype(np.float64)


def _features(name: str, x: Tensor, rows: int) -> Array:
    features = as_float(name, x)
    if features.ndim != 2 or len(features) < rows or features.shape[1] < 1:
        raise UserError(f"{name} must be a matrix of at least {rows} rows, got the shape {list(features.shape)}.")
    return features
