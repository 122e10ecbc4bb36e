"""Systematic diffusion: whether the features of a class move towards those of similar classes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer

from jkd.checks import Tensor, as_float, concrete
from jkd.errors import UserError

# Below this share of |a|^2 + |b|^2 a squared distance from float32 products is rounding.
COINCIDENT = 1e-6


class ClassSums(NamedTuple):
    """The sum of the features of each class and the number of its examples: add them over batches."""

    total: Float[Array, "classes features"]
    counts: Int[Array, " classes"]


class ClassCentroids(NamedTuple):
    """The mean feature of each class, NaN for a class without examples, and the number of its examples."""

    centroids: Float[Array, "classes features"]
    counts: Int[Array, " classes"]


def class_sums(
    features: Float[Tensor, "batch features"],
    labels: Integer[Tensor, " batch"],
    num_classes: int,
    mask: Bool[Tensor, " batch"] | None = None,
) -> ClassSums:
    """Sums and counts of the features by class; float32 sums at least, int32 counts.

    Labels outside [0, num_classes) are in no class.

    Args:
      features: penultimate activations (globally pooled).
      labels: the true classes.
      num_classes: K; static.
      mask: False for padding, whose features may be anything; None counts every row.

    Raises:
      UserError: if the shapes do not fit, the features are not floating point, or `num_classes` is not positive.
    """
    rows = [jnp.shape(features)[:1], jnp.shape(labels)] + ([] if mask is None else [jnp.shape(mask)])
    if jnp.ndim(features) != 2 or len(set(rows)) > 1:
        raise UserError(
            "features must have the shape [batch, features], labels and mask [batch], "
            f"got {', '.join(str(list(shape)) for shape in [jnp.shape(features), *rows[1:]])}."
        )
    if num_classes < 1:
        raise UserError(f"num_classes must be positive, got {num_classes}.")
    x, y = as_float("features", features), jnp.asarray(labels).astype(jnp.int32)
    counted = jnp.ones(y.shape, bool) if mask is None else jnp.asarray(mask, bool)
    total = jax.ops.segment_sum(jnp.where(counted[:, None], x, 0), y, num_classes)
    return ClassSums(total, jax.ops.segment_sum(counted.astype(jnp.int32), y, num_classes))


def centroids_from_sums(sums: ClassSums) -> ClassCentroids:
    """The centroids of sums that are complete."""
    counts = sums.counts[:, None]
    return ClassCentroids(jnp.where(counts > 0, sums.total / jnp.maximum(counts, 1), jnp.nan), sums.counts)


def class_centroids(
    features: Float[Tensor, "batch features"],
    labels: Integer[Tensor, " batch"],
    num_classes: int,
    mask: Bool[Tensor, " batch"] | None = None,
) -> ClassCentroids:
    """`centroids_from_sums(class_sums(...))`, where all examples are at hand; arguments as `class_sums`."""
    return centroids_from_sums(class_sums(features, labels, num_classes, mask))


def _class_mask(mask: Tensor | None, classes: int) -> Bool[Array, " classes"]:
    if mask is None:
        return jnp.ones(classes, bool)
    if jnp.shape(mask) != (classes,):
        raise UserError(f"mask must have the shape [{classes}], got {list(jnp.shape(mask))}.")
    return jnp.asarray(mask, bool)


def centroid_distances(
    centroids: Float[Tensor, "classes features"],
    mask: Bool[Tensor, " classes"] | None = None,
    normalize: bool = True,
) -> Float[Array, "classes classes"]:
    """Euclidean distances of all pairs of centroids, by default in units of their mean.

        d_ij = ||c_i - c_j|| / mean_{i != j} ||c_i - c_j||

    From products of the centered centroids at full precision: O(K^2 + K D) memory. What these products cannot
    tell from 0 (below a thousandth of the pair's distance from the center) is exactly 0. Gradients are finite
    everywhere. A matrix whose pairs all coincide stays 0.

    Args:
      centroids: one row a class.
      mask: False for a class without examples: its row and column are NaN, and its centroid may be.
      normalize: whether to divide by the mean over all pairs of two classes; static.

    Raises:
      UserError: if the shapes do not fit, or the centroids are not floating point.
    """
    if jnp.ndim(centroids) != 2:
        raise UserError(f"centroids must have the shape [classes, features], got {list(jnp.shape(centroids))}.")
    c = as_float("centroids", centroids)
    valid = _class_mask(mask, c.shape[0])
    c = jnp.where(valid[:, None], c, 0)
    c = jnp.where(valid[:, None], c - c.sum(axis=0, keepdims=True) / jnp.maximum(valid.sum(), 1), 0)
    gram = jnp.matmul(c, c.T, precision=jax.lax.Precision.HIGHEST)
    size = jnp.diagonal(gram)[:, None] + jnp.diagonal(gram)[None, :]
    squared = size - 2 * gram
    pairs = valid[:, None] & valid[None, :] & ~jnp.eye(c.shape[0], dtype=bool)
    # Not "squared > ...": a NaN must stay one.
    apart = pairs & ~(squared <= COINCIDENT * size)
    distances = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)
    if normalize:
        total = distances.sum()
        distances = distances * pairs.sum() / jnp.where(total == 0, 1, total)
    return jnp.where(valid[:, None] & valid[None, :], distances, jnp.nan)


class DiffusionIndex(NamedTuple):
    """By how many percent each class came closer to its similar and its dissimilar classes.

    `coincident` counts the references of distance 0 that were left out, for each class.
    """

    similar: Float[Array, " classes"]
    dissimilar: Float[Array, " classes"]
    coincident: Int[Array, " classes"]


def _check_groups(similar: ArrayLike, mask: ArrayLike | None) -> None:
    """Raises UserError where a class is known to have no similar or no dissimilar class."""
    known, present = concrete(similar), concrete(np.True_ if mask is None else mask)
    if known is None or present is None:
        return
    here = np.broadcast_to(present.astype(bool), len(known))
    others = here[None, :] & ~np.eye(len(known), dtype=bool)
    for kind, group in (("similar", known.astype(bool)), ("dissimilar", ~known.astype(bool))):
        alone = here & ~(group & others).any(axis=1)
        if alone.any():
            raise UserError(f"similar leaves class {int(alone.argmax())} without any {kind} class.")


def diffusion_index(
    d_ref: Float[Tensor, "classes classes"],
    d_T: Float[Tensor, "classes classes"],
    similar: Bool[Tensor, "classes classes"],
    mask: Bool[Tensor, " classes"] | None = None,
) -> DiffusionIndex:
    """How far the classes moved towards each other between a reference and a student at temperature T.

        eta(c, S) = 100 / |S| sum_{k in S} (d_ref[c, k] - d_T[c, k]) / d_ref[c, k]    (percent)

    once with the classes S similar to c and once with all others. Systematic diffusion is eta > 0 for the similar
    ones together with eta < 0 for the dissimilar ones; a uniform shrinkage is 0 for both if the distances are
    normalized. The reference is the student at T = 1 of the same teacher.

    The normalization of `centroid_distances` is a choice of this library: the paper makes distances free of
    scale too, but how is not known here.

    Args:
      d_ref: distances of the reference, from `centroid_distances`.
      d_T: likewise, of the student compared.
      similar: row c is True for the classes similar to c; the diagonal is not read. From
        `similar_class_mask` or `superclass_mask`.
      mask: False for a class without examples: it is in no S, and its own values are NaN.

    Returns:
      Percent for each class; a mean over the classes of `mask` is what to report. Pairs that coincide in the
      reference are left out and counted; a class left without any pair, or with a NaN among its pairs, is NaN.

    Raises:
      UserError: if the shapes differ, or a class is known to have no similar or no dissimilar class.

    Reference: Chandrasegaran et al., Revisiting Label Smoothing and Knowledge Distillation Compatibility: What
      was Missing?, ICML 2022.
    """
    shapes = [jnp.shape(d_ref), jnp.shape(d_T), jnp.shape(similar)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][0] != shapes[0][1]:
        raise UserError(
            "d_ref, d_T and similar must share one shape [classes, classes], "
            f"got {', '.join(str(list(shape)) for shape in shapes)}."
        )
    classes = shapes[0][0]
    valid = _class_mask(mask, classes)
    _check_groups(similar, mask)
    reference, student = as_float("d_ref", d_ref), as_float("d_T", d_T)
    pairs = valid[:, None] & valid[None, :] & ~jnp.eye(classes, dtype=bool)
    apart = pairs & (reference != 0)
    change = jnp.where(apart, 100 * (reference - student) / jnp.where(apart, reference, 1), 0)

    def mean(group: Array) -> Array:
        return change.sum(axis=1, where=group) / group.sum(axis=1)

    near = jnp.asarray(similar, bool)
    return DiffusionIndex(mean(apart & near), mean(apart & ~near), (pairs & ~apart).sum(axis=1))


def similar_class_mask(
    reference_centroids: Float[Tensor, "classes features"], m: int, mask: Bool[Tensor, " classes"] | None = None
) -> Bool[Array, "classes classes"]:
    """For each class its m nearest ones, by the centroids of a network that is not among those compared.

    Row c is True for the m classes nearest to c, the lower ones of equals; never for c itself. Not symmetric.
    Judging similarity by the students whose diffusion is measured would be circular.

    Args:
      reference_centroids: of a pretrained network.
      m: in 1..K - 2, so that every class has dissimilar ones too; static.
      mask: False for a class without examples: it is similar to none, and its row is False.

    Raises:
      UserError: if `m` or a shape is out of range, or a centroid that counts is known not to be finite.
    """
    classes = len(reference_centroids)
    if not 1 <= m <= classes - 2:
        raise UserError(f"m must lie in 1..{classes - 2} (the number of classes - 2), got {m}.")
    distances = centroid_distances(reference_centroids, mask, normalize=False)
    valid = _class_mask(mask, classes)
    pairs = valid[:, None] & valid[None, :] & ~jnp.eye(classes, dtype=bool)
    known = concrete(jnp.isfinite(distances) | ~pairs)
    if known is not None and not known.all():
        raise UserError("reference_centroids must be finite for all classes that mask does not exclude.")
    places = jax.lax.top_k(jnp.where(pairs, -distances, -jnp.inf), m)[1]
    return jax.nn.one_hot(places, classes, dtype=bool).any(axis=1) & pairs


def superclass_mask(superclass: Integer[Tensor, " classes"]) -> Bool[Array, "classes classes"]:
    """Row c is True for the other classes of c's super-class.

    Args:
      superclass: of each class.

    Raises:
      UserError: if `superclass` is no vector.
    """
    if jnp.ndim(superclass) != 1:
        raise UserError(f"superclass must have the shape [classes], got {list(jnp.shape(superclass))}.")
    group = jnp.asarray(superclass)
    return (group[:, None] == group[None, :]) & ~jnp.eye(len(group), dtype=bool)
