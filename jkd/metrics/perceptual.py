"""Distances of images in the feature maps of a network, normalized at every position."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jkd.checks import Tensor, as_float
from jkd.errors import UserError

HIGHEST = jax.lax.Precision.HIGHEST
EPS = 1e-20  # in the square of the unit of the features

Features = Mapping[str, Float[Tensor, "..."]]
Weights = Mapping[str, Float[Tensor, " _"]]


def perceptual_distance(
    features_a: Features, features_b: Features, weights: Weights | None = None
) -> Float[Array, " batch"]:
    """How much two batches of images differ, pair by pair, in the directions of their features.

        d_i = sum_l 1/P_l sum_p sum_c w_lc (u^a_ilpc - u^b_ilpc)^2,    u = x / sqrt(sum_c x_c^2 + 1e-20)

    with the P_l positions p and the channels c of layer l; >= 0 for weights >= 0, and without `weights` at most 4 a
    layer. In float32 at least; where a position has no activation u is 0 and the gradient finite.

    It is LPIPS only with the layers, the input scaling and the published heads (as `weights`) of the AlexNet, VGG-16 or
    SqueezeNet of its authors, on images in [-1, 1]; none of them comes with this library. With their layers and no
    weights it is what the paper calls its baseline without learning; with other networks, name the network.

    Args:
      features_a: of the first images by layer: maps [batch, height, width, channels] or vectors [batch, channels].
      features_b: of the second images, likewise.
      weights: of the channels, by layer; 1 by default.

    Raises:
      UserError: if the layers, shapes or weights do not fit, or one is not floating point.

    Reference: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR 2018.
    """
    pairs = _directions(features_a, features_b, weights, one_batch=True)
    squares = [(w * jnp.square(a - b)).sum(axis=-1).mean(axis=-1) for a, b, w in pairs]
    return jnp.stack(squares).sum(axis=0)


def pairwise_perceptual_distances(
    features_a: Features, features_b: Features, weights: Weights | None = None
) -> Float[Array, "rows columns"]:
    """`perceptual_distance` of each of N images to each of M, [N, M].

        d_ij = |v_i|^2 + |v_j|^2 - 2 v_i . v_j,    v = all w^1/2 u / P^1/2 of an image in one vector

    by one matrix product a layer: memory is that of the normalized maps and of the result. What rounds below 0 is 0;
    the error is about 1e-7 times the sum of the weighted squares, so copies are at a distance of that size.

    For `jkd.metrics.intra_cluster_distance_of_matrices`: of the samples to the references, and to each other.

    Raises:
      UserError: as `perceptual_distance`.
    """
    found = []
    for a, b, w in _directions(features_a, features_b, weights, one_batch=False):
        squares = [(w * jnp.square(u)).sum(axis=-1).mean(axis=-1) for u in (a, b)]
        products = jnp.einsum("npc,mpc->nm", w * a, b, precision=HIGHEST) / a.shape[1]
        found.append(squares[0][:, None] + squares[1][None] - 2 * products)
    return jnp.maximum(functools.reduce(jnp.add, found), 0)


def _directions(
    features_a: Features, features_b: Features, weights: Weights | None, *, one_batch: bool
) -> list[tuple[Array, Array, Array]]:
    """Of each layer: both maps as unit vectors [batch, positions, channels], and weights [1, 1, channels]."""
    names = sorted(features_a)
    for argument, given in (("features_b", features_b), ("weights", weights)):
        if given is not None and sorted(given) != names:
            raise UserError(f"{argument} must have the layers of features_a, {names}, got {sorted(given)}.")
    if not names:
        raise UserError("features_a must have at least one layer.")
    found, batches = [], set()
    for name in names:
        a, b = (_unit(name, features[name]) for features in (features_a, features_b))
        if jnp.shape(features_a[name])[1:] != jnp.shape(features_b[name])[1:] or (one_batch and len(a) != len(b)):
            shapes = [list(jnp.shape(features[name])) for features in (features_a, features_b)]
            raise UserError(f"the maps {name!r} of both must have the same shape, got {shapes[0]} and {shapes[1]}.")
        found.append((a, b, _weight(name, weights, a)))
        batches.add((len(a), len(b)))
    if len(batches) > 1:
        raise UserError(f"all layers must be of the same images, got the numbers {sorted(batches)}.")
    return found


def _unit(name: str, features: Tensor) -> Array:
    if jnp.ndim(features) not in (2, 4) or 0 in jnp.shape(features)[1:]:
        raise UserError(
            f"the map {name!r} must be [batch, height, width, channels] or [batch, channels], "
            f"got {list(jnp.shape(features))}."
        )
    x = as_float(name, features)
    x = x.reshape(len(x), -1, x.shape[-1])
    return x / jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True) + EPS)


def _weight(name: str, weights: Weights | None, like: Array) -> Array:
    channels = like.shape[-1]
    if weights is None:
        return jnp.ones((1, 1, channels), like.dtype)
    if jnp.shape(weights[name]) != (channels,):
        raise UserError(
            f"the weights of {name!r} must have the shape {[channels]}, got {list(jnp.shape(weights[name]))}."
        )
    return as_float(name, weights[name])[None, None]
