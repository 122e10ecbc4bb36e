"""Contrastive losses that tie an adapted generator and its discriminator to the generator they started from."""

import jax
import jax.numpy as jnp
import optax
from jax.nn import logsumexp, softplus
from jaxtyping import Array, Float

from jkd.checks import Scalar, Tensor, check_positive
from jkd.errors import UserError
from jkd.gan.checks import check_same_shape, some_batch
from jkd.reduction import reduce
from jkd.similarity import cosine_similarity, pairwise_cosine


def _vectors(name: str, features: Float[Tensor, " batch *feature"]) -> Float[Array, "batch length"]:
    array = some_batch(name, features)
    return array.reshape(len(array), -1)


def generator_contrastive_loss(
    feat_t: Float[Tensor, " batch *feature"],
    feat_s: Float[Tensor, " batch *feature"],
    *,
    tau: Scalar = 0.07,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """InfoNCE of the features of images that two generators make of the same noise.

        L_i = -log( e^(cos(t_i, s_i) / tau) / sum_j e^(cos(t_i, s_j) / tau) )    (nats, > 0)

    Each feature map is one flat vector, not centered; j runs over the whole (global) batch, i included. Equal features
    give ln N. In float32 at least; a zero vector has cosine 0 with all others.

    Args:
      feat_t: t, of the adapted generator, one layer's.
      feat_s: s, of the source generator for the same noise; no gradient passes through them.
      tau: > 0.
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: on a wrong dtype, shape or reduction, fewer than 2 examples, or a tau known to be <= 0 or not finite.

    Reference: Zhao, Ding, Huang and Cheung, A Closer Look at Few-shot Image Generation, CVPR 2022.
    """
    check_positive("tau", tau)
    target, source = _vectors("feat_t", feat_t), jax.lax.stop_gradient(_vectors("feat_s", feat_s))
    check_same_shape(feat_t=target, feat_s=source)
    if len(target) < 2:
        raise UserError(f"feat_t must hold at least 2 examples, got {len(target)}: one has nothing to differ from.")
    logits = pairwise_cosine(target, source) / tau
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(target)))
    return reduce(losses, reduction)


def discriminator_contrastive_loss(
    d_fake: Float[Tensor, " batch *feature"],
    d_source: Float[Tensor, " batch *feature"],
    d_real: Float[Tensor, " shots *feature"],
    *,
    tau: Scalar = 0.07,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """InfoNCE that draws a generated image to the source's image of the same noise, and away from the training shots.

        L_i = -log( e^(cos(f_i, s_i) / tau) / (e^(cos(f_i, s_i) / tau) + sum_m e^(cos(f_i, x_m) / tau)) )    (nats, > 0)

    All three are features of one layer of the discriminator that is being trained, whose step this belongs to: the
    gradient passes through all of them, and the images must be detached from their generators. Equal features give
    ln(1 + M). In float32 at least; a zero vector has cosine 0 with all others.

    Args:
      d_fake: f, of the adapted generator's images.
      d_source: s, of the source generator's images for the same noise.
      d_real: x, of the M real training images.
      tau: > 0.
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: on a wrong dtype, shape or reduction, no training images, or a tau known to be <= 0 or not finite.

    Reference: Zhao, Ding, Huang and Cheung, A Closer Look at Few-shot Image Generation, CVPR 2022.
    """
    check_positive("tau", tau)
    fake, source = _vectors("d_fake", d_fake), _vectors("d_source", d_source)
    check_same_shape(d_fake=fake, d_source=source)
    shots = _vectors("d_real", d_real)
    if jnp.shape(d_real)[1:] != jnp.shape(d_fake)[1:]:
        wanted, got = list(jnp.shape(d_fake)[1:]), list(jnp.shape(d_real)[1:])
        raise UserError(f"d_real must have features of the shape {wanted}, as d_fake, got {got}.")
    positive = cosine_similarity(fake, source) / tau
    negatives = pairwise_cosine(fake, shots) / tau
    return reduce(softplus(logsumexp(negatives, axis=1) - positive), reduction)
