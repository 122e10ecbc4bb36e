"""A generator adapted to a few images: what keeps it, its discriminator and its latents near where they started."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_softmax
from jaxtyping import Array, Float, Key

from jkd.checks import Scalar, Tensor, as_float, concrete
from jkd.errors import UserError, unknown
from jkd.gan.checks import check_same_shape, some_batch
from jkd.reduction import reduce
from jkd.similarity import pairwise_cosine
from jkd.trees import path_name

DIRECTIONS = ("paper", "code")  # of the divergence in `distance_consistency_loss`


def _log_neighbors(features: Float[Array, " batch *feature"]) -> Float[Array, "batch batch"]:
    """Logarithms of the softmax over j != i of the cosines of i and j; -inf on the diagonal."""
    cosines = pairwise_cosine(features.reshape(len(features), -1))
    return log_softmax(jnp.where(jnp.eye(len(features), dtype=bool), -jnp.inf, cosines), axis=1)


def distance_consistency_loss(
    feat_t: Float[Tensor, " batch *feature"],
    feat_s: Float[Tensor, " batch *feature"],
    *,
    direction: str = "paper",
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """How far an adapted generator changes which images of a batch resemble each other.

        p^x_i = softmax over j != i of cos(x_i, x_j),    L_i = KL(p^t_i || p^s_i) = sum_j p^t_ij ln(p^t_ij / p^s_ij)

    In nats, >= 0, and 0 where the two generators agree. Each feature map is one flat vector; j runs over the whole
    (global) batch. In float32 at least; a zero vector has cosine 0 with all others. The authors' code has the
    divergence the other way around, KL(p^s_i || p^t_i): direction="code". Its weight there is 1000 on the mean over
    all pairs, which is 1000 / (N - 1) on this mean over images.

    Args:
      feat_t: t, of the adapted generator, one layer's.
      feat_s: s, of the source generator for the same noise; no gradient passes through them.
      direction: "paper" or "code", see above; equal for small changes, to third order; static.
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: on a wrong dtype, shape, direction or reduction, or fewer than 3 examples.

    Reference: Ojha et al., Few-shot Image Generation via Cross-domain Correspondence, CVPR 2021.
    """
    target, source = some_batch("feat_t", feat_t), jax.lax.stop_gradient(some_batch("feat_s", feat_s))
    check_same_shape(feat_t=target, feat_s=source)
    if len(target) < 3:
        raise UserError(f"feat_t must hold at least 3 examples, got {len(target)}: two are each other's only neighbor.")
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)
    log_t, log_s = _log_neighbors(target), _log_neighbors(source)
    log_p, log_q = (log_t, log_s) if direction == "paper" else (log_s, log_t)
    # On the diagonal both are -inf: select before subtracting, for the value and for the gradient.
    itself = jnp.eye(len(target), dtype=bool)
    apart = jnp.where(itself, 0, log_p) - jnp.where(itself, 0, log_q)
    return reduce((jnp.exp(log_p) * apart).sum(1), reduction)


def select_layer(key: Key[Array, ""], losses: Sequence[Callable[[], Any]]) -> Any:
    """The result of one of `losses`, drawn uniformly; the others are not computed.

    Equal keys draw equal layers: give all devices, and both networks that a comparison needs, the same key.

    Args:
      key: for the draw.
      losses: functions without arguments, one a layer, that close over that layer's features; their results have the
        same shapes and dtypes.

    Raises:
      UserError: if there are none.
    """
    if not losses:
        raise UserError("losses must hold at least one function, got none.")
    return jax.lax.switch(jax.random.randint(key, (), 0, len(losses)), losses)


def fisher_information(log_likelihood_fn: Callable[[Any, Any], Array], params: Any, examples: Any) -> Any:
    """The diagonal of the empirical Fisher information: the mean over examples of squared gradients.

        F_k = mean_b ( d ln p(x_b; theta) / d theta_k )^2

    One example after the other, so that memory is that of two copies of the parameters. In float32 at least; a NaN
    stays one.

    Args:
      log_likelihood_fn: (params, example) -> ln p, one number. For a generator: the logarithm of the probability that
        the source's discriminator gives to the image of one latent being real.
      params: theta, a tree of floating point arrays.
      examples: an array or a tree of arrays with one leading axis: data, latents or keys.

    Returns:
      A tree like `params`.

    Raises:
      UserError: if there are no examples, or their leading axes differ.

    Reference: Li, Zhang, Lu and Shechtman, Few-shot Image Generation with Elastic Weight Consolidation, NeurIPS 2020.
    """
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(examples)}
    if len(counts) != 1 or counts & {(), (0,)}:
        raise UserError(f"examples must share one leading axis of at least 1, got {sorted(counts)}.")

    def add(sums: Any, example: Any) -> tuple[Any, None]:
        slopes = jax.grad(log_likelihood_fn)(params, example)
        return jax.tree.map(lambda total, slope: total + jnp.square(slope.astype(total.dtype)), sums, slopes), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(as_float("params", leaf)), params)
    sums, _ = jax.lax.scan(add, zeros, examples)
    ((count,),) = counts
    return jax.tree.map(lambda total: total / count, sums)


def ewc_penalty(params: Any, anchor_params: Any, fisher: Any) -> Float[Array, ""]:
    """How far parameters moved that mattered where they came from: elastic weight consolidation, unscaled.

        sum_k F_k (theta_k - theta*_k)^2

    In float32 at least; no gradient passes through the anchor or the Fisher information.

    Args:
      params: theta, a tree of floating point arrays.
      anchor_params: theta*, of the source; a tree like `params`.
      fisher: F, of `fisher_information`, >= 0; a tree like `params`.

    Raises:
      UserError: if the trees or the shapes of their leaves differ, or one is not floating point.

    Reference: Li, Zhang, Lu and Shechtman, Few-shot Image Generation with Elastic Weight Consolidation, NeurIPS 2020.
    """
    shapes = jax.tree.map(jnp.shape, params)
    for name, tree in (("anchor_params", anchor_params), ("fisher", fisher)):
        if jax.tree.map(jnp.shape, tree) != shapes:
            raise UserError(f"{name} must be a tree like params, with leaves of the same shapes.")

    def one(theta: Tensor, anchor: Tensor, weight: Tensor) -> Array:
        moved = as_float("params", theta) - jax.lax.stop_gradient(as_float("anchor_params", anchor))
        return (jax.lax.stop_gradient(as_float("fisher", weight)) * jnp.square(moved)).sum()

    return sum(jax.tree.leaves(jax.tree.map(one, params, anchor_params, fisher)), start=jnp.zeros(()))


def freeze(params: Any, patterns: Sequence[str]) -> Any:
    """What each leaf is to an optimizer: "frozen" where a pattern is found in its path, else "trained".

    Freezing the lower layers of a discriminator is the baseline FreezeD:

        optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, freeze(params, ["block_[01]/"]))

    Args:
      params: a tree.
      patterns: regular expressions, searched in paths like `block_0/kernel`.

    Raises:
      UserError: for a pattern that cannot be read, or that no path matches.

    Reference: Mo, Cho and Shin, Freeze the Discriminator: a Simple Baseline for Fine-Tuning GANs, 2020.
    """
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    for pattern in patterns:
        try:
            found = any(re.search(pattern, path) for path in paths)
        except re.error as error:
            raise UserError(f"patterns: the regex {pattern!r} cannot be read: {error}.") from error
        if not found:
            raise UserError(f"patterns: {pattern!r} is in no path of params. Paths: {', '.join(paths)}.")

    def label(path: Any, leaf: Any) -> str:
        return "frozen" if any(re.search(pattern, path_name(path)) for pattern in patterns) else "trained"

    return jax.tree_util.tree_map_with_path(label, params)


def anchored_latents(
    key: Key[Array, ""], anchors: Float[Tensor, " anchors *latent"], batch: int, *, sigma: Scalar = 0.1
) -> Float[Array, " batch *latent"]:
    """Latents near a few fixed ones, whose images are judged as whole images.

        z_b = a_{k_b} + sigma e_b,    k_b uniform, with replacement,    e_b ~ N(0, I)

    Args:
      key: for k and e.
      anchors: a, as many as there are training images, drawn once.
      batch: how many latents; static.
      sigma: >= 0.

    Raises:
      UserError: if `anchors` is empty, has fewer than two axes or is not floating point, `batch` is not positive, or
        `sigma` is known to be negative or not finite.

    Reference: Ojha et al., Few-shot Image Generation via Cross-domain Correspondence, CVPR 2021.
    """
    known = concrete(sigma)
    if known is not None and not 0 <= known < jnp.inf:
        raise UserError(f"sigma must be >= 0 and finite, got {sigma}.")
    if batch < 1:
        raise UserError(f"batch must be positive, got {batch}.")
    around = some_batch("anchors", anchors)
    index_key, noise_key = jax.random.split(key)
    center = around[jax.random.randint(index_key, (batch,), 0, len(around))]
    return center + sigma * jax.random.normal(noise_key, center.shape, center.dtype)
