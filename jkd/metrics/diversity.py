"""How different generated samples are from each other that resemble the same training example."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jkd.checks import Tensor, as_float
from jkd.errors import UserError
from jkd.metrics.distances import euclidean_distances


class IntraClusterDistance(NamedTuple):
    """The mean distance inside clusters: over all with two members or more, of each, and what it comes from.

    mean: over the clusters that are not skipped, each with the same weight; NaN where all are skipped.
    distances: of each cluster; NaN for one that is skipped.
    members: of each cluster, before `max_members` are drawn.
    skipped: how many clusters have fewer than two members.
    """

    mean: Float[Array, ""]
    distances: Float[Array, " references"]
    members: Int[Array, " references"]
    skipped: Int[Array, ""]


def nearest_reference(distances: Float[Tensor, "samples references"]) -> Int[Array, " samples"]:
    """The index of the nearest reference, the lower one of equals, and -1 in a row with a NaN.

    Raises:
      UserError: if `distances` is no floating point matrix with at least one column.
    """
    if jnp.ndim(distances) != 2 or jnp.shape(distances)[1] < 1:
        raise UserError(f"distances must have the shape [samples, references], got {list(jnp.shape(distances))}.")
    known = as_float("distances", distances)
    return jnp.where(jnp.isnan(known).any(axis=1), -1, known.argmin(axis=1)).astype(jnp.int32)


def _mean_of_pairs(between: Array, member: Bool[Array, " samples"]) -> Array:
    """The mean over pairs i < j of members; NaN without a pair."""
    pair = jnp.triu(member[:, None] & member[None], 1)
    return jnp.where(pair, between, 0).sum() / pair.sum()


def _summary(distances: Array, nearest: Array) -> IntraClusterDistance:
    members = (nearest[:, None] == jnp.arange(len(distances))[None]).sum(axis=0)
    used = members >= 2
    mean = jnp.where(used, distances, 0).sum() / used.sum()
    # A sample with a NaN belongs nowhere: what is left out must not look like a result.
    lost = (nearest < 0).any()
    return IntraClusterDistance(
        jnp.where(lost, jnp.nan, mean), jnp.where(lost | ~used, jnp.nan, distances), members, (~used).sum()
    )


def intra_cluster_distance_of_matrices(
    to_references: Float[Tensor, "samples references"], between: Float[Tensor, "samples samples"]
) -> IntraClusterDistance:
    """The mean distance between samples that are nearest to the same reference, from distances of any kind.

        c_i = argmin_k to_references_ik
        d_k = mean over i < j with c_i = c_j = k of between_ij,    mean = mean over clusters of 2 or more of d_k

    Larger is more diverse; copies of the references give 0. A NaN in `to_references` makes all distances NaN, one in
    `between` those that it is part of. Ties go to the lower reference.

    Args:
      to_references: of each sample to each reference (training example).
      between: of the samples among each other; only entries with i < j count.

    Raises:
      UserError: if the shapes do not fit, or one is not floating point.

    Reference: Ojha et al., Few-shot Image Generation via Cross-domain Correspondence, CVPR 2021 (with LPIPS).
    """
    nearest = nearest_reference(to_references)
    if jnp.shape(between) != 2 * nearest.shape:
        raise UserError(f"between must have the shape {2 * list(nearest.shape)}, got {list(jnp.shape(between))}.")
    values = as_float("between", between)
    clusters = jnp.arange(jnp.shape(to_references)[1])
    distances = jax.lax.map(lambda k: _mean_of_pairs(values, nearest == k), clusters)
    return _summary(distances, nearest)


def intra_cluster_distance(
    key: Key[Array, ""],
    samples: Float[Tensor, " samples *shape"],
    references: Float[Tensor, " references *shape"],
    distance_fn: Callable[[Array, Array], Array] = euclidean_distances,
    *,
    max_members: int = 50,
) -> IntraClusterDistance:
    """`intra_cluster_distance_of_matrices` for samples and a distance, over up to `max_members` of each cluster.

    The samples are compared with the references once; then the members that are drawn of each cluster with each other,
    one cluster after the other: no matrix of all samples with each other. With a feature network, wrap it:
    `lambda a, b: euclidean_distances(features(a), features(b))`; to walk through it only once, pass features
    for samples and references instead.

    Args:
      key: draws the members, without replacement.
      samples: what was generated, at least two.
      references: the training examples, at least one.
      distance_fn: (a [n, *shape], b [m, *shape]) -> distances [n, m], symmetric; Euclidean by default.
      max_members: at least 2; static. Clusters that are no larger are taken whole.

    Raises:
      UserError: if the shapes do not fit, one is not floating point, there are too few samples or references,
        `max_members` is below 2, or `distance_fn` does not give a matrix.

    Reference: Ojha et al., Few-shot Image Generation via Cross-domain Correspondence, CVPR 2021 (with LPIPS, 10
      references, 1,000 samples, 50 members).
    """
    shapes = jnp.shape(samples), jnp.shape(references)
    if not all(shapes) or shapes[0][1:] != shapes[1][1:] or shapes[0][0] < 2 or shapes[1][0] < 1:
        raise UserError(
            "samples (at least 2) and references (at least 1) must have rows of one shape, "
            f"got {list(shapes[0])} and {list(shapes[1])}."
        )
    if max_members < 2:
        raise UserError(f"max_members must be at least 2, got {max_members}.")
    x, r = as_float("samples", samples), as_float("references", references)
    to_references = distance_fn(x, r)
    if jnp.shape(to_references) != (len(x), len(r)):
        raise UserError(f"distance_fn must give the shape {[len(x), len(r)]}, got {list(jnp.shape(to_references))}.")
    nearest = nearest_reference(to_references)
    order = jax.random.uniform(key, (len(x),))

    def cluster(k: Array) -> Array:
        chosen, index = jax.lax.top_k(jnp.where(nearest == k, order, -1), min(max_members, len(x)))
        return _mean_of_pairs(as_float("distances", distance_fn(x[index], x[index])), chosen >= 0)

    return _summary(jax.lax.map(cluster, jnp.arange(len(r))), nearest)
